"""Attention on TPU without one: interpreted against float64, exported, chosen, declined."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import attention, attention_step
from pallas_kernels.attention import (
    api,
    pallas_tpu,
    pallas_tpu_backward,
    pallas_tpu_forward,
    pallas_tpu_step,
    pallas_tpu_tiles,
    splash,
)
from pallas_kernels.attention.arg_specs import AttentionArgs
from pallas_kernels.attention.pallas_tpu_visits import (
    BORDER,
    FIRST,
    LAST,
    column,
    row,
    tiles_of,
    visits,
)
from tests.helpers import assert_close
from tests.kernels import op_suite
from tests.kernels.test_attention import call
from tests.kernels.tpu_interpreter import interpreted

DOCUMENTS = ((1, 90), (2, 3), (1, 47), (0, 60))
SPECS = {
    "documents": AttentionArgs(shape=(1, 200, 200, 2, 1, 64), documents=DOCUMENTS),
    "wide": AttentionArgs(shape=(2, 100, 100, 4, 1, 128)),
    # Ids as given, offsets by row, and queries that see nothing: none in reach, or none of its id.
    "pair": AttentionArgs(
        shape=(2, 90, 200, 1, 1, 64),
        q_offset=(100, -60),
        documents=DOCUMENTS,
        query_documents=((2, 30), (7, 20), (0, 40)),
    ),
    "full": AttentionArgs(shape=(1, 70, 300, 1, 1, 64), causal=False),
    "window": AttentionArgs(shape=(1, 140, 300, 1, 1, 64), window=40, q_offset=130),
}
SUITE = op_suite.Op(
    call=call, specs=SPECS, fp32=(), tolerance={"float32": (2e-6, 5e-6), "bfloat16": (6e-3, 1.2e-2)}
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 and groups of 2 heads, so that few tokens and heads make several."""
    monkeypatch.setattr(pallas_tpu_tiles, "GROUP", 2)
    monkeypatch.setattr(pallas_tpu, "BLOCK", 128)
    monkeypatch.setattr(pallas_tpu_step, "BLOCK", 128)
    monkeypatch.setattr(pallas_tpu, "_tiles", lambda params: tiles_of(params, 128))
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    "spec, dtype",
    [
        ("documents", "bfloat16"),
        ("wide", "bfloat16"),
        ("pair", "float32"),
        ("full", "float32"),
        ("window", "float32"),
    ],
)
def test_interpreted(spec, dtype, small_blocks, capsys):
    """Outputs and gradients are those in float64; no read of fresh memory, no race."""
    with interpreted(capsys):
        op_suite.check(SUITE, spec, "pallas_tpu", dtype)


def test_large_blocks_are_cut_into_pieces(capsys, monkeypatch):
    for kernel in (pallas_tpu_forward, pallas_tpu_backward):
        monkeypatch.setattr(kernel, "piece", lambda size: 128)
    spec = AttentionArgs(shape=(1, 200, 200, 1, 1, 64), documents=((1, 90), (2, 110)))
    suite = op_suite.Op(call=call, specs={"pieces": spec}, fp32=(), tolerance=SUITE.tolerance)
    with interpreted(capsys):
        op_suite.check(suite, "pieces", "pallas_tpu", "float32")


def test_log_sums(small_blocks, capsys):
    """They are those of the logits, and infinite where nothing is seen."""
    spec, x = SPECS["pair"], op_suite.draw(SUITE, "pair", "float32")
    params = params_of(spec)
    operands = (x["q"], x["k"], x["v"], x["q_ids"], x["kv_ids"], x["q_offset"])
    with interpreted(capsys):
        _, lse = jax.jit(functools.partial(pallas_tpu.forward, params))(*operands)
    seen = dense_mask(spec, x["q_ids"], x["kv_ids"])
    logits = np.einsum("btd,bsd->bts", np.float64(x["q"][:, :, 0]), np.float64(x["k"][:, :, 0])) / 8
    with np.errstate(divide="ignore"):
        want = np.log(np.where(seen, np.exp(logits), 0).sum(-1))
    want = np.where(np.isfinite(want), want, np.inf)
    np.testing.assert_allclose(lse[:, :, 0], want, rtol=1e-5, atol=1e-5)
    assert 0 < np.isinf(want).sum() < want.size


def params_of(spec, dtype="float32", paired=True):
    B, T, S, N, K, H = spec.shape
    return api.AttentionParams(
        scale=H**-0.5,
        causal=spec.causal,
        window=spec.window,
        q_offset=None if isinstance(spec.q_offset, tuple) else spec.q_offset,
        segmented=bool(spec.documents),
        paired=paired,
        ordered=not paired,
        shape_q=(B, T, N, H),
        shape_k=(B, S, K, H),
        dtype=jnp.dtype(dtype),
    )


