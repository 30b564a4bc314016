"""Attention: the suite in dense and blockwise form, an independent loop, memory and cuDNN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal, jaxprs_in_params

from pallas_kernels import attention, attention_step
from pallas_kernels.attention import xla
from pallas_kernels.attention.arg_specs import SPECS
from tests.helpers import assert_close
from tests.kernels import op_suite


def call(spec, implementation, q, k, v, q_offset, q_ids=None, kv_ids=None):
    # A pair is compared as given; ids of the keys alone are a packed row of self-attention.
    segment_ids = kv_ids if q_ids is None else (q_ids, kv_ids)
    if not isinstance(spec.q_offset, tuple):
        q_offset = spec.q_offset
    o = attention(
        q,
        k,
        v,
        causal=spec.causal,
        segment_ids=segment_ids,
        q_offset=q_offset,
        window=spec.window,
        implementation=implementation,
    )
    return (o,)


OP = op_suite.Op(
    call=call,
    specs=SPECS,
    fp32=(),
    tolerance={"float64": (1e-13, 1e-12), "float32": (2e-6, 5e-6), "bfloat16": (6e-3, 1.2e-2)},
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Walk over blocks of 16, so that 75 tokens take five of them; the jit cache knows nothing."""
    monkeypatch.setattr(xla, "DENSE_LOGITS", 0)
    monkeypatch.setattr(xla, "BLOCK", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS)
def test_dense(spec, dtype):
    op_suite.check(OP, spec, "xla", dtype)


def test_blockwise(small_blocks):
    for spec in SPECS:
        op_suite.check(OP, spec, "xla", "float64")
    for spec in ("grouped", "documents"):
        op_suite.check(OP, spec, "xla", "float32")
        op_suite.check(OP, spec, "xla", "bfloat16")


@pytest.mark.parametrize("spec", SPECS)
def test_reference_is_the_definition(spec):
    args, x = SPECS[spec], op_suite.draw(OP, spec)
    got = op_suite.truth(OP, spec)["out_0"]
    B, T, S, N, K, H = args.shape
    offsets = np.broadcast_to(args.q_offset, (B,))
    kv_ids = x.get("kv_ids")
    q_ids = x.get("q_ids")
    if kv_ids is not None and q_ids is None:
        kv_ids = q_ids = np.cumsum(np.diff(kv_ids, axis=1, prepend=kv_ids[:, :1]) != 0, axis=1)
    want = np.zeros(x["q"].shape)
    for b, t, n in np.ndindex(B, T, N):
        position = offsets[b] + t
        seen = [
            s
            for s in range(S)
            if (not args.causal or s <= position)
            and (args.window is None or position - s < args.window)
            and (kv_ids is None or kv_ids[b, s] == q_ids[b, t])
        ]
        if seen:
            head = n // (N // K)
            weights = np.exp(H**-0.5 * x["k"][b, seen, head] @ x["q"][b, t, n])
            want[b, t, n] = weights @ x["v"][b, seen, head] / weights.sum()
    assert_close(spec, want, got, 1e-13)
    empty = (want == 0).all(-1)
    assert empty.any() == (spec in ("document_pair", "nothing_to_see"))
    assert (got[empty] == 0).all()


def test_an_offset_is_the_same_traced_or_not():
    x = {n: jnp.asarray(a) for n, a in op_suite.draw(OP, "offset", "float32").items()}
    q, k, v = x["q"], x["k"], x["v"]
    want = attention(q, k, v, q_offset=50)
    for offset in (jnp.int32(50), np.int64(50), jnp.array([50, 50], jnp.int32)):
        assert_close("offset", want, attention(q, k, v, q_offset=offset), 1e-6)
    assert_close("jitted", want, jax.jit(lambda i: attention(q, k, v, q_offset=i))(50), 1e-6)


