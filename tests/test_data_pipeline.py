"""Batches: nothing lost, order fixed by the seed, exact resume, any number of processes."""

import collections
import json
from dataclasses import replace

import numpy as np
import pytest

from hydrajax.config import DataConfig
from hydrajax.data import eval_rows, make_pipeline
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError

TOKENIZER = load_tokenizer("bytes")
EOS, PAD = TOKENIZER.eos_ids[0], TOKENIZER.pad_id
LENGTHS = (3, 700, 31, 64, 63, 1, 128, 17, 5, 90, 40, 40, 2, 65, 200)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents whose text tells which one it is: "3.3.3.3."."""
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text("\x1e".join((f"{i}." * n)[: n + 3] for i, n in enumerate(LENGTHS)))
    return str(path)


def documents_of(path):
    with open(path) as f:
        return f.read().split("\x1e")


def config(corpus, **changes):
    return replace(DataConfig(files=(corpus,), seq_len=64, rows=4, holdout=0.0), **changes)


MIXES = {
    "split": {},
    "best_fit": {"packing": "best_fit"},
    "mixed": {"synthetic": "recall", "synthetic_share": 0.3},
    "mixed best_fit": {"packing": "best_fit", "synthetic": "recall", "synthetic_share": 0.5},
    "recall": {"files": (), "synthetic": "recall", "answer_only": True},
}


def take(pipeline, count):
    return [next(pipeline) for _ in range(count)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[k], y[k]) for k in x)


def segments(rows):
    """Yield the ids of each segment, checking what every row must fulfil."""
    for i in range(len(rows["tokens"])):
        tokens, ids, positions, mask = (
            rows[k][i] for k in ("tokens", "segment_ids", "positions", "loss_mask")
        )
        used = ids > 0
        assert np.all(used[:-1] >= used[1:]), "padding comes last"
        assert np.all(tokens[~used] == PAD) and np.all(mask[~used] == 0)
        for s in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == s)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)), "segments are contiguous"
            assert np.array_equal(positions[at], np.arange(len(at))), "positions restart"
            assert np.array_equal(mask[at], np.arange(len(at)) > 0), "no loss across borders"
            yield tokens[at]


def texts_of(stream):
    """Cut a stream of ids at its end tokens; what comes after the last one is left out."""
    pieces = np.split(stream, np.flatnonzero(stream == EOS) + 1)[:-1]
    return [TOKENIZER.decode(p) for p in pieces]


def test_an_epoch_loses_and_repeats_nothing(corpus):
    cfg = config(corpus, holdout=0.3)
    texts = collections.Counter(documents_of(corpus))
    ids = np.concatenate([s for b in eval_rows(cfg, TOKENIZER, 999) for s in segments(b)])
    held = collections.Counter(texts_of(ids))
    assert ids[-1] == EOS and held and not held - texts
    train = np.concatenate(
        [s for b in take(make_pipeline(cfg, TOKENIZER), 20) for s in segments(b)]
    )
    epoch = texts_of(train)[: sum((texts - held).values())]
    assert collections.Counter(epoch) == texts - held


def test_best_fit_keeps_documents_whole_and_drops_nothing(corpus):
    cfg = config(corpus, packing="best_fit", holdout=1 - 1e-9)  # all documents but one
    rows = eval_rows(cfg, TOKENIZER, 999)
    found = collections.Counter(tuple(s) for b in rows for s in segments(b))
    want = collections.Counter()
    for text in documents_of(corpus):
        ids = (*TOKENIZER.encode(text), EOS)
        want.update(ids[i : i + 64] for i in range(0, len(ids), 64))
    missing = (want - found).elements()
    assert not found - want and len({TOKENIZER.decode(m)[:3] for m in missing}) == 1
    assert np.mean([b["segment_ids"] == 0 for b in rows]) < 0.35


def test_split_rows_are_full(corpus):
    for batch in take(make_pipeline(config(corpus), TOKENIZER), 10):
        assert batch["segment_ids"].min() == 1
        list(segments(batch))


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_seed_decides_the_order(corpus, mix):
    cfg = config(corpus, **mix)
    a, b, c = (take(make_pipeline(x, TOKENIZER), 6) for x in (cfg, cfg, replace(cfg, seed=1)))
    assert_same(a, b)
    assert not np.array_equal(a[0]["tokens"], c[0]["tokens"])
    assert not np.array_equal(a[0]["tokens"], a[1]["tokens"])


def test_epochs_are_shuffled_differently(corpus):
    stream = np.concatenate(
        [s for b in take(make_pipeline(config(corpus), TOKENIZER), 20) for s in segments(b)]
    )
    texts = texts_of(stream)
    first, second = texts[: len(LENGTHS)], texts[len(LENGTHS) : 2 * len(LENGTHS)]
    assert sorted(first) == sorted(second) == sorted(documents_of(corpus))
    assert first != second != documents_of(corpus)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_resume_is_exact(corpus, mix):
    cfg = config(corpus, **mix)
    pipeline = make_pipeline(cfg, TOKENIZER)
    states, batches = [], []
    for _ in range(28):  # several epochs; best_fit fills its bins twice
        states.append(json.dumps(pipeline.get_state()))
        batches += take(pipeline, 1)
    for at in (0, 1, 7, 15, 22):
        again = make_pipeline(cfg, TOKENIZER)
        take(again, at % 3)
        again.set_state(json.loads(states[at]))
        assert_same(take(again, 5), batches[at : at + 5])


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_global_batch_does_not_depend_on_processes(corpus, mix):
    cfg = config(corpus, **mix)
    whole = take(make_pipeline(cfg, TOKENIZER), 4)
    parts = [
        take(make_pipeline(cfg, TOKENIZER, process_index=i, process_count=2), 4) for i in range(2)
    ]
    assert_same(
        whole,
        [
            {k: np.concatenate([p[k] for p in step]) for k in step[0]}
            for step in zip(*parts, strict=True)
        ],
    )


def test_worker_processes_change_nothing(corpus):
    cfg = config(corpus, holdout=0.2)
    alone, workers = (make_pipeline(replace(cfg, workers=n), TOKENIZER) for n in (0, 2))
    assert_same(take(alone, 8), take(workers, 8))
    state = json.loads(json.dumps(workers.get_state()))
    want = take(workers, 2)
    workers.set_state(state)
    assert_same(want, take(workers, 2))
    workers.close()


def test_share_of_synthetic_rows(corpus):
    cfg = config(corpus, synthetic="recall", synthetic_share=0.25)
    rows = np.concatenate([b["tokens"] for b in take(make_pipeline(cfg, TOKENIZER), 25)])
    assert np.mean([ord("|") in row for row in rows]) == 0.25


def test_answer_only_limits_the_loss_of_synthetic_rows(corpus):
    cfg = config(corpus, synthetic="recall", synthetic_share=0.5, answer_only=True)
    everywhere = make_pipeline(replace(cfg, answer_only=False), TOKENIZER)
    for some, full in zip(take(make_pipeline(cfg, TOKENIZER), 3), take(everywhere, 3), strict=True):
        assert np.array_equal(some["tokens"], full["tokens"])
        for i, row in enumerate(some["tokens"]):
            fewer = full["loss_mask"][i] - some["loss_mask"][i]
            assert fewer.min() == 0 and fewer.max() == (ord("|") in row)


def test_synthetic_rows_are_padded():
    cfg = DataConfig(synthetic="kv_list", seq_len=1000, rows=2)
    for batch in take(make_pipeline(cfg, TOKENIZER), 2):
        assert [s[-1] for s in segments(batch)] == [EOS, EOS]


def test_splits_share_no_document(corpus):
    cfg = config(corpus, holdout=0.4)
    texts = []
    for split in ("train", "holdout"):
        stream = np.concatenate(
            [s for b in take(make_pipeline(cfg, TOKENIZER, split=split), 16) for s in segments(b)]
        )
        texts.append(set(texts_of(stream)))
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == set(documents_of(corpus))


def test_few_documents_still_give_a_holdout(corpus):
    cfg = config(corpus, holdout=1e-6)
    assert len(eval_rows(cfg, TOKENIZER, 100)) >= 1
    with pytest.raises(UserError, match="no document is held out"):
        eval_rows(config(corpus), TOKENIZER, 1)


def test_eval_rows_are_fixed_and_padded(corpus):
    cfg = config(corpus, holdout=0.5, synthetic="recall", synthetic_share=0.2)
    a, b = (eval_rows(cfg, TOKENIZER, 6) for _ in range(2))
    assert_same(a, b)
    assert [x["tokens"].shape for x in a] == [(4, 64), (4, 64)]
    assert np.all(a[1]["loss_mask"][2:] == 0) and np.all(a[1]["segment_ids"][2:] == 0)
    halves = [eval_rows(cfg, TOKENIZER, 6, process_index=i, process_count=2) for i in (0, 1)]
    assert_same(
        a, [{k: np.concatenate([x[k], y[k]]) for k in x} for x, y in zip(*halves, strict=True)]
    )
    (wide,) = eval_rows(cfg, TOKENIZER, 6, multiple=16)  # devices that share the rows of a batch
    assert len(wide["tokens"]) == 16 and not wide["segment_ids"][6:].any()
    train = take(make_pipeline(replace(cfg, files=(), synthetic_share=1.0), TOKENIZER), 1)[0]
    held = eval_rows(replace(cfg, files=(), synthetic_share=1.0), TOKENIZER, 4)[0]
    assert not np.array_equal(train["tokens"], held["tokens"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq_len": 32}, r"data\.seq_len was 64, is 32"),
        ({"seed": 3}, r"data\.seed"),
        ({"packing": "best_fit"}, r"data\.packing"),
        ({"holdout": 0.1}, r"data\.holdout"),
    ],
)
def test_resume_with_other_settings_is_refused(corpus, change, named):
    state = make_pipeline(config(corpus), TOKENIZER).get_state()
    with pytest.raises(UserError, match=named):
        make_pipeline(config(corpus, **change), TOKENIZER).set_state(state)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_two_processes_go_on_where_one_stopped(corpus, mix):
    cfg = config(corpus, **mix)
    one = make_pipeline(cfg, TOKENIZER)
    take(one, 3)
    state, want = one.get_state(), take(one, 2)
    for index, half in enumerate((slice(0, 2), slice(2, 4))):
        other = make_pipeline(cfg, TOKENIZER, process_index=index, process_count=2)
        other.set_state(state)
        mine = [{name: rows[half] for name, rows in batch.items()} for batch in want]
        assert_same(take(other, 2), mine)