def dense_mask(spec, q_ids, kv_ids) -> np.ndarray:
    """Who sees whom, [B,T,S], by the definition."""
    B, T, S = spec.shape[:3]
    at = np.arange(T)[None] + np.broadcast_to(spec.q_offset, (B,))[:, None]
    ahead = at[:, :, None] - np.arange(S)
    seen = np.ones(ahead.shape, bool) if not spec.causal else ahead >= 0
    if spec.window is not None:
        seen &= ahead < spec.window
    return seen if q_ids is None else seen & (q_ids[:, :, None] == kv_ids[:, None])


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("spec", [*SPECS, "uneven"])
def test_visits_are_the_blocks_with_work(spec, by_keys):
    """Every pair that sees something is visited once, and masked unless it sees everything."""
    uneven = AttentionArgs(shape=(2, 700, 900, 1, 1, 64), causal=False, window=None)
    spec = SPECS.get(spec, uneven)
    B, _, S = spec.shape[:3]
    kv_ids = spec.arrays(np.random.default_rng(0))["kv_ids"]
    q_ids = spec.arrays(np.random.default_rng(0))["q_ids"]
    if kv_ids is not None and q_ids is None:
        kv_ids = np.cumsum(np.diff(kv_ids, axis=1, prepend=kv_ids[:, :1]) != 0, 1, dtype=np.int32)
        q_ids = kv_ids
    params = params_of(spec)
    offset = np.array(spec.q_offset, np.int32) if params.q_offset is None else None
    tiles = tiles_of(params, 128)
    table, count = visits(params, tiles, q_ids, kv_ids, offset, by_keys)
    seen = dense_mask(spec, q_ids, kv_ids)
    for b in range(B):
        listed = np.asarray(table)[b, : count[b]]
        pairs = [(int(row(x)), int(column(x))) for x in listed]
        major = [pair[by_keys] for pair in pairs]
        assert len(set(pairs)) == len(pairs) and major == sorted(major)
        assert set(major) == set(range(tiles.counts[by_keys]))
        changes = [n != m for n, m in itertools.pairwise([-1, *major, -1])]
        assert [bool(x & FIRST) for x in listed] == changes[:-1]
        assert [bool(x & LAST) for x in listed] == changes[1:]
        for i, j in itertools.product(*map(range, tiles.counts)):
            block = seen[b, i * tiles.rows :][: tiles.rows, j * tiles.columns :][:, : tiles.columns]
            alone = major.count((i, j)[by_keys]) == 1
            # Ranges of ids that are not sorted may overlap in vain.
            assert ((i, j) in pairs) >= block.any()
            assert ((i, j) in pairs) <= (block.any() or alone or spec is SPECS["pair"])
            if (i, j) in pairs:
                whole = block.all() and (j + 1) * tiles.columns <= S
                assert bool(listed[pairs.index((i, j))] & BORDER) == (not whole)


def test_steps(small_blocks, capsys):
    """Rows of all lengths, heads that do not fill the lanes, NaN behind the length."""
    rng = np.random.default_rng(0)
    for N, K, H in ((6, 3, 64), (4, 2, 128)):
        q = jnp.asarray(rng.standard_normal((3, N, H)), jnp.float32)
        k, v = (jnp.asarray(rng.standard_normal((3, 200, K, H)), jnp.float32) for _ in range(2))
        lengths = jnp.array([200, 0, 130])
        want = attention_step(q, k, v, lengths, implementation="reference")
        k, v = k.at[2, 130:].set(jnp.nan), v.at[2, 130:].set(jnp.nan)
        with interpreted(capsys):
            got = attention_step(q, k, v, lengths, implementation="pallas_tpu")
        assert_close(f"step {H}", want, got, 1e-6)
        assert not np.any(got[1])


def test_a_missing_wait_is_seen(small_blocks, capsys, monkeypatch):
    """dq is fetched while it is being written, when one block of queries is visited twice."""
    monkeypatch.setattr(pallas_tpu_backward.Accumulator, "settle", lambda *_: None)
    x = jnp.ones((1, 128, 1, 64))
    k = jnp.ones((1, 256, 1, 64))
    with pytest.raises(AssertionError, match="RACE"), interpreted(capsys):
        run = functools.partial(attention, causal=False, implementation="pallas_tpu")
        jax.block_until_ready(jax.grad(lambda x: run(x, k, k).sum())(x))


# Only one batch row: the interpreter of jax 0.10.2 and 0.11.2 stumbles over batched kernels.
@pytest.mark.parametrize("spec", ["documents", "window"])
def test_splash_interpreted(spec, monkeypatch, capsys):
    monkeypatch.setattr(splash, "BLOCK", 128)
    jax.clear_caches()
    with interpreted(capsys):
        op_suite.check(SUITE, spec, "splash", "bfloat16")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "splash"])
