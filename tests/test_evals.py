"""Evals: figures against float64 numpy, recall against real decoding, the command's files."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrajax.checkpoint import CheckpointStore, make_lineage, write_config
from hydrajax.config import DataConfig, EvalConfig, HydraConfig, ModelConfig, RunConfig, to_plain
from hydrajax.evals import Subject, evaluate, report, zero_la
from hydrajax.evals.__main__ import folders, run
from hydrajax.evals.agreement import agreement
from hydrajax.evals.needle import (
    NO_TOKEN,
    PromptBatch,
    Prompts,
    make_prompts,
    predictor,
    recall,
    score,
    wilson,
)
from hydrajax.evals.perplexity import held_out, perplexity
from hydrajax.evals.subject import over_chunks
from hydrajax.generation import Sampling, generate
from hydrajax.head_plan import HeadPlan
from hydrajax.losses import next_tokens
from hydrajax.model import Model, bind, split_params
from hydrajax.tokenizer import load_tokenizer, save_tokenizer
from hydrajax.typing import UserError

ROWS, LENGTH = 4, 32  # shared by all tests: compilation is what costs time here
CFG = ModelConfig(
    vocab_size=272, width=32, mlp_width=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    max_context=32,
)  # fmt: skip
FULL = HeadPlan.all_full(1, 4, 2)
MIXED = HeadPlan(((0, 2, 3),), 4, 2)
EVAL = EvalConfig(
    tasks=("recall",), lengths=(LENGTH,), depths=3, prompts=2, ppl_lengths=(LENGTH,),
    ppl_tokens=8 * LENGTH, agreement_rows=8, rows=ROWS,
)  # fmt: skip
TOKENIZER = load_tokenizer("bytes")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build(name, plan, seed=0, **changes):
    hydra = HydraConfig.teacher() if plan == FULL else HydraConfig()
    graphdef, params = split_params(
        Model(replace(CFG, **changes), hydra, plan, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    )
    rng = np.random.default_rng(seed)
    noise = {k: 0.2 * rng.standard_normal(v.shape).astype("f4") for k, v in params.items()}
    return Subject(name, graphdef, {k: v + noise[k] for k, v in params.items()})


@pytest.fixture(scope="module")
def teacher():
    return build("teacher", FULL)


@pytest.fixture(scope="module")
def student():
    return build("tiny/distill", MIXED, seed=1, max_context=LENGTH // 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty short documents, some with letters of several bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\x1e".join(f"Döcument {i} ends with its number, {i}." for i in range(20)))
    return DataConfig(files=(str(path),), seq_len=LENGTH, rows=ROWS, holdout=0.5)


@pytest.fixture(scope="module")
def text(data):
    return held_out(data, TOKENIZER, length=LENGTH, rows=8, batch=ROWS)


def log_probabilities(subject, batch):
    """[B, T, V] in float64."""
    logits = jax.jit(lambda p, b: bind(subject.graphdef, p)(
        b["tokens"], segment_ids=b["segment_ids"], positions=b["positions"]
    ))(subject.params, batch)  # fmt: skip
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("hits", "n", "want"),
    [(8, 8, (0.676, 1.0)), (5, 8, (0.306, 0.863)), (3, 3, (0.438, 1.0)), (0, 10, (0.0, 0.278))],
)
def test_wilson_interval(hits, n, want):
    np.testing.assert_allclose(wilson(hits, n), want, atol=6e-4)


def test_score_wants_every_answer_token():
    answer = np.array([[5, 6, 7], [5, 6, NO_TOKEN], [8, NO_TOKEN, NO_TOKEN]])
    said = np.array([[5, 6, 7], [5, 0, 3], [8, 1, 2]])
    exact, share = score(said, answer)
    np.testing.assert_array_equal(exact, [True, False, True])
    np.testing.assert_allclose(share, [1.0, 0.5, 1.0])


def test_recall_counts_prompts_by_depth_and_no_filler():
    prompts = make_prompts(EVAL, TOKENIZER, "recall", LENGTH)  # 6 prompts in rows of 4
    assert [len(b.depth) for b in prompts.batches] == [ROWS, ROWS]
    perfect = list(recall(lambda b: b.answer, prompts))
    assert [r["depth"] for r in perfect] == [0.0, 0.5, 1.0, None]
    assert [r["n"] for r in perfect] == [2, 2, 2, 6]
    assert all(r["exact"] == r["token_accuracy"] == 1 for r in perfect)
    late = list(recall(lambda b: np.where(b.depth[:, None] == 2, b.answer, 0), prompts))
    assert [r["exact"] for r in late] == [0, 0, 1, pytest.approx(1 / 3)]


def test_prompts_ask_for_what_they_hold():
    prompts = make_prompts(EVAL, TOKENIZER, "recall", LENGTH)
    again = make_prompts(EVAL, TOKENIZER, "recall", LENGTH)
    other = make_prompts(replace(EVAL, seed=2), TOKENIZER, "recall", LENGTH)
    for batch, same, new in zip(prompts.batches, again.batches, other.batches, strict=True):
        np.testing.assert_array_equal(batch.tokens, same.tokens)
        assert (batch.tokens != new.tokens).any()
        assert not batch.segment_ids[batch.depth < 0].any()
        asked = batch.answer != NO_TOKEN
        assert asked.any(axis=1).tolist() == (batch.depth >= 0).tolist()
        after = np.take_along_axis(batch.tokens, batch.at + 1, axis=1)
        np.testing.assert_array_equal(after[asked], batch.answer[asked])


def test_one_forward_says_what_greedy_decoding_would(student):
    ids = list(b"some prompt ")
    (answer,) = generate(
        student.graphdef, student.params, [ids], sampling=Sampling(max_new_tokens=4)
    )
    tokens, segments = np.zeros((2, ROWS, LENGTH), np.int32)
    answers = np.tile(np.array(answer, np.int32), (ROWS, 1))
    answers[1, 2] += 1  # wrong in the middle: what follows is right only given the mistake
    for row in range(ROWS):
        tokens[row, : len(ids) + 4] = ids + list(answers[row])
        segments[row, : len(ids) + 4] = 1
    at = np.tile(len(ids) - 1 + np.arange(4), (ROWS, 1)).astype(np.int32)
    batch = PromptBatch(tokens, segments, at, answers, np.array([0, 1, -1, -1]))
    rows = list(recall(predictor(student), Prompts("t", LENGTH, (0.0, 1.0), [batch])))
    assert [r["exact"] for r in rows] == [1, 0, 0.5]
    assert 0 < rows[1]["token_accuracy"] < 1


def test_perplexity_against_float64(student, text):
    row = perplexity(student, text, chunk=20)
    nats, seen, num_bytes = [], [], 0
    for batch in text.batches:
        targets, weights = map(np.asarray, next_tokens(jax.tree.map(jnp.asarray, batch)))
        picked = np.take_along_axis(log_probabilities(student, batch), targets[..., None], -1)
        nats += list(-picked[..., 0][weights > 0])
        seen += list(batch["positions"][weights > 0] + 1)
        num_bytes += int((targets[weights > 0] < 256).sum())
    nats, seen = np.array(nats), np.array(seen)
    assert (row["tokens"], row["bytes"]) == (len(nats), num_bytes)
    assert row["nats"] == pytest.approx(nats.mean(), rel=1e-5)
    assert row["ppl"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / num_bytes, rel=1e-5)
    for part in row["by_context"]:
        inside = (seen >= part["from"]) & (seen <= part["to"])
        assert part["tokens"] == inside.sum()
        assert part["nats"] == pytest.approx(nats[inside].mean(), rel=1e-5)
    assert sum(part["tokens"] for part in row["by_context"]) == len(nats)


def test_agreement_with_itself_is_perfect(teacher, text):
    row = agreement(teacher, replace(teacher, name="twin"), text, chunk=64)
    assert row["model"] == "twin" and row["top1"] == 1
    assert row["kl"] == pytest.approx(0, abs=1e-7)


def test_agreement_against_float64(teacher, student, text):
    row = agreement(teacher, student, text, chunk=24)
    kl, same = [], []
    for batch in text.batches:
        scored = np.asarray(next_tokens(jax.tree.map(jnp.asarray, batch))[1]) > 0
        p, q = (log_probabilities(m, batch)[scored] for m in (teacher, student))
        kl += list((np.exp(p) * (p - q)).sum(axis=-1))
        same += list(p.argmax(axis=-1) == q.argmax(axis=-1))
    assert row["tokens"] == len(kl)
    assert row["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert row["top1"] == pytest.approx(np.mean(same))


def test_vocabularies_must_match_for_agreement(teacher, text):
    class Other:
        name, cfg = "other", replace(CFG, vocab_size=300)

    with pytest.raises(UserError, match=r"300.*272"):
        agreement(teacher, Other(), text, chunk=64)


@pytest.mark.parametrize("chunk", [1, 10, 12, 1000])
def test_chunks_do_not_matter(chunk):
    x = jnp.arange(2 * 7 * 3, dtype=jnp.float32).reshape(2, 7, 3)
    total, first = over_chunks(lambda x: (x.sum(-1), x[..., 0] > 5), (x,), chunk)
    np.testing.assert_array_equal(total, x.sum(-1))
    np.testing.assert_array_equal(first, x[..., 0] > 5)


def test_zeroed_la_heads_say_nothing(student, teacher, text):
    cut = zero_la(student)
    assert cut.name == "tiny/distill (LA zeroed)"
    whole, without = (perplexity(m, text, chunk=64)["nats"] for m in (student, cut))
    assert whole != pytest.approx(without, rel=1e-4)
    for path, value in student.params.items():
        if not path.endswith("w_o"):
            np.testing.assert_array_equal(cut.params[path], value)
    w_o, whole_w_o = (m.params["layers.0.attn.w_o"] for m in (cut, student))
    np.testing.assert_array_equal(w_o[1], 0)
    kept = np.array([0, 2, 3])
    np.testing.assert_array_equal(w_o[kept], whole_w_o[kept])
    for path, value in zero_la(teacher).params.items():
        np.testing.assert_array_equal(value, teacher.params[path])


def test_evaluate_and_report(teacher, student, data, tmp_path, capsys):
    cfg = RunConfig(data=data, eval=EVAL)
    first, results = evaluate(iter([teacher, student]), cfg, TOKENIZER, say=lambda line: None)
    # A run cut at the student has written the teacher.
    assert {r["model"] for r in first["rows"]} == {"teacher"}
    assert first["rows"] == results["rows"][: len(first["rows"])]
    models = ["teacher", "tiny/distill", "tiny/distill (LA zeroed)"]
    assert list(dict.fromkeys(r["model"] for r in results["rows"])) == models
    for name in models:
        assert 0 <= results["summary"][f"{name}/recall@{LENGTH}"] <= 1
        assert results["summary"][f"{name}/bits_per_byte@{LENGTH}"] > 0
    assert results["summary"]["tiny/distill/kl"] > 0
    assert "teacher/kl" not in results["summary"]
    beyond = {r["model"]: r["beyond_context"] for r in results["rows"] if "task" in r}
    assert list(beyond.values()) == [False, True, True]

    written = report.write(tmp_path / "out", {"meta": {}, **results})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in written)
    assert [p.name for p in written] == [
        "eval.json",
        "needle_recall_teacher.png",
        "needle_recall_tiny_distill.png",
        "needle_recall_tiny_distill_LA_zeroed.png",
        "perplexity.png",
    ]
    report.show(results["rows"])
    assert "recall @ 32 (N = 6)" in capsys.readouterr().out


def test_names_of_models(tmp_path):
    folder = tmp_path / "lr=1" / "distill"
    folder.mkdir(parents=True)
    cfg = RunConfig(teacher="t", eval=EvalConfig(runs=("mine=a/b", "runs/tiny/align", str(folder))))
    assert list(folders(cfg)) == ["teacher", "mine", "tiny/align", "lr=1/distill"]
    with pytest.raises(UserError, match="'tiny/align'"):
        folders(replace(cfg, eval=EvalConfig(runs=("tiny/align", "runs/tiny/align"))))
    with pytest.raises(UserError, match="Nothing to measure"):
        folders(RunConfig())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(tasks=("needle_9",)), "needle_9"),
        (dict(prompts=0), "prompts"),
        (dict(ppl_tokens=0), "ppl_tokens"),
    ],
)
def test_impossible_settings_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        run(RunConfig(out="x", teacher="none", eval=EvalConfig(**bad)))


def write_run(folder, subject):
    model = bind(subject.graphdef, subject.params)
    lineage = make_lineage(["test"], None)
    write_config(folder, model=model.cfg, hydra=model.hydra, plan=model.plan, lineage=lineage)
    save_tokenizer(TOKENIZER, folder)
    store = CheckpointStore(folder)
    store.save(1, params=subject.params)
    store.wait()
    store.close()
    return str(folder)


def test_command(teacher, student, data, tmp_path):
    cfg = RunConfig(
        teacher=write_run(tmp_path / "teacher", teacher),
        out=str(tmp_path / "eval"),
        data=data,
        eval=replace(EVAL, runs=(write_run(tmp_path / "tiny" / "distill", student),)),
    )
    cfg = replace(cfg, train=replace(cfg.train, compute_dtype="float32"))
    (tmp_path / "plain.json").write_text(json.dumps(to_plain(cfg)))
    (tmp_path / "eval.py").write_text(
        "import json, pathlib\n"
        "from hydrajax.config import RunConfig, from_plain, to_config_dict\n"
        "plain = json.loads(pathlib.Path(__file__).with_name('plain.json').read_text())\n"
        "def get_config():\n"
        "    return to_config_dict(from_plain(RunConfig, plain, 'config'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "hydrajax.evals", f"--config={tmp_path / 'eval.py'}",
         "--config.eval.prompts=1", "--config.eval.zero_la=False"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny/distill" in done.stdout
    found = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert {"command", "commit", "versions", "date", "device", "seeds"} <= set(found["meta"])
    assert {r["n"] for r in found["rows"] if r["metric"] == "recall"} == {1, 3}
    assert "tiny/distill/top1" in found["summary"]
    assert len(list((tmp_path / "eval").glob("*.png"))) == 3
