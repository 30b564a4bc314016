"""The TPU kernels of the gated delta rule without a TPU: simulated against float64, exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import GatedDeltaConfig, gated_delta_rule, gated_delta_step
from pallas_kernels.gated_delta_rule import api, pallas_tpu_blocks
from pallas_kernels.gated_delta_rule.arg_specs import GatedDeltaArgs
from pallas_kernels.gated_delta_rule.pallas_tpu_inverse import (
    inverse_scratch,
    unit_lower_inverses,
)
from tests.helpers import assert_close
from tests.kernels import op_suite
from tests.kernels.test_gated_delta_rule import call
from tests.kernels.tpu_interpreter import interpreted

# Borders inside chunks and on one, documents of one token, an id that comes back.
DOCUMENTS = ((1, 16), (2, 47), (1, 1), (3, 1), (4, 70), (2, 15))
SPECS = {
    # Two chunks of 128, the last one ragged.
    "documents": GatedDeltaArgs(
        shape=(1, 150, 1, 1, 64, 128), documents=DOCUMENTS, initial_state=True, chunk=128
    ),
    # Blocks of 4 heads and 2 key heads, the last one not full.
    "grouped": GatedDeltaArgs(shape=(1, 70, 3, 6, 64, 64), initial_state=True, chunk=64),
    # Blocks of 2 heads that share one key head.
    "shared": GatedDeltaArgs(shape=(1, 20, 1, 4, 64, 64), chunk=64),
    "repeated": GatedDeltaArgs(
        shape=(1, 128, 1, 1, 128, 64),
        keys="repeated",
        beta=(0.9, 0.98),
        gate=(0.0, -0.1),
        chunk=128,
    ),
    "correlated": GatedDeltaArgs(
        shape=(2, 64, 1, 1, 64, 64), keys="correlated", beta=(0.98,), initial_state=True, chunk=64
    ),
    "gates": GatedDeltaArgs(
        shape=(1, 100, 1, 1, 64, 64),
        gate=(-40.0, -0.1, 0.0),
        beta=(0.0, 1.0),
        initial_state=True,
        chunk=64,
    ),
}
MAX_HEADS = {"grouped": 4, "shared": 2}
SUITE = op_suite.Op(
    call=call,
    specs=SPECS,
    fp32=("g", "beta", "initial_state"),
    tolerance={"float32": (1e-6, 3e-6), "bfloat16": (1.2e-2, 1.2e-2)},
    # As in the suite of `xla`: of a single key's dg hardly anything but rounding is left.
    cancels={("repeated", "d_g"): 100},
)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("documents", "bfloat16"),
        ("grouped", "float32"),
        ("shared", "bfloat16"),
        ("repeated", "float32"),
        ("repeated", "bfloat16"),
        ("correlated", "bfloat16"),
        ("gates", "float32"),
    ],
)
def test_outputs_and_gradients(spec, dtype, capsys, monkeypatch):
    monkeypatch.setattr(pallas_tpu_blocks, "MAX_HEADS", MAX_HEADS.get(spec, 8))
    with interpreted(capsys):
        op_suite.check(SUITE, spec, "pallas_tpu", dtype)


def test_without_residuals(capsys):
    arrays = op_suite.draw(SUITE, "correlated", "float32")
    x = {name: jnp.asarray(a) for name, a in arrays.items()}

    def run():
        return gated_delta_rule(**x, config=GatedDeltaConfig(chunk=64), implementation="pallas_tpu")

    with interpreted(capsys):
        got, (want, _) = run(), jax.vjp(run)
    for name, a, b in zip(("o", "state"), want, got, strict=True):
        assert_close(name, a, b, 0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [64, 128])
def test_inverse(size, exact, capsys):
    """Random, correlated and repeated keys in the heads of one block."""
    rng = np.random.default_rng(0)
    own, shared = rng.standard_normal((3, size, 32)), rng.standard_normal((3, 1, 32))
    k = own * np.array([1.0, 0.1, 0.0])[:, None, None] + shared * np.array([0, 1, 1])[:, None, None]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    n = -0.98 * np.tril(k @ k.swapaxes(-1, -2))  # what is on the diagonal is not read

    def kernel(n, x, scratch):
        for h, inverse in enumerate(unit_lower_inverses([n[h] for h in range(3)], scratch, exact)):
            x[h] = inverse

    with interpreted(capsys):
        got = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(n.shape, jnp.float32),
            scratch_shapes=[inverse_scratch(size)],
        )(n.astype(np.float32))
    want = np.linalg.inv(np.eye(size) - np.tril(n, -1))
    for h, keys in enumerate(("random", "correlated", "repeated")):
        assert_close(f"inverse, {keys} keys", want[h], got[h], 1e-6 if exact else 3e-5)


@pytest.mark.parametrize(("heads", "dims"), [((3, 9), (64, 128)), ((11, 11), (128, 64))])
def test_step(heads, dims, capsys):
    rng, (K, R), (H, E) = np.random.default_rng(0), heads, dims
    q, k = (rng.standard_normal((2, K, H)) for _ in range(2))
    v, state = rng.standard_normal((2, R, E)), rng.standard_normal((2, R, H, E))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    g, beta = -rng.exponential(0.2, (2, R)), rng.uniform(0, 1, (2, R))
    inputs = [x.astype(np.float32) for x in (q, k, v, g, beta, state)]

    def run(implementation, inputs):
        outputs, vjp = jax.vjp(
            functools.partial(gated_delta_step, implementation=implementation), *inputs
        )
        return (*outputs, *vjp(outputs))

    with jax.enable_x64(True):
        want = run("reference", [x.astype(np.float64) for x in inputs])
    with interpreted(capsys):
        got = jax.jit(run, static_argnums=0)("pallas_tpu", inputs)
    names = ("o", "state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_state")
    for name, a, b in zip(names, want, got, strict=True):
        assert_close(name, a, b, 1e-6)


def _loss(op, implementation, **keywords):
    def loss(*inputs):
        outputs = op(*inputs, implementation=implementation, **keywords)
        return sum(
            jnp.sum(jnp.square(x.astype(jnp.promote_types(x, jnp.float32)))) for x in outputs
        )

    return loss


def _inputs(dims=(64, 64), heads=(2, 2), T=70, dtype=jnp.bfloat16):
    (H, E), (K, R) = dims, heads
    q, gate = (
        jax.ShapeDtypeStruct((1, T, K, H), dtype),
        jax.ShapeDtypeStruct((1, T, R), jnp.float32),
    )
    return q, q, jax.ShapeDtypeStruct((1, T, R, E), dtype), gate, gate


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("dims", "dtype", "chunk"),
    [((128, 128), jnp.bfloat16, 128), ((64, 128), jnp.float32, 64)],
)
def test_exports_for_tpu(dims, dtype, chunk, documents):
    """Forward and backward are lowered for TPU on any machine."""
    inputs, keywords = _inputs(dims, dtype=dtype), {"config": GatedDeltaConfig(chunk=chunk)}
    if documents:
        keywords["segment_ids"] = jnp.zeros((1, 70), jnp.int32)
    loss = _loss(gated_delta_rule, "pallas_tpu", **keywords)
    program = jax.export.export(jax.jit(jax.grad(loss, range(5))), platforms=["tpu"])(*inputs)
    assert program.mlir_module().count("tpu_custom_call") == 2


def test_step_exports_for_tpu():
    *token, gate, beta = (
        jax.ShapeDtypeStruct(x.shape[:1] + x.shape[2:], x.dtype) for x in _inputs()
    )
    state = jax.ShapeDtypeStruct((1, 2, 64, 64), jnp.float32)
    step = jax.jit(gated_delta_step)
    program = jax.export.export(step, platforms=["tpu"])(*token, gate, beta, state)
    assert program.mlir_module().count("tpu_custom_call") == 1


@pytest.mark.parametrize(
    ("kind", "kernels", "chunk"), [("TPU v5 lite", 1, 128), ("cpu", 0, 64), (None, 1, 64)]
)
def test_chosen_on_tpu(kind, kernels, chunk, monkeypatch):
    """By default on TPU; chunks are longer where the mesh says that it is one."""
    seen = []
    resolve = api.dispatch.resolve
    monkeypatch.setattr(
        api.dispatch, "resolve", lambda *a: seen.append(a[-1].config.chunk) or resolve(*a)
    )
    device = None if kind is None else AbstractDevice(kind, 1, "tpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(gated_delta_rule).trace(*_inputs()).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == kernels
    assert seen == [chunk]


def test_declines_what_the_kernels_do_not_take():
    for inputs, chunk, reason in (
        (_inputs(dtype=jnp.float16), 64, "takes bfloat16 or float32, got float16"),
        (_inputs((32, 64)), 64, r"needs key and value dims in \(64, 128\), got \(32, 64\)"),
        (_inputs(), 32, r"needs chunks of one of \(64, 128\), got 32"),
        (_inputs(heads=(9, 9)), 64, None),
        (_inputs(heads=(2, 10)), 64, "needs blocks of heads with a multiple of 128 lanes"),
    ):
        run = functools.partial(
            gated_delta_rule, config=GatedDeltaConfig(chunk=chunk), implementation="pallas_tpu"
        )
        if reason is None:
            jax.eval_shape(run, *inputs)
            continue
        with pytest.raises(NotImplementedError, match=f"pallas_tpu: {reason}"):
            jax.eval_shape(run, *inputs)
    with pytest.raises(NotImplementedError, match=r"pallas_tpu: runs on TPU, got NVIDIA H100"):
        api.pallas_tpu.check_device("NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (64, 128)])
def test_blocks_cover_all_heads(dims):
    """Whatever the number of heads: few blocks, of whole lanes, and the key heads beside them."""
    for keys in range(1, 17):
        for group in range(1, 9):
            heads = keys * group
            if (found := pallas_tpu_blocks.head_blocks(keys, heads, dims)) is None:
                assert 64 in dims and group > 4
                continue
            n, m = found
            assert n <= 8 and (n % group == 0 or group % n == 0) and m == max(1, n // group)
            for size, total, dim in ((m, keys, dims[0]), (n, heads, dims[1])):
                assert size * dim % 128 == 0 or size == total
            if dims == (128, 128) and group == 1:
                assert -(-heads // n) == -(-heads // 8)
