"""Stages and the train step: what each moves, accumulation, bad gradients, packing, padding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import CFG, PLAN, batch, draw, one_step, programs, run_config, teacher, with_train

from hydrajax.config import HydraConfig
from hydrajax.model import bind
from hydrajax.stages import STAGES
from hydrajax.trainer import make_eval_step, make_train_step, means

ATTENTION = {"attn"}
HYBRID = {"attn.la", "attn.fusion"}


def moved(before: dict, after: dict) -> set[str]:
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize(
    "stage, train, parts",
    [
        ("align", {}, (".attn.",)),
        ("align", dict(align_scope="la_only", align_loss="rel_mse"), (".attn.la.", ".attn.fusion.")),
        ("distill", dict(ce_weight=0.1), ("",)),
        ("extend", {}, ("",)),
        ("pretrain", {}, ("",)),
    ],
    ids=["align", "align_la_only", "distill", "extend", "pretrain"],
)
def test_a_stage_moves_exactly_what_it_trains(stage, train, parts):
    made, state = programs(run_config(stage, train=train))
    after, metrics = one_step(made, state, batch())
    want = {path for path in state.params if any(part in path for part in parts)}
    assert moved(state.params, after.params) == want
    assert set(made.trainable(state.params)) == want
    assert int(after.step) == 1
    values = means([metrics])
    assert all(np.isfinite(list(values.values())))
    assert values["nonfinite"] == 0 and values["loss"] > 0


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_accumulation_changes_no_update(stage):
    """Losses are sums over counts: uneven micro-batches weigh their tokens, not their rows."""
    made, state = programs(run_config(stage))
    rows = batch()
    whole, expected = one_step(made, state, rows)
    pieces, metrics = one_step(replace(made, run=with_train(made.run, accum=4)), state, rows)
    for path in state.params:
        np.testing.assert_allclose(pieces.params[path], whole.params[path], atol=2e-5, err_msg=path)
    want, got = means([expected]), means([metrics])
    # Relative errors of align are ratios of sums, which micro-batches merely add up.
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4), name


def test_rel_mse_is_a_ratio_of_each_micro_batch_and_stays_near_the_whole():
    made, state = programs(run_config("align", train=dict(align_loss="rel_mse")))
    _, whole = one_step(made, state, batch())
    _, pieces = one_step(replace(made, run=with_train(made.run, accum=2)), state, batch())
    assert means([pieces])["loss"] == pytest.approx(means([whole])["loss"], rel=0.2)


@pytest.mark.parametrize("accum", [1, 2])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(accum):
    made, state = programs(run_config("distill", train=dict(accum=accum)))
    state, _ = one_step(made, state, batch())  # moments away from zero
    broken = teacher()[1] | {"norm.scale": jnp.full(CFG.width, jnp.nan)}
    after, metrics = one_step(made, state, batch(), broken)
    before = jax.tree.leaves((state.params, state.opt_state))
    for old, new in zip(before, jax.tree.leaves((after.params, after.opt_state)), strict=True):
        np.testing.assert_array_equal(new, old)
    assert int(after.step) == 2
    assert means([metrics, metrics])["nonfinite"] == 2


def test_a_packed_row_costs_what_its_documents_cost_alone():
    """The sum of the distill loss, and with it every gradient, is one over documents."""
    made, state = programs(run_config("distill", train=dict(ce_weight=0.5)))
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, CFG.vocab_size, n, dtype=np.int32) for n in (7, 9)]
    packed = {
        "tokens": np.concatenate(documents)[None],
        "segment_ids": np.repeat([1, 2], (7, 9))[None].astype(np.int32),
        "positions": np.concatenate([np.arange(7), np.arange(9)])[None].astype(np.int32),
        "loss_mask": np.ones((1, 16), np.float32),
    }
    apart = {k: np.zeros((2, 16), v.dtype) for k, v in packed.items()}
    for row, text in enumerate(documents):
        apart["tokens"][row, : len(text)], apart["segment_ids"][row, : len(text)] = text, 1
        apart["positions"][row] = np.arange(16)
        apart["loss_mask"][row] = 1
    evaluate = jax.jit(make_eval_step(made))
    one, two = (evaluate(state.params, teacher()[1], rows) for rows in (packed, apart))
    for name in ("loss", "kl", "ce"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)
    assert float(one["loss"][1]) == 14  # every token but the first of each document is a target


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_the_content_of_padding_changes_no_loss(stage):
    made, state = programs(run_config(stage))
    evaluate = jax.jit(make_eval_step(made))
    rows = batch()
    other = np.where(rows["segment_ids"] > 0, rows["tokens"], 5).astype(np.int32)
    assert (other != rows["tokens"]).any()
    want = evaluate(state.params, teacher()[1], rows)
    got = evaluate(state.params, teacher()[1], rows | {"tokens": other})
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_align_of_the_teacher_to_itself_is_perfect():
    graph, params = teacher()
    rows = {k: jnp.asarray(v) for k, v in batch().items()}
    cfg = run_config("align").train
    loss = lambda p: STAGES["align"].loss(bind(graph, p), bind(graph, p), rows, cfg)[2]  # noqa: E731
    values = means([jax.jit(loss)(params)])
    assert values["loss"] == 0
    assert values["align/layer_01/cosine"] == pytest.approx(1, abs=1e-6)


def test_align_gradient_of_a_layer_ignores_the_other_layers():
    """Blocks read the teacher's inputs, so no error travels from layer to layer."""
    made, state = programs(run_config("align", clip_norm=1e9))
    noise = {p: v + 0.1 if p.startswith("layers.0.") else v for p, v in state.params.items()}
    a, _ = one_step(made, state, batch())
    b, _ = one_step(made, replace(state, params=noise), batch())
    for path in state.params:
        if path.startswith("layers.1."):
            np.testing.assert_array_equal(a.params[path], b.params[path], err_msg=path)


def test_a_few_steps_lower_every_loss():
    for stage in ("align", "distill"):
        made, state = programs(run_config(stage, peak_lr=3e-3, schedule="constant"))
        step, losses = jax.jit(make_train_step(made)), []
        rows = {k: jnp.asarray(v) for k, v in batch().items()}
        for _ in range(8):
            state, metrics = step(state, teacher()[1], rows)
            losses.append(means([metrics])["loss"])
        assert losses[-1] < 0.9 * losses[0], (stage, losses)


def test_nope_from_distill_keeps_rope_for_align_alone():
    hydra = HydraConfig(nope_from="distill")
    assert hydra.for_stage("align").fa_pos == "rope"
    assert hydra.for_stage("distill") == hydra
    assert draw(hydra, PLAN)[1].keys() == draw(hydra.for_stage("align"), PLAN)[1].keys()


def test_the_teacher_is_loaded_only_where_a_loss_reads_it():
    needs = {name: stage.needs_teacher for name, stage in STAGES.items()}
    plain, mixed = run_config("extend").train, run_config("extend", train=dict(kl_weight=0.1)).train
    assert needs["align"](plain) and needs["distill"](plain)
    assert not needs["pretrain"](plain) and not needs["extend"](plain)
    assert needs["extend"](mixed)
