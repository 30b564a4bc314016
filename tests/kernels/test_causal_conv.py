"""The causal convolution: the suite, an independent loop, splits and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import causal_conv, causal_conv_step
from pallas_kernels.causal_conv.arg_specs import SPECS
from tests.helpers import assert_close
from tests.kernels import op_suite


def call(spec, implementation, x, w, initial_state=None, segment_ids=None):
    return causal_conv(
        x,
        w,
        activation=spec.activation,
        initial_state=initial_state,
        segment_ids=segment_ids,
        implementation=implementation,
    )


OP = op_suite.Op(
    call=call,
    specs=SPECS,
    fp32=(),
    tolerance={"float64": (1e-14, 1e-13), "float32": (1e-6, 2e-6), "bfloat16": (3e-3, 5e-3)},
)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS)
def test_xla(spec, dtype):
    op_suite.check(OP, spec, "xla", dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_reference_is_the_definition(spec):
    args, x = SPECS[spec], op_suite.draw(OP, spec)
    got = op_suite.truth(OP, spec)
    B, T, W, C = args.shape
    ids = x.get("segment_ids", np.zeros((B, T)))
    runs = np.cumsum(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0, axis=1)
    runs = np.concatenate([np.zeros((B, W - 1)), runs], 1)
    before = x.get("initial_state", np.zeros((B, W - 1, C)))
    inputs = np.concatenate([before, x["x"]], 1)
    y = np.zeros((B, T, C))
    for b, t, tap in np.ndindex(B, T, W):
        if runs[b, t + tap] == runs[b, t + W - 1]:
            y[b, t] += x["w"][tap] * inputs[b, t + tap]
    if args.activation == "silu":
        y = y / (1 + np.exp(-y))
    assert_close("y", y, got["out_0"], 1e-14)
    state = inputs[:, T:] * (runs[:, T:] == runs[:, -1:])[..., None]
    assert_close("state", state, got["out_1"], 0)


@pytest.mark.parametrize("spec", ["silu", "documents"])
def test_split_anywhere(spec):
    args = SPECS[spec]
    call = op_suite.jit(OP.call, static_argnums=(0, 1))
    x = {n: jnp.asarray(a) for n, a in op_suite.draw(OP, spec, "float32").items()}
    ids = x.get("segment_ids", jnp.zeros(args.shape[:2], jnp.int32))
    want, want_state = call(args, None, **x)
    for cut in (1, 2, 18):
        y, state = call(args, None, x["x"][:, :cut], x["w"], x["initial_state"], ids[:, :cut])
        state = state * (ids[0, cut] == ids[0, cut - 1]).astype(state.dtype)
        rest, state = call(args, None, x["x"][:, cut:], x["w"], state, ids[:, cut:])
        assert_close(f"cut {cut} y", want, jnp.concatenate([y, rest], 1), 1e-6)
        assert_close(f"cut {cut} state", want_state, state, 0)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_steps_are_the_scan(implementation):
    x = {n: jnp.asarray(a) for n, a in op_suite.draw(OP, "silu", "float32").items()}
    want, want_state = call(SPECS["silu"], None, **x)
    state = x["initial_state"]
    step = jax.jit(causal_conv_step, static_argnames=("activation", "implementation"))
    for t in range(want.shape[1]):
        y, state = step(
            x["x"][:, t], x["w"], state, activation="silu", implementation=implementation
        )
        assert_close(f"token {t}", want[:, t], y, 1e-6)
    assert_close("state", want_state, state, 0)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_from_any_host(platform):
    x = {n: jnp.asarray(a) for n, a in op_suite.draw(OP, "documents", "bfloat16").items()}
    ids = x.pop("segment_ids")

    def loss(x):
        y, state = causal_conv(**x, segment_ids=ids, activation="silu")
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state.astype(jnp.float32))

    jax.jit(jax.value_and_grad(loss)).trace(x).lower(lowering_platforms=(platform,))
    step = jax.jit(causal_conv_step).trace(x["x"][:, 0], x["w"], x["initial_state"])
    step.lower(lowering_platforms=(platform,))


def test_wrong_arguments_are_named():
    x, w = jnp.ones((2, 8, 6)), jnp.ones((4, 6))
    with pytest.raises(ValueError, match=r"w: expected \(W, 6\) float32, got \(4, 5\) float32"):
        causal_conv(x, w[:, :5])
    with pytest.raises(ValueError, match=r"initial_state: expected \(2, 3, 6\) float32, got"):
        causal_conv(x, w, initial_state=x[:, :4])
    with pytest.raises(ValueError, match="activation: expected None or 'silu', got 'gelu'"):
        causal_conv(x, w, activation="gelu")
    with pytest.raises(ValueError, match=r"segment_ids: expected .* int32, got .* float32"):
        causal_conv(x, w, segment_ids=jnp.ones((2, 8)))