@pytest.mark.parametrize("dim, dtype", [(64, "bfloat16"), (128, "bfloat16"), (128, "float32")])
def test_exports(implementation, dim, dtype, small_blocks):
    """Mosaic takes the kernels on a host without a TPU."""
    if implementation == "splash" and dtype == "float32":
        pytest.skip("splash is declined in fp32")
    shape = jax.ShapeDtypeStruct
    q, k = (shape((1, 300, heads, dim), dtype) for heads in (4, 2))
    ids = shape((1, 300), jnp.int32)

    def loss(q, k, v, ids):
        o = attention(q, k, v, segment_ids=ids, implementation=implementation)
        return o.astype(jnp.float32).sum()

    text = export(jax.grad(loss, (0, 1, 2)), q, k, k, ids)
    assert text.count("tpu_custom_call") >= 2
    if implementation == "pallas_tpu":
        token, lengths = shape((1, 4, dim), dtype), shape((1,), jnp.int32)
        step = functools.partial(attention_step, implementation=implementation)
        assert "tpu_custom_call" in export(step, token, k, k, lengths)
        traced = lambda q, k, at: attention(q, k, k, q_offset=at, implementation=implementation)  # noqa: E731
        assert "tpu_custom_call" in export(traced, q, k, lengths)


def export(function, *shapes) -> str:
    return jax.export.export(jax.jit(function), platforms=["tpu"])(*shapes).mlir_module()


@pytest.mark.parametrize(
    "kind, want", [("TPU v6 lite", "attention_fwd"), ("TPU v3", "splash"), (None, "splash")]
)
def test_the_device_of_the_mesh_decides(kind, want):
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    device = None if kind is None else AbstractDevice(kind, 1, "tpu")
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda q: attention(q, q, q)).trace(q)
        lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in lowered and want in str(traced.jaxpr)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(
    "implementation, arguments, words",
    [
        ("pallas_tpu", {"dtype": "float16"}, "takes bfloat16 or float32, got float16"),
        ("pallas_tpu", {"dim": 96}, r"needs a head dim in \(64, 128\), got 96"),
        ("pallas_tpu", {"scale": 0.0}, "needs a positive scale, got 0.0"),
        ("splash", {"dtype": "float32"}, "takes bfloat16, got float32"),
        ("splash", {"dim": 80}, r"needs a head dim in \(64, 128, 256\), got 80"),
        ("splash", {"q_offset": np.ones(1, np.int32)}, "needs a static q_offset, got an array"),
        ("splash", {"q_offset": -3}, "needs a q_offset of at least 0, got -3"),
        ("splash", {"pair": True}, "needs ids of one packed row, got ids of .* apart"),
        ("splash", {"causal": False}, "needs a multiple of 128 keys unless causal, got 8"),
    ],
)
def test_declines(implementation, arguments, words):
    arguments = dict(arguments)
    shape = (1, 8, 2, arguments.pop("dim", 64))
    x = jnp.ones(shape, arguments.pop("dtype", "bfloat16"))
    if arguments.pop("pair", False):
        arguments["segment_ids"] = (jnp.ones((1, 8), jnp.int32),) * 2
    with pytest.raises(NotImplementedError, match=f"^{implementation}: {words}$"):
        attention(x, x, x, implementation=implementation, **arguments)


def test_steps_decline():
    for dtype, dim, words in (("float16", 64, "takes bfloat16 or"), ("float32", 80, "head dim in")):
        x = jnp.ones((1, 8, 2, dim), dtype)
        with pytest.raises(NotImplementedError, match=f"^pallas_tpu: .*{words}"):
            attention_step(x[:, 0], x, x, jnp.ones(1, jnp.int32), implementation="pallas_tpu")


def test_a_step_has_a_derivative():
    """That of `xla`: where kernels are chosen, gradients must not be lost."""
    q, caches = jnp.ones((2, 4, 64)), jnp.ones((2, 128, 2, 64))
    lengths = jnp.array([3, 128], jnp.int32)

    def loss(q, implementation):
        return jnp.sum(attention_step(q, caches, caches, lengths, implementation=implementation))

    shape = jax.eval_shape(jax.grad(functools.partial(loss, implementation="pallas_tpu")), q)
    assert shape.shape == q.shape


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3"])
def test_splash_is_not_traced_for_other_devices(kind):
    with pytest.raises(NotImplementedError, match=f"splash: runs on TPU, got {kind}"):
        splash.check_device(kind)
    splash.check_device("TPU v5")
    splash.check_device(None)  # unknown: a program may be lowered for a TPU from here
