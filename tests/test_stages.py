"""Stages and the train step: what each moves, accumulation, bad gradients, packing, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import CFG, CFG2, PLAN2, batch, compiled, programs, run_config, teacher

from hydrajax.config import HydraConfig
from hydrajax.model import bind
from hydrajax.stages import STAGES
from hydrajax.trainer import TrainState, make_eval_step, means

# A clip norm out of reach where updates of single layers are compared.
ALIGN = run_config("align", dict(clip_norm=1e9))
DISTILL = run_config("distill", ce_weight=0.5)


@functools.cache
def evaluation(stage: str):
    """Held-out loss as a function of rows, and nothing else."""
    made, state = programs(run_config(stage, ce_weight=0.5))
    run = jax.jit(make_eval_step(made))
    return lambda rows: run(state.params, teacher()[1], rows)


@pytest.mark.parametrize(
    "cfg, shape, parts",
    [
        (ALIGN, (CFG2, PLAN2), (".attn.",)),
        (run_config("align", align_scope="la_only"), (), (".attn.la.", ".attn.fusion.")),
        (DISTILL, (), ("",)),
        (run_config("extend"), (), ("",)),
    ],
    ids=["align", "align_la_only", "distill", "extend"],
)
def test_a_stage_moves_exactly_what_it_trains(cfg, shape, parts):
    made, state, step = compiled(cfg, *shape)
    after, metrics = step(state, teacher(*shape[:1])[1], batch())
    want = {path for path in state.params if any(part in path for part in parts)}
    moved = {p for p in state.params if not np.array_equal(state.params[p], after.params[p])}
    assert moved == want == set(made.trainable(state.params))
    assert int(after.step) == 1
    values = means([metrics])
    assert np.isfinite(list(values.values())).all()
    assert values["nonfinite"] == 0 and values["loss"] > 0


def test_accumulation_changes_no_update():
    """Losses are sums over counts: uneven micro-batches weigh their tokens, not their rows."""
    _, state, step = compiled(DISTILL)
    whole, expected = step(state, teacher()[1], batch())
    _, _, accumulate = compiled(run_config("distill", ce_weight=0.5, accum=4))
    pieces, metrics = accumulate(state, teacher()[1], batch())
    for path in state.params:
        np.testing.assert_allclose(pieces.params[path], whole.params[path], atol=2e-5, err_msg=path)
    want, got = means([expected]), means([metrics])
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4), name


@pytest.mark.parametrize("accum", [1, 4])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(accum):
    _, state, first = compiled(DISTILL)
    state, _ = first(state, teacher()[1], batch())  # moments away from zero
    _, _, step = compiled(run_config("distill", ce_weight=0.5, accum=accum))
    bad = batch() | {
        "loss_mask": batch()["loss_mask"].at[2, 5].set(jnp.nan)
    }  # one token of one row
    after, metrics = step(state, teacher()[1], bad)
    before = jax.tree.leaves((state.params, state.opt_state))
    for old, new in zip(before, jax.tree.leaves((after.params, after.opt_state)), strict=True):
        np.testing.assert_array_equal(new, old)
    assert int(after.step) == 2
    assert means([metrics, metrics])["nonfinite"] == 2


def test_a_loss_that_is_not_finite_is_one_too_where_its_gradient_is():
    """A word without an embedding: no gradient tells of it."""
    _, state, step = compiled(DISTILL)
    bad = batch() | {"tokens": batch()["tokens"].at[1, 3].set(CFG.vocab_size)}
    after, metrics = step(state, teacher()[1], bad)
    found = means([metrics])
    assert np.isnan(found["loss"]) and np.isfinite(found["grad_norm"])
    assert found["nonfinite"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_a_packed_row_costs_what_its_documents_cost_alone():
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, CFG.vocab_size, n) for n in (7, 9)]
    packed, apart = batch(), batch()
    packed["tokens"] = packed["tokens"].at[0].set(np.concatenate(documents))
    packed["segment_ids"] = jnp.zeros((4, 16), int).at[0].set(np.repeat([1, 2], (7, 9)))
    packed["positions"] = packed["positions"].at[0].set([*range(7), *range(9)])
    apart["segment_ids"] = jnp.zeros((4, 16), int)
    apart["positions"] = jnp.broadcast_to(jnp.arange(16), (4, 16))
    for row, text in enumerate(documents):
        apart["tokens"] = apart["tokens"].at[row, : len(text)].set(text)
        apart["segment_ids"] = apart["segment_ids"].at[row, : len(text)].set(1)
    one, two = evaluation("distill")(packed), evaluation("distill")(apart)
    for name in ("loss", "kl", "ce"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)
    assert float(one["loss"][1]) == 14  # every token but the first of each document is a target


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_the_content_of_padding_changes_no_loss(stage):
    rows = batch()
    other = jnp.where(rows["segment_ids"] > 0, rows["tokens"], 5)
    assert (other != rows["tokens"]).any()
    want, got = evaluation(stage)(rows), evaluation(stage)(rows | {"tokens": other})
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_align_of_the_teacher_to_itself_is_perfect():
    graph, params = teacher()
    cfg, rows = run_config("align").train, batch()
    loss = lambda p: STAGES["align"].loss(bind(graph, p), bind(graph, p), rows, cfg)[2]  # noqa: E731
    values = means([jax.jit(loss)(params)])
    assert values["loss"] == pytest.approx(0, abs=1e-10)
    assert values["align/layer_00/cosine"] == pytest.approx(1, abs=1e-6)


def test_in_align_no_layer_feels_the_others():
    """Blocks read the teacher's inputs, so no error travels from layer to layer."""
    _, state, step = compiled(ALIGN, CFG2, PLAN2)
    other = {p: v + 0.1 if p.startswith("layers.0.") else v for p, v in state.params.items()}
    a, _ = step(state, teacher(CFG2)[1], batch())
    b, _ = step(TrainState(state.step, other, state.opt_state), teacher(CFG2)[1], batch())
    for path in state.params:
        if path.startswith("layers.1."):
            np.testing.assert_array_equal(a.params[path], b.params[path], err_msg=path)


@pytest.mark.parametrize(
    "cfg, shape", [(ALIGN, (CFG2, PLAN2)), (DISTILL, ())], ids=["align", "distill"]
)
def test_a_few_steps_lower_the_loss(cfg, shape):
    _, state, step = compiled(cfg, *shape)
    losses = []
    for _ in range(10):
        state, metrics = step(state, teacher(*shape[:1])[1], batch())
        losses.append(means([metrics])["loss"])
    assert losses[-1] < 0.8 * losses[0], losses


def test_pretrain_trains_everything_and_nope_from_distill_keeps_rope_for_align_alone():
    assert all(STAGES["pretrain"].trains(path, DISTILL.train) for path in teacher()[1])
    hydra = HydraConfig(nope_from="distill")
    assert hydra.for_stage("align").fa_pos == "rope"
    assert hydra.for_stage("distill") == hydra


def test_the_teacher_is_loaded_only_where_a_loss_reads_it():
    needs = {name: stage.needs_teacher for name, stage in STAGES.items()}
    plain, mixed = run_config("extend").train, run_config("extend", kl_weight=0.1).train
    assert needs["align"](plain) and needs["distill"](plain)
    assert not needs["pretrain"](plain) and not needs["extend"](plain)
    assert needs["extend"](mixed)
