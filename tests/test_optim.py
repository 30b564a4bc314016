"""Optimiser: schedule values, what decays, per-path rates, moments beside their parameters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import CFG, draw

from hydrajax.config import HydraConfig, OptimConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.optim import NO_DECAY, make_optimizer, schedule
from hydrajax.typing import UserError

CONSTANT = OptimConfig(peak_lr=0.1, schedule="constant", warmup_steps=0, clip_norm=1e9)


def updates(cfg: OptimConfig, params: dict, grads: dict, steps: int = 10) -> dict:
    """First update of fresh moments."""
    tx = make_optimizer(cfg, steps)
    return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)


def test_warm_up_then_cosine_to_the_end_rate():
    rate = schedule(OptimConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=10), steps=110)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(5e-3)
    assert float(rate(10)) == pytest.approx(1e-2)
    for step in (35, 60, 109):
        share = (1 + np.cos(np.pi * (step - 10) / 100)) / 2
        assert float(rate(step)) == pytest.approx(1e-4 + (1e-2 - 1e-4) * share, rel=1e-5)
    assert float(rate(110)) == pytest.approx(1e-4) == float(rate(500))


def test_constant_stays_and_warm_up_fits_into_short_runs():
    rate = schedule(replace(CONSTANT, warmup_steps=4), steps=100)
    assert float(rate(2)) == pytest.approx(0.05)
    assert float(rate(4)) == float(rate(99)) == pytest.approx(0.1)
    short = schedule(OptimConfig(peak_lr=1e-2, warmup_steps=50), steps=3)
    assert max(float(short(step)) for step in range(3)) == pytest.approx(1e-2)


def test_first_update_is_the_rate_times_the_gradients_sign():
    grads = {"a": jnp.array([3.0, -0.01, 0.0])}
    got = updates(CONSTANT, {"a": jnp.ones(3)}, grads)["a"]
    np.testing.assert_allclose(got, [-0.1, 0.1, 0.0], rtol=1e-5)


def test_gradients_are_clipped_by_the_norm_of_them_all():
    """eps far above the gradients makes Adam linear, so that the clip can be seen."""
    cfg = replace(CONSTANT, eps=1e6, clip_norm=1.0)
    grads = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    got = updates(cfg, jax.tree.map(jnp.zeros_like, grads), grads)
    np.testing.assert_allclose(got["a"], [-0.1 * 0.6 / 1e6, 0], rtol=1e-4)
    np.testing.assert_allclose(got["b"], [0, -0.1 * 0.8 / 1e6], rtol=1e-4)


def test_only_matrices_decay():
    cfg = replace(CFG, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True,
                  tied_embeddings=False)  # fmt: skip
    plan, paths = HeadPlan(((0, 3),), 4, 2), set()
    for flags in (
        dict(la_short_conv="random"),
        dict(fusion="layer_norm_adapter", norm_weight="per_head", qkv_split=False, la_kv="gqa"),
        dict(fusion="gated_competition"),
    ):
        paths |= set(draw(HydraConfig(**flags), plan, cfg)[1])
    decaying = {path.replace("layers.0.", "") for path in paths if not NO_DECAY.search(path)}
    assert decaying == {
        "embed.w", "unembed.w", "mlp.w_gate", "mlp.w_up", "mlp.w_down", "attn.w_o",
        "attn.fa.w_q", "attn.fa.w_k", "attn.fa.w_v", "attn.fa.w_z", "attn.la.w_q", "attn.la.w_k",
        "attn.la.w_v", "attn.la.w_z", "attn.la.w_a", "attn.la.w_b", "attn.kv.w_k", "attn.kv.w_v",
        "attn.fusion.w_c",
    }  # fmt: skip


def test_decay_is_part_of_the_update():
    params = {"mlp.w_up": jnp.full(2, 5.0), "la.a_log": jnp.full(2, 5.0)}
    got = updates(replace(CONSTANT, weight_decay=0.1), params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(got["mlp.w_up"], -0.1 * 0.1 * 5)
    np.testing.assert_array_equal(got["la.a_log"], 0)


def test_the_first_group_that_is_found_scales_a_path():
    params = {path: jnp.ones(2) for path in ("layers.0.la.w_q", "layers.0.la.a_log", "embed.w")}
    groups = (r"a_log$=10", r"\.la\.=0.5", r"=ignored$|^embed=0")
    got = updates(replace(CONSTANT, lr_groups=groups), params, params)
    assert float(got["layers.0.la.a_log"][0]) == pytest.approx(-1.0, rel=1e-5)
    assert float(got["layers.0.la.w_q"][0]) == pytest.approx(-0.05, rel=1e-5)
    assert float(got["embed.w"][0]) == 0


@pytest.mark.parametrize("group", ["la=fast", "[=2", "la="])
def test_groups_that_make_no_sense_are_named(group):
    with pytest.raises(UserError, match="lr_groups entry"):
        make_optimizer(replace(CONSTANT, lr_groups=(group,)), 10)
    with pytest.raises(UserError, match="not of the form regex=multiplier"):
        OptimConfig(lr_groups=("la",))


def test_moments_are_kept_for_trained_parameters_alone_and_in_fp32():
    tx = make_optimizer(CONSTANT, 10)
    state = tx.init({"a": jnp.ones(3)})
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert [leaf.shape for leaf in arrays] == [(3,), (3,)]
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype("float32")}
