"""Projections: biases are added in fp32, and no compiled matmul adds a matrix of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from hydrajax.layers import project
from tests.kernels import h100

B, T, D, N, H = 2, 64, 32, 3, 16
RNG = np.random.default_rng(0)


def draw(tokens=T):
    shapes = (B, tokens, D), (D, N, H), (N, H), (B, tokens, N, H)
    x, w, b, dy = (jnp.float32(RNG.standard_normal(s)) for s in shapes)
    return x.astype(jnp.bfloat16), w, b, dy.astype(jnp.bfloat16)


def with_gradients(x, w, b, dy):
    y, pull = jax.vjp(lambda *a: project("btd,dnh->btnh", *a), x, w, b)
    return y, *pull(dy)


def test_a_bias_is_rounded_with_the_sum_alone_and_its_gradient_is_in_fp32():
    x, w, b, dy = draw()
    y, _, dw, db = with_gradients(x, w, b, dy)
    plain = project("btd,dnh->btnh", x, w)
    np.testing.assert_array_equal(y, (np.float32(plain) + np.asarray(b)).astype(plain.dtype))
    assert y.dtype == x.dtype and dw.dtype == db.dtype == jnp.float32
    assert_close("db", np.float64(dy).sum((0, 1)), db, 1e-6)


def test_weights_and_biases_in_the_compute_dtype_keep_it():
    x, w, b, _ = draw()
    assert project("btd,dnh->btnh", x, w.astype(x.dtype), b.astype(x.dtype)).dtype == x.dtype


@pytest.mark.aot_gpu
def test_no_matmul_adds_a_bias_as_a_matrix():
    def gated(x, w, b, o):
        return jax.nn.sigmoid(project("btd,dnh->btnh", x, w, b)) * o

    cublas = {"xla_gpu_enable_triton_gemm": False}
    text = h100.compiled(gated, draw(4096), compiler_options=cublas).as_text()
    assert "__cublas$lt$matmul" in text and '"beta":1' not in text
