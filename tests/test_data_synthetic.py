"""Recall tasks: one place for the answer, spans that survive encoding, depth, learnable rows."""

import numpy as np
import pytest

from hydrajax.data import synthetic
from hydrajax.data.synthetic import TASKS, counterfactual, encode_example, make_example
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError
from tests.bpe_folder import build_bpe

LENGTH = 1024
CASES = [("bytes", task) for task in TASKS] + [("bpe", task) for task in TASKS if task != "recall"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = build_bpe(tmp_path_factory.mktemp("tokenizer") / "bpe")
    return {"bytes": load_tokenizer("bytes"), "bpe": load_tokenizer(folder)}


@pytest.fixture(params=CASES, ids="-".join)
def case(request, tokenizers):
    kind, task = request.param
    return task, tokenizers[kind], np.random.default_rng(7)


def test_examples_fill_their_length_and_split_at_the_answer(case):
    task, tokenizer, rng = case
    for _ in range(8):
        example = make_example(task, rng, tokens=LENGTH, tokenizer=tokenizer)
        prompt, answer = tokenizer.encode(example.prompt), tokenizer.encode(example.answer)
        assert prompt + answer == tokenizer.encode(example.prompt + example.answer)
        assert 0.85 * LENGTH <= len(prompt + answer) <= LENGTH
        assert example.prompt.count(example.answer) == 1
        encoded = encode_example(example, tokenizer)
        assert (encoded.prompt, encoded.answer) == (prompt, answer)
        assert prompt[slice(*encoded.span)] == answer
        assert "\x1e" not in example.prompt


def test_depth_is_honoured(case):
    task, tokenizer, rng = case
    places = []
    for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
        example = make_example(task, rng, tokens=4 * LENGTH, depth=depth, tokenizer=tokenizer)
        encoded = encode_example(example, tokenizer)
        assert example.depth == depth
        places.append(encoded.span[0] / len(encoded.prompt))
    assert places == sorted(places)
    if task != "recall":  # its pairs all stand before the queries
        assert np.abs(np.array(places) - [0, 0.25, 0.5, 0.75, 1]).max() < 0.1


def test_counterfactual_differs_in_the_answer_alone(case):
    task, tokenizer, rng = case
    example = make_example(task, rng, tokens=LENGTH, tokenizer=tokenizer)
    other = counterfactual(example, rng, tokenizer)
    assert (other.before, other.after, other.task) == (example.before, example.after, task)
    assert other.answer not in example.prompt
    clean, swapped = encode_example(example, tokenizer), encode_example(other, tokenizer)
    differ = np.flatnonzero(np.array(clean.prompt) != swapped.prompt)
    assert clean.span == swapped.span and len(differ)
    assert clean.span[0] <= differ.min() and differ.max() < clean.span[1]


def test_counterfactual_changes_every_digit_and_word(tokenizers):
    rng = np.random.default_rng(0)
    for task in ("kv_list", "needle_single_3"):
        for _ in range(20):
            example = make_example(task, rng, tokens=LENGTH, tokenizer=tokenizers["bpe"])
            pair = [counterfactual(example, rng, tokenizers["bpe"]).answer, example.answer]
            a, b = [p.split() if task == "needle_single_3" else p.strip() for p in pair]
            assert len(a) == len(b) and all(x != y for x, y in zip(a, b, strict=True))


def test_same_seed_same_example(case):
    task, tokenizer, _ = case
    make = [
        make_example(task, np.random.default_rng(s), tokens=LENGTH, tokenizer=tokenizer)
        for s in (3, 3, 4)
    ]
    assert make[0] == make[1] != make[2]


def test_distractors_and_lists(tokenizers):
    rng = np.random.default_rng(0)

    def prompt(task):
        return make_example(task, rng, tokens=LENGTH, tokenizer=tokenizers["bytes"]).prompt

    assert prompt("needle_multikey_1").count("magic number for") == 6  # 4 facts, 2 questions
    for task, pairs in (("kv_list", 12), ("kv_list_24", 24)):
        lines = prompt(task).split("The list of numbers:\n")[1].split("\n\n")[0].split("\n")
        assert len(lines) == pairs == len({line.split(":")[0] for line in lines})


def test_variables_chain_leads_to_the_answer(tokenizers):
    example = make_example(
        "vt", np.random.default_rng(1), tokens=LENGTH, tokenizer=tokenizers["bytes"]
    )
    text = example.prompt
    name = text.rsplit("VAR ", 1)[1].removesuffix(" =")
    for _ in range(2):
        name = text.split(f"VAR {name} = VAR ")[1].split(".")[0]
    assert f"VAR {name} ={example.answer}." in text


def test_haystack_of_the_user(tokenizers):
    text = " ".join(f"This is sentence {i} of mine." for i in range(99))
    example = make_example(
        "needle_single_2",
        np.random.default_rng(0),
        tokens=LENGTH,
        tokenizer=tokenizers["bytes"],
        haystack=text,
    )
    assert example.prompt.count("of mine.") > 20 and "Kellynch" not in example.prompt


def test_recall_row_answers_every_query(tokenizers):
    rng = np.random.default_rng(0)
    for length in (8, 64, 128, 191):
        tokens, answers = synthetic.training_row("recall", rng, length, tokenizers["bytes"])
        text = tokenizers["bytes"].decode(tokens)
        pairs, queries = text.split("|")
        known = {pairs[i]: pairs[i + 1] for i in range(0, len(pairs), 3)}
        assert len(text) == length == len(answers)
        assert len(known) == len(set(known.values())) == len(pairs) // 3
        assert pairs[::3] == pairs[2::3]
        assert all(known[k] == v for k, v in zip(queries[::3], queries[1::3], strict=False))
        marked = np.array(list(text))
        marked[answers == 0] = "."
        marked = "".join(marked)
        assert marked[: len(pairs)] == "".join(f"..{k}" for k in known)
        assert marked[len(pairs) + 1 :: 3] == "." * len(queries[::3])
        assert marked[len(pairs) + 2 :: 3] == queries[1::3]


def test_recall_rows_are_often_short_and_sometimes_full(tokenizers):
    rng = np.random.default_rng(0)
    rows = [synthetic.training_row("recall", rng, 128, tokenizers["bytes"])[0] for _ in range(400)]
    pairs = np.array([list(row).index(ord("|")) // 3 for row in rows])
    assert pairs.min() == 2 and pairs.max() == 21
    assert 5 <= np.median(pairs) <= 8


def test_training_row_marks_the_answer(case):
    task, tokenizer, rng = case
    tokens, answers = synthetic.training_row(task, rng, LENGTH, tokenizer)
    assert tokens.dtype == np.int32 and len(tokens) == len(answers) <= LENGTH
    assert set(np.unique(answers)) == {0, 1}
    if task != "recall":
        assert tokens[-1] == tokenizer.eos_ids[0]
        answer = tokenizer.decode(tokens[answers == 1])
        assert tokenizer.decode(tokens).count(answer) == 2


def test_faults(tokenizers):
    rng, tokenizer = np.random.default_rng(0), tokenizers["bytes"]
    with pytest.raises(UserError, match="'nothing' is unknown"):
        make_example("nothing", rng, tokens=99, tokenizer=tokenizer)
    with pytest.raises(UserError, match="needs at least"):
        make_example("kv_list", rng, tokens=99, tokenizer=tokenizer)
    with pytest.raises(UserError, match="at least 8"):
        make_example("recall", rng, tokens=5, tokenizer=tokenizer)
    with pytest.raises(UserError, match="depth=2"):
        make_example("recall", rng, tokens=64, depth=2, tokenizer=tokenizer)
    with pytest.raises(UserError, match="haystack"):
        make_example("needle_single_2", rng, tokens=999, tokenizer=tokenizer, haystack="no")


def test_recall_needs_single_character_tokens(tmp_path):
    folder = build_bpe(tmp_path / "bpe", text="abcdefgh", vocab_size=300)
    with pytest.raises(UserError, match="bytes tokenizer"):
        synthetic.training_row("recall", np.random.default_rng(0), 64, load_tokenizer(folder))
