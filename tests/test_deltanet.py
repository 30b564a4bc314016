"""GDN heads: unit keys under every rope, and gates as good as their fp32 weights."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from hydrajax.deltanet import L2_EPS, LinearHeads, wide_product
from hydrajax.layers import Sequence, apply_rope, rms_norm, rope_tables
from hydrajax.model_config import RopeConfig
from tests.kernels import h100

B, T, N, H, D = 2, 5, 3, 16, 64
RNG = np.random.default_rng(0)
YARN = RopeConfig(kind="yarn", theta=1e4, factor=32.0, original_context=64)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rope", [RopeConfig(theta=1e4), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("dims", [0, H])
def test_one_pass_equals_norm_rotation_and_division_by_the_length(rope, dims, normed):
    x = jnp.float32(RNG.standard_normal((B, T, N, H)))
    scale = jnp.float32(RNG.uniform(0.5, 2, H)) if normed else None
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    seq = Sequence(positions, None, *rope_tables(rope, H, positions))
    heads = SimpleNamespace(eps=1e-6, rope_dims=dims)

    def one_pass(x):
        return LinearHeads._unit(heads, x, scale, seq)

    def step_by_step(x):
        y = apply_rope(rms_norm(x, scale, 1e-6) if normed else x, seq, dims)
        return y / jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) + L2_EPS)

    got, pull = jax.vjp(one_pass, x)
    want, pull_want = jax.vjp(step_by_step, x)
    assert_close("unit", want, got, 1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1.0, atol=1e-5)
    dy = jnp.float32(RNG.standard_normal(x.shape))
    assert_close("gradient", pull_want(dy)[0], pull(dy)[0], 1e-4)
    assert np.isfinite(jax.vjp(one_pass, jnp.zeros_like(x))[1](dy)[0]).all()


def draw(dtype):
    x, w, dy = (RNG.standard_normal(s) for s in ((B, T, D), (D, 2, N), (B, T, 2, N)))
    return jnp.asarray(x, dtype), jnp.float32(w), jnp.float32(dy)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gates_have_their_weights_to_16_bits(dtype):
    x, w, dy = draw(dtype)
    y, pull = jax.vjp(wide_product, x, w)
    dx, dw = pull(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, x.dtype, jnp.float32)
    exact, w64 = np.float64(x), np.float64(w)
    assert_close("y", np.einsum("btd,dnr->btnr", exact, w64), y, 3e-5)
    assert_close("dw", np.einsum("btd,btnr->dnr", exact, dy), dw, 3e-5)
    assert_close("dx", np.einsum("btnr,dnr->btd", dy, w64), np.float64(dx), 1e-2)


def test_gates_are_fp32_where_all_weights_are_narrow():
    x, w, _ = draw("bfloat16")
    assert wide_product(x, w.astype(x.dtype)).dtype == jnp.float32


@pytest.mark.aot_gpu
def test_the_rest_of_a_weight_is_there_when_compiled_for_a_gpu():
    def both(x, w, dy):
        y, pull = jax.vjp(wide_product, x, w)
        return y, pull(dy)

    text = h100.compiled(both, draw("bfloat16")).as_text()
    assert "reduce-precision(" in text and "subtract(" in text
    assert not re.search(r"subtract\((%\S+), \1\)", text)
