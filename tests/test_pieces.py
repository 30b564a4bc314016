"""MLPs in pieces: values and gradients of the whole on any mesh, and little kept meanwhile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close
from jax.extend.core import jaxprs_in_params
from tiny_runs import CFG, HYDRA, PLAN, draw

import hydrajax.model
from hydrajax.config import MeshConfig, ModelConfig
from hydrajax.layers import SwiGLU, in_pieces
from hydrajax.model import bind
from hydrajax.sharding import make_mesh

WIDE = ModelConfig(vocab_size=8, width=8, mlp_width=24, num_layers=1, num_heads=2, num_kv_heads=1,
                   head_dim=4)  # fmt: skip


def mlp(weights: nnx.State, x: jax.Array) -> jax.Array:
    return x + nnx.merge(GRAPH, weights)(x)


GRAPH, WEIGHTS = nnx.split(SwiGLU(WIDE, nnx.Rngs(0)))


def arrays(rows: int, tokens: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(rows, tokens, 8)), dtype) for _ in range(2))


def value_and_grads(fn, x, dout):
    def loss(weights, x):
        out = fn(weights, x)
        return jnp.sum((out * dout).astype(jnp.float32)), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, out), grads = run(WEIGHTS, x)
    return [out, *jax.tree.leaves(grads)]


def pieces(most: int):
    return lambda weights, x: in_pieces(mlp, weights, x, most)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1), (2, 1, 2, 2), (1, 2, 4, 1)],
    ids=["one", "rows, tokens and width", "fsdp and tokens"],
)
def test_pieces_give_the_whole_on_any_mesh(sizes):
    x, dout = arrays(2, 48)
    want = value_and_grads(mlp, x, dout)
    devices = jax.devices()[: int(np.prod(sizes))]
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), devices)):
        got = value_and_grads(pieces(6), x, dout)
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        assert_close(str(i), a, b, 1e-6)


def test_half_precision_gradients_of_weights_are_added_up_in_fp32():
    x, dout = arrays(1, 4096, jnp.bfloat16)
    exact = value_and_grads(mlp, x.astype(jnp.float32), dout.astype(jnp.float32))
    whole = value_and_grads(mlp, x, dout)
    split = value_and_grads(pieces(16), x, dout)
    for a, b, c in zip(exact[1:-1], whole[1:-1], split[1:-1], strict=True):
        error = lambda got, want=a: float(jnp.linalg.norm(got - want))  # noqa: E731
        assert error(c) <= 1.2 * error(b)


def shapes_of(fn, x) -> list[tuple[int, ...]]:
    """Of everything that a forward pass computes or keeps, in loops too."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            found.extend(v.aval.shape for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(fn)(x).jaxpr)
    return found


def test_no_inner_activation_is_larger_than_a_piece():
    x, dout = arrays(1, 64)

    def widest(fn):
        def grads(x):
            return jax.vjp(fn, WEIGHTS, x)[1](dout)

        return max(np.prod(s) // 24 for s in shapes_of(grads, x) if s and s[-1] == 24 and s[0] != 8)

    assert widest(mlp) == 64 and widest(pieces(16)) == 16


@pytest.mark.parametrize("tokens, count", [(64, 4), (61, 1), (60, 4), (72, 6)])
def test_a_length_without_a_fitting_divisor_is_whole(tokens, count):
    x, _ = arrays(1, tokens)
    shapes = shapes_of(functools.partial(pieces(16), WEIGHTS), x)
    assert ((1, count, tokens // count, 8) in shapes) == (count > 1)


def test_a_model_with_redone_blocks_is_the_same_in_pieces(monkeypatch):
    tokens = jnp.asarray(np.random.default_rng(0).integers(CFG.vocab_size, size=(2, 32)))

    def loss_and_grads(remat: str):
        graph, params = draw(HYDRA, PLAN, remat=remat)
        run = lambda p: jnp.sum(bind(graph, p)(tokens, training=True) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(run))(params)

    value, grads = loss_and_grads("none")
    monkeypatch.setattr(hydrajax.model, "MLP_TOKENS", 16)
    found, pieced = loss_and_grads("block")
    np.testing.assert_allclose(value, found, rtol=1e-6)
    for path, want in grads.items():
        assert_close(path, want, pieced[path], 1e-5)
