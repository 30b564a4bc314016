"""Probes: pairs differ in the answer alone, are read where it is predicted, and are judged."""

import numpy as np
import pytest
from helpers import assert_close

from hydrajax.config import SelectConfig
from hydrajax.selection.probes import CANDIDATES, batches, collect, make_batch, make_pair
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError

TASKS = {"recall": 48, "needle_single_1": 512, "needle_single_2": 768, "needle_single_3": 768,
         "needle_multikey_1": 1024, "kv_list": 768}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


@pytest.mark.parametrize("prefix", ["clean", "own"])
@pytest.mark.parametrize("task", TASKS)
def test_pairs(task, prefix, tokenizer):
    cfg = SelectConfig(context=TASKS[task], answer_prefix=prefix)
    pair = make_pair(task, cfg, tokenizer, np.random.default_rng(0))
    span = len(pair.answer)
    assert len(pair.clean) == len(pair.corrupt) < cfg.context
    assert len(pair.distractor) == span and pair.distractor != pair.answer
    prompts = [ids[: len(pair.clean) - span + 1] for ids in (pair.clean, pair.corrupt)]
    clean, corrupt = (tokenizer.decode(ids) for ids in prompts)
    answer, distractor = tokenizer.decode(pair.answer), tokenizer.decode(pair.distractor)
    assert clean.count(answer) == 1 and clean.replace(answer, distractor) == corrupt
    forced = [pair.answer, pair.answer if prefix == "clean" else pair.distractor]
    tails = [ids[len(prompts[0]) :] for ids in (pair.clean, pair.corrupt)]
    assert tails == [ids[:-1] for ids in forced]


def test_batches_read_where_the_answer_is_predicted(tokenizer):
    cfg = SelectConfig(context=600, rows=4)
    rng = np.random.default_rng(0)
    pairs = [make_pair(t, cfg, tokenizer, rng) for t in ("needle_single_2", "needle_single_3")]
    parts = batches(pairs * 3, cfg)
    assert [rows for _, rows in parts] == [4, 2]
    for (batch, rows), part in zip(parts, (pairs * 2, pairs), strict=True):
        assert batch.clean.shape == (4, 600) and batch.at.shape == batch.weight.shape
        assert_close("weights", np.ones(4), batch.weight.sum(1), 1e-6)
        for b, pair in enumerate(part[:rows]):
            length, span = len(pair.clean), len(pair.answer)
            row = np.append(batch.clean[b, :length], pair.answer[-1])
            assert row[batch.at[b, :span] + 1].tolist() == list(pair.answer)
            assert batch.segment_ids[b].sum() == length == batch.segment_ids[b].argmin()
            ratio = batch.weight[b, 1:span] / batch.weight[b, : span - 1]
            assert_close("decay", np.full(span - 1, 0.9), ratio, 1e-6)
            assert not batch.weight[b, span:].any()


def test_a_single_token_answer_has_one_readout(tokenizer):
    cfg = SelectConfig(context=48, rows=2)
    batch = make_batch([make_pair("recall", cfg, tokenizer, np.random.default_rng(0))], cfg)
    assert batch.at.shape == (2, 1) and (batch.weight == 1).all()


def test_collect_counts_what_it_refuses(tokenizer):
    cfg = SelectConfig(context=48, pairs=6, rows=4)
    verdicts = iter([([1, 1, 0.1, 1], [1, 0, 1, 1]), ([np.nan, 1, 1, 1], [1, 1, 1, 0]),
                     ([1, 1, 1, 1], [1, 1, 1, 1])])  # fmt: skip
    probe = collect("recall", cfg, tokenizer, lambda batch: map(np.array, next(verdicts)))
    assert probe.counts() == {"accepted": 6, "wrong": 2, "small_gap": 2}
    assert len(set(probe.pairs)) == 6
    again = collect("recall", cfg, tokenizer, lambda batch: (np.ones(4), np.ones(4)))
    assert again.pairs[0] == probe.pairs[0]  # the seed alone decides what is drawn


@pytest.mark.parametrize("gap, right, reason", [(9, 0, "24 answered wrongly"), (0, 1, "24 with")])
def test_a_probe_the_teacher_fails_is_an_error(gap, right, reason, tokenizer):
    cfg = SelectConfig(context=48, pairs=6, rows=5)
    seen = []

    def judge(batch):
        seen.append(batch)
        return np.full(5, gap), np.full(5, right)

    with pytest.raises(UserError, match=f"recall left 0 of {6 * CANDIDATES}.*{reason}.*context=48"):
        collect("recall", cfg, tokenizer, judge)
    assert len(seen) == 5
