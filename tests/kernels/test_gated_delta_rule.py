"""The gated delta rule: the suite, an independent loop, the transformers oracle and properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import GatedDeltaConfig, gated_delta_rule, gated_delta_step
from pallas_kernels.gated_delta_rule import api, xla, xla_inverse
from pallas_kernels.gated_delta_rule.arg_specs import SPECS
from tests.helpers import assert_close
from tests.kernels import op_suite

FLOAT_ARGS = ("q", "k", "v", "g", "beta")


def call(spec, implementation, q, k, v, g, beta, initial_state=None, segment_ids=None):
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=initial_state,
        segment_ids=segment_ids,
        config=GatedDeltaConfig(chunk=spec.chunk),
        implementation=implementation,
    )


OP = op_suite.Op(
    call=call,
    specs=SPECS,
    fp32=("g", "beta", "initial_state"),
    tolerance={"float64": (1e-14, 1e-13), "float32": (1e-6, 3e-6), "bfloat16": (1.2e-2, 1.2e-2)},
    # One key alone: what its past holds is overwritten whatever its decay, and little is left of
    # dg. The reference in fp32 loses two digits as well.
    cancels={("repeated", "d_g"): 100},
)


@pytest.mark.parametrize("spec", SPECS)
def test_xla(spec):
    op_suite.check(OP, spec, "xla", "float64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", ["grouped", "correlated", "repeated", "strong_decay", "documents"])
def test_xla_in_lower_precision(spec, dtype):
    op_suite.check(OP, spec, "xla", dtype)


@pytest.mark.parametrize("spec", ["grouped", "documents"])
def test_reference_in_float32(spec):
    op_suite.check(OP, spec, "reference", "float32")


def loop(q, k, v, g, beta, initial_state=None, segment_ids=None):
    """The recurrence in numpy, as S_t = e^g (I - beta k k^T) S + beta k v^T."""
    (B, T, K, H), (R, E) = q.shape, v.shape[2:]
    out, states = np.zeros(v.shape), np.zeros((B, R, H, E))
    for b, r in np.ndindex(B, R):
        state = np.zeros((H, E)) if initial_state is None else initial_state[b, r].copy()
        for t in range(T):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                state[:] = 0
            key = k[b, t, r // (R // K)]
            erase = np.eye(H) - beta[b, t, r] * np.outer(key, key)
            state = np.exp(g[b, t, r]) * erase @ state + beta[b, t, r] * np.outer(key, v[b, t, r])
            out[b, t, r] = H**-0.5 * state.T @ q[b, t, r // (R // K)]
        states[b, r] = state
    return out, states


@pytest.mark.parametrize("spec", SPECS)
def test_reference_is_the_recurrence(spec):
    arrays = op_suite.draw(OP, spec, "float64")
    got = op_suite.evaluate(OP, spec, "reference", arrays, "float64")
    for i, want in enumerate(loop(**arrays)):
        assert_close(f"{spec} output {i}", want, got[f"out_{i}"], 1e-13)


@functools.partial(op_suite.jit, static_argnames="chunk")
def run(arrays, chunk):
    return gated_delta_rule(**arrays, config=GatedDeltaConfig(chunk=chunk))


@pytest.mark.parametrize("spec", ["repeated", "documents"])
@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
def test_chunk_size_changes_nothing(spec, chunk):
    arrays = op_suite.draw(OP, spec)
    with jax.enable_x64(True):
        got = run(_jax(arrays), chunk)
    for i, (want, value) in enumerate(zip(loop(**arrays), got, strict=True)):
        assert_close(f"chunk {chunk} output {i}", want, value, 1e-12)


def test_split_anywhere():
    arrays = op_suite.draw(OP, "documents")
    want, want_state = loop(**arrays)
    with jax.enable_x64(True):
        for cut in (1, 20, 32):
            left = {n: x[:, :cut] for n, x in arrays.items() if n != "initial_state"}
            right = {n: x[:, cut:] for n, x in arrays.items() if n != "initial_state"}
            left["initial_state"] = arrays["initial_state"]
            o_left, state = run(_jax(left), 16)
            # A border at the cut is the caller's: the state goes on only inside a document.
            ids = arrays["segment_ids"][0]
            right["initial_state"] = np.asarray(state) * (ids[cut] == ids[cut - 1])
            o_right, state = run(_jax(right), 16)
            got = np.concatenate([o_left, o_right], 1)
            assert_close(f"cut {cut} o", want, got, 1e-12)
            assert_close(f"cut {cut} state", want_state, state, 1e-12)


def test_packed_documents_are_separate_documents():
    arrays = op_suite.draw(OP, "documents", "float64")
    want, _ = loop(**arrays)
    border = 32  # 1, 2, 1: the third one must not see the first
    alone = {n: x[:, 21:border] for n, x in arrays.items() if n in FLOAT_ARGS}
    assert_close("third document", want[:, 21:border], loop(**alone)[0], 1e-13)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_steps_are_the_scan(implementation):
    arrays = op_suite.draw(OP, "grouped", "float64")
    arrays = {n: x if n == "initial_state" else x[:, :9] for n, x in arrays.items()}
    want, want_state = loop(**arrays)
    with jax.enable_x64(True):
        x = _jax(arrays)
        step = op_suite.jit(gated_delta_step, static_argnames="implementation")
        state = x["initial_state"]
        for t in range(9):
            inputs = [x[n][:, t] for n in FLOAT_ARGS]
            o, state = step(*inputs, state, implementation=implementation)
            assert_close(f"token {t}", want[:, t], o, 1e-12)
    assert_close("state", want_state, state, 1e-12)


def test_rows_without_update_leave_the_state():
    arrays = op_suite.draw(OP, "documents", "float64")
    _, want = loop(**arrays)
    rows = (0, 0), (0, 9), (0, 0), (0, 0)
    padded = {n: np.pad(x, rows[: x.ndim], "edge") for n, x in arrays.items()}
    padded["initial_state"] = arrays["initial_state"]
    padded["g"][:, -9:] = padded["beta"][:, -9:] = 0
    with jax.enable_x64(True):
        _, state = run(_jax(padded), 16)
    assert_close("state", want, state, 1e-12)


def xla_both(arrays, chunks, chunk=16):
    """Outputs and gradients of `xla` with so many chunks in a segment, of ones as cotangents."""
    x = _jax(arrays)
    runs = api.run_numbers(x["segment_ids"]) if "segment_ids" in x else None
    shapes, dtype = (x["q"].shape, x["v"].shape), x["q"].dtype
    params = api.GatedDeltaParams(0.3, api.GatedDeltaConfig(chunk=chunk), *shapes, dtype, True)
    B, _, R, E = shapes[1]
    state = x.get("initial_state", jnp.zeros((B, R, shapes[0][-1], E), x["g"].dtype))
    operands = *(x[name] for name in FLOAT_ARGS), runs, state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "SEGMENT_BYTES", chunks * B * R * chunk**2 * x["g"].dtype.itemsize)
        o, state, *kept = xla.forward(params, *operands)
        grads = xla.backward(params, *operands, *kept, jnp.ones_like(o), jnp.ones_like(state))
    return (o, state, *kept, *grads)


@pytest.mark.parametrize("spec", ["grouped", "documents", "repeated"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_segments_one_after_another_change_nothing(spec, chunks):
    arrays = op_suite.draw(OP, spec)
    assert arrays["q"].shape[1] > 2 * 16  # or there is only one
    with jax.enable_x64(True):
        want, got = xla_both(arrays, 1 << 20), xla_both(arrays, chunks)
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, i
        assert_close(f"{spec} {i}", a, b, 1e-13)


def test_a_long_sequence_takes_the_memory_of_a_segment():
    def temporary(T, chunk=16):
        shape, state = (1, T, 1, 16), jnp.zeros((1, 1, 16, 16))
        params = api.GatedDeltaParams(
            1.0, api.GatedDeltaConfig(chunk=chunk), shape, shape, jnp.dtype("float32"), True
        )
        wide, gate = (
            jax.ShapeDtypeStruct(shape, "float32"),
            jax.ShapeDtypeStruct(shape[:3], "float32"),
        )
        kept = [jax.ShapeDtypeStruct((T // chunk, 1, 1, 16, 16), "float32")] * 2
        lowered = jax.jit(functools.partial(xla.backward, params)).lower(
            wide, wide, wide, gate, gate, None, state, *kept, wide, state
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    with pytest.MonkeyPatch.context() as patch:
        whole = temporary(1 << 15)
        patch.setattr(xla, "SEGMENT_BYTES", 1 << 16)  # 64 chunks, a 32nd of it
        assert temporary(1 << 15) < 0.5 * whole


@pytest.mark.parametrize("size", [1, 4, 16, 64, 128])
@pytest.mark.parametrize("keys", ["random", "repeated"])
@pytest.mark.parametrize("ladder", ["block_ladder", "whole_ladder"])
def test_inverse(size, keys, ladder):
    rng = np.random.default_rng(0)
    k = rng.standard_normal((3, 1 if keys == "repeated" else size, 32))
    k = np.broadcast_to(k / np.linalg.norm(k, axis=-1, keepdims=True), (3, size, 32))
    a = np.tril(0.98 * k @ k.swapaxes(-1, -2), -1)
    got = op_suite.jit(getattr(xla_inverse, ladder))(a.astype(np.float32))
    assert_close("inverse", np.linalg.inv(np.eye(size) + a), got, 1e-6)


def test_remat_policy_saves_inverse_and_states():
    arrays = _jax(op_suite.draw(OP, "random", "float32"))
    policy = jax.checkpoint_policies.save_only_these_names("gdn_t_inv", "gdn_states", "gdn_out")
    layer = jax.checkpoint(lambda x: gated_delta_rule(**x)[0], policy=policy)
    text = str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(arrays))
    # Forward and reverse scan, and no third one: nothing recurrent is computed again.
    assert text.count(" scan[") == 2, text.count(" scan[")
    full = jax.checkpoint(lambda x: gated_delta_rule(**x)[0])
    text = str(jax.make_jaxpr(jax.grad(lambda x: full(x).sum()))(arrays))
    assert text.count(" scan[") == 3, text.count(" scan[")


@pytest.mark.torch
@pytest.mark.parametrize("spec", ["grouped", "repeated"])
def test_transformers_oracle(spec):
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    oracle = module.torch_chunk_gated_delta_rule
    # With fla and triton importable the decorated name runs Triton, which fails on a CPU.
    while hasattr(oracle, "__wrapped__"):
        oracle = oracle.__wrapped__
    arrays = op_suite.draw(OP, spec, "float32")
    got = op_suite.evaluate(OP, spec, "xla", arrays, "float32")
    x = {n: torch.tensor(a.astype(np.float32), requires_grad=True) for n, a in arrays.items()}
    groups = arrays["v"].shape[2] // arrays["q"].shape[2]
    q, k = (x[n].repeat_interleave(groups, dim=2) for n in ("q", "k"))
    outputs = oracle(
        q,
        k,
        x["v"],
        g=x["g"],
        beta=x["beta"],
        initial_state=x.get("initial_state"),
        output_final_state=True,
    )
    rng = np.random.default_rng(7)
    cotangents = [rng.standard_normal(o.shape).astype(jnp.bfloat16) for o in outputs]
    cotangents = [torch.tensor(c.astype(np.float32)) for c in cotangents]
    torch.autograd.backward(outputs, cotangents)
    for i, output in enumerate(outputs):
        assert_close(f"{spec} output {i}", output.detach().numpy(), got[f"out_{i}"], 1e-5)
    for name, tensor in x.items():
        rel = 1e-5 * OP.cancels.get((spec, f"d_{name}"), 1)
        assert_close(f"{spec} d_{name}", tensor.grad.numpy(), got[f"d_{name}"], rel)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_from_any_host(platform):
    x = _jax(op_suite.draw(OP, "documents", "bfloat16"))

    def loss(x, ids):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in gated_delta_rule(**x, segment_ids=ids))

    ids = x.pop("segment_ids")
    jax.jit(jax.value_and_grad(loss)).trace(x, ids).lower(lowering_platforms=(platform,))
    token = [x[n][:, 0] for n in FLOAT_ARGS]
    step = op_suite.jit(gated_delta_step).trace(*token, x["initial_state"])
    step.lower(lowering_platforms=(platform,))


def test_wrong_arguments_are_named():
    x = _jax(op_suite.draw(OP, "grouped", "float32"))
    for name, value, message in (
        ("k", x["k"][:, 1:], r"k: expected \(2, 96, 2, 16\) float32, got \(2, 95, 2, 16\)"),
        ("v", x["v"][:, :, :5], "v: expected a multiple of q's 2 heads, got 5 heads"),
        ("v", x["v"].astype(jnp.bfloat16), r"v: expected .* float32 .*, got .* bfloat16"),
        ("g", x["g"].astype(jnp.bfloat16), r"g: expected .* float32, got .* bfloat16"),
        ("initial_state", x["initial_state"][:1], r"initial_state: expected \(2, 6, 16, 8\)"),
        ("segment_ids", jnp.ones((2, 96)), "segment_ids: expected .* int32, got .* float32"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(**x | {name: value})
    with pytest.raises(ValueError, match=r"config\.chunk: expected a power of two, got 48"):
        GatedDeltaConfig(chunk=48)


def _jax(arrays):
    return {name: jnp.asarray(x) for name, x in arrays.items()}