def test_long_sequences_make_no_square():
    T = 16384
    x = jax.ShapeDtypeStruct((1, T, 1, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def loss(q, k, v, ids):
        return attention(q, k, v, segment_ids=ids).astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x, ids)
    sizes = [int(np.prod(shape)) for shape in op_suite.shapes_in(jaxpr.jaxpr)]
    assert max(sizes) <= 128 * T, max(sizes)  # splash keeps a row's sum in 128 lanes
    assert len(sizes) > 100


def test_loops_start_from_nothing_that_could_be_made_before_their_inputs(small_blocks):
    x = jnp.zeros((1, 64, 2, 16), jnp.float32)
    loss = lambda q, k, v: attention(q, k, v, implementation="xla").sum()  # noqa: E731

    def constants(jaxpr):
        for equation in jaxpr.eqns:
            made = equation.primitive.name == "broadcast_in_dim"
            if made and isinstance(equation.invars[0], Literal):
                yield equation.outvars[0].aval
            for inner in jaxprs_in_params(equation.params):
                yield from constants(inner)

    found = constants(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr)
    assert [a.shape for a in found if a.size >= x.size] == [x.shape]  # the cotangent of the sum


def test_blocks_that_see_nothing_are_skipped(small_blocks):
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.float32)
    for arguments, pairs in (({}, 10), ({"window": 16}, 7), ({"causal": False}, 16)):
        text = str(jax.make_jaxpr(lambda q, a=arguments: attention(q, q, q, **a))(q))
        assert f"length={pairs}" in text, arguments


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_steps_are_rows(implementation):
    x = {n: jnp.asarray(a) for n, a in op_suite.draw(OP, "grouped", "float32").items()}
    want = attention(x["q"], x["k"], x["v"], implementation="reference")
    lengths = jnp.array([64, 40])
    q = jnp.stack([x["q"][0, 63], x["q"][1, 39]])
    got = attention_step(q, x["k"], x["v"], lengths, implementation=implementation)
    assert_close("step", jnp.stack([want[0, 63], want[1, 39]]), got, 1e-6)
    empty = attention_step(q, x["k"], x["v"], jnp.array([0, 1]), implementation=implementation)
    assert not np.any(empty[0])
    assert_close("one entry", jnp.repeat(x["v"][1, 0], 3, 0), empty[1], 1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("tokens", [128, 2048])
def test_lowers_from_any_host(platform, tokens):
    x = jax.ShapeDtypeStruct((1, tokens, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(q, k, v, ids):
        return attention(q, k, v, segment_ids=ids).astype(jnp.float32).sum()

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    grad.trace(x, x, x, ids).lower(lowering_platforms=(platform,))
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    token = jax.ShapeDtypeStruct((1, 2, 64), jnp.bfloat16)
    step = jax.jit(attention_step).trace(token, x, x, lengths)
    step.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16 or float16, got float32"),
        ({"dim": 264}, "needs a head dim of at most 256 and a multiple of 8, got 264"),
        ({"segment_ids": jnp.ones((1, 8), jnp.int32)}, "packed documents need .*, got segment_ids"),
        ({"q_offset": 3}, "needs q_offset 0, got 3"),
        ({"q_offset": jnp.int32(0)}, "needs q_offset 0, got an array"),
        ({"window": 4}, "takes no window here, got 4"),
    ],
)
def test_cudnn_declines(arguments, reason):
    arguments = dict(arguments)
    x = jnp.ones((1, 8, 2, arguments.pop("dim", 64)), arguments.pop("dtype", jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=f"^cudnn: {reason}$"):
        attention(x, x, x, implementation="cudnn", **arguments)
    attention(x, x, x, implementation=("cudnn", "xla"), **arguments)


@pytest.mark.gpu
def test_cudnn_on_a_device():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 256, 4, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((2, 256, 2, 64)), jnp.bfloat16) for _ in range(2))

    def outputs(implementation):
        o, vjp = jax.vjp(lambda *x: attention(*x, implementation=implementation), q, k, v)
        return (o, *vjp(o))

    want = outputs("reference")
    for implementation in ("cudnn", ("cudnn", "xla")):
        for name, x, y in zip(("o", "dq", "dk", "dv"), want, outputs(implementation), strict=True):
            assert_close(f"{implementation} {name}", x, y, 2e-2)


def test_wrong_arguments_are_named():
    q, k = jnp.ones((2, 8, 4, 16)), jnp.ones((2, 9, 3, 16))
    with pytest.raises(ValueError, match="k: expected heads that divide the 4 of q, got 3"):
        attention(q, k, k)
    with pytest.raises(ValueError, match=r"v: expected \(2, 9, 3, 16\) float32 like k"):
        attention(q, k, k[:, :3])
    with pytest.raises(ValueError, match=r"segment_ids: expected a pair .* 8 queries and 9 keys"):
        attention(q, k[:, :, :2], k[:, :, :2], segment_ids=jnp.ones((2, 8), jnp.int32))
    with pytest.raises(ValueError, match="window: expected a positive int with causal=True, got 0"):
        attention(q, q, q, window=0)
    with pytest.raises(ValueError, match=r"q_offset: expected .* got \(3,\) int32"):
        attention(q, q, q, q_offset=jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r"lengths: expected \(2,\) integers, got \(2,\) float32"):
        attention_step(q[:, 0], q, q, jnp.ones(2))


def test_layers_of_one_shape_are_lowered_once_and_named():
    x = jnp.ones((1, 8, 2, 16))

    def layers(x):
        for _ in range(3):
            x = attention(x, x, x)
        return x.sum()

    text = jax.jit(jax.grad(layers)).lower(x).as_text(debug_info=True)
    for name in ("_run_forward", "_run_backward"):
        assert text.count(f"func.func private @{name}") == 1
    assert '"attention=xla/exp"' in text  # named inside, not by one of its callers
