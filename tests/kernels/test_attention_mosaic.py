"""Attention on Hopper without a GPU: interpreted against float64, compiled, declined, its walks.

The interpreter takes a warpgroup for one thread and does not add in device memory: what its warps
race for, and dQ as it is really added up, only a GPU shows (`test_hopper_gpu.py`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import attention
from pallas_kernels.attention import mosaic_gpu, mosaic_gpu_backward, reference
from pallas_kernels.attention.api import AttentionParams
from pallas_kernels.attention.arg_specs import SPECS, AttentionArgs
from pallas_kernels.attention.mosaic_gpu_tiles import KEYS, QUERIES
from pallas_kernels.rows import run_numbers
from tests.kernels import h100, op_suite
from tests.kernels.mosaic_interpreter import interpreted
from tests.kernels.test_attention import OP

NEWEST = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"needs jax >= 0.11, found {jax.__version__}"
)
LONG = ((1, 140), (2, 5), (1, 111), (3, 1), (2, 43))  # over borders of tiles, an id that comes back
CASES = {
    "causal": AttentionArgs(shape=(1, 300, 300, 2, 1, 64)),
    "wide": AttentionArgs(shape=(1, 300, 300, 2, 2, 128), documents=LONG),
    "full": AttentionArgs(shape=(1, 140, 200, 2, 1, 64), causal=False),
    "window": AttentionArgs(shape=(1, 300, 300, 1, 1, 64), window=100, documents=LONG),
    "offset_by_row": AttentionArgs(shape=(2, 70, 300, 2, 1, 64), q_offset=(150, 3)),
    "nothing_to_see": AttentionArgs(shape=(2, 70, 140, 1, 1, 128), q_offset=(-30, -100)),
}


@pytest.fixture
def interpreter(monkeypatch):
    """The interpreter does not add in device memory: every block of keys has a dQ of its own."""
    apart = functools.partial(mosaic_gpu_backward.backward, apart=True)
    monkeypatch.setattr(mosaic_gpu_backward, "backward", apart)
    jax.clear_caches()
    with interpreted():
        yield
    jax.clear_caches()


@NEWEST
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreter, capsys):
    """Outputs and gradients equal those in float64, and nothing races."""
    op = dataclasses.replace(OP, specs=CASES)
    op_suite.check(op, name, "mosaic_gpu", "bfloat16")
    assert "RACE DETECTED" not in capsys.readouterr().out


@NEWEST
@pytest.mark.parametrize(
    "kind, taken", [("NVIDIA H100 80GB HBM3", True), ("NVIDIA A100-SXM4-40GB", False)]
)
def test_the_device_of_the_mesh_decides(kind, taken):
    """It is taken by the table for a Hopper mesh alone, and lowered for no device but CUDA's."""
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 132, "gpu"))
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(attention).trace(x, x, x)
    assert ("attention_forward" in str(traced.jaxpr)) == taken
    assert "attention_forward" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def params_of(shape, **changes):
    B, T, S, N, K, H = shape
    values = dict(
        scale=H**-0.5,
        causal=True,
        window=None,
        q_offset=0,
        segmented=False,
        paired=False,
        ordered=True,
        shape_q=(B, T, N, H),
        shape_k=(B, S, K, H),
        dtype=jnp.dtype(jnp.bfloat16),
    )
    return AttentionParams(**values | changes)


@pytest.mark.parametrize("name", [n for n in SPECS if n != "document_pair"] + list(CASES))
def test_ranges_are_the_mask(name):
    """Every implementation's mask, seen keys of a query in one range."""
    spec = (SPECS | CASES)[name]
    arrays = spec.arrays(np.random.default_rng(0))
    _, T, S, _, _, _ = spec.shape
    ids = None if arrays["kv_ids"] is None else run_numbers(jnp.asarray(arrays["kv_ids"]))
    static = isinstance(spec.q_offset, int)
    offset = None if static else jnp.asarray(arrays["q_offset"])
    params = params_of(
        spec.shape,
        causal=spec.causal,
        window=spec.window,
        q_offset=spec.q_offset if static else None,
    )
    first, end = mosaic_gpu.ranges(params, ids, ids, offset)
    positions = reference.positions
    want = reference.visible(params, ids, ids, offset, positions(T), positions(S))
    at = np.arange(S)
    got = (at >= np.asarray(first)[..., None]) & (at < np.asarray(end)[..., None])
    np.testing.assert_array_equal(np.broadcast_to(want, got.shape), got)


def test_ranges_of_a_part_of_the_queries():
    """As `context.gather_keys` makes them: run numbers of the whole row, and an offset."""
    spec = SPECS["documents"]
    runs = run_numbers(jnp.asarray(spec.arrays(np.random.default_rng(0))["kv_ids"]))
    offset = jnp.full((2,), 40, jnp.int32)
    params = params_of((2, 35, 75, 4, 2, 64), q_offset=None)
    whole = mosaic_gpu.ranges(params_of((2, 75, 75, 4, 2, 64)), runs, runs, None)
    part = mosaic_gpu.ranges(params, runs[:, 40:], runs, offset)
    for x, y in zip(whole, part, strict=True):
        np.testing.assert_array_equal(x[:, 40:], y)


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("kind", ["documents", "random", "one_document"])
def test_walks_and_spans_hold_what_is_seen(tile, kind):
    """No block that is seen is left out, none that all see needs a mask, none is idle."""
    rng, T, S = np.random.default_rng(0), 512, 640
    first = rng.integers(0, S, (3, T))
    end = np.minimum(first + rng.integers(-3, 200, (3, T)), S)
    if kind == "one_document":  # of which the first keys fell out of the window of the last
        first, end = (np.tile(x, (3, 1)) for x in (np.arange(T) // 7, np.arange(1, T + 1)))
    if kind == "documents":
        starts = np.sort(rng.integers(0, T, (3, 9)), 1)
        starts[:, 0] = 0
        of_row = np.stack([row[np.searchsorted(row, np.arange(T), "right") - 1] for row in starts])
        first, end = of_row, np.tile(np.arange(1, T + 1), (3, 1))
    blocks = S // KEYS
    keys = np.arange(S)
    seen = (keys >= first[..., None]) & (keys < end[..., None])
    by_block = seen.reshape(3, T, blocks, KEYS)
    first, end = jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32)
    walks = np.asarray(mosaic_gpu.walks(first, end))
    for b, i in np.ndindex(3, T // QUERIES):
        rows = by_block[b, i * QUERIES : (i + 1) * QUERIES]
        begin, opened, closed, stop = walks[b, i]
        some, every = rows.any((0, 2)), rows.all((0, 2))
        inside = (np.arange(blocks) >= begin) & (np.arange(blocks) < stop)
        assert not (some & ~inside).any()
        whole = list(np.arange(blocks)[every])
        assert list(range(opened, closed)) == whole
        assert kind != "one_document" or i < 2 or whole
        if kind == "documents":
            assert some[begin] and some[stop - 1]
    spans = np.asarray(mosaic_gpu.spans(tile, blocks, first, end))
    for b, c in np.ndindex(3, blocks):
        some = by_block[b, :, c].reshape(-1, tile, KEYS).any((1, 2))
        low, high = spans[b, c]
        inside = (np.arange(T // tile) >= low) & (np.arange(T // tile) < high)
        assert not (some & ~inside).any()
        if kind == "documents" and high > low:
            assert some[low:high].all()


@NEWEST
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiled_for_an_h100(head_dim, monkeypatch, capfd):
    """No spills, and room in shared memory."""
    shape = jax.ShapeDtypeStruct
    q = shape((1, 1000, 4, head_dim), jnp.bfloat16)
    k = shape((1, 1000, 2, head_dim), jnp.bfloat16)

    def gradients(q, k, v):
        run = functools.partial(attention, implementation="mosaic_gpu")
        return jax.vjp(run, q, k, v)[1](q)

    found = h100.resources(gradients, (q, k, k), monkeypatch, capfd)
    assert found.keys() == {"attention_forward", "attention_backward"}
    for name, (spills, shared) in found.items():
        assert spills == 0, name
        assert shared <= h100.SHARED_MEMORY, name


@NEWEST
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": jnp.dtype(jnp.float32)}, "takes bfloat16, got float32"),
        ({"shape_q": (1, 8, 2, 96)}, r"needs a head dim in \(64, 128\), got 96"),
        ({"scale": -1.0}, "needs a positive scale, got -1"),
        ({"segmented": True, "ordered": False}, "needs documents in order, got a pair"),
    ],
)
def test_declines(changes, words):
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu: {words}"):
        mosaic_gpu.check(params_of((1, 8, 8, 2, 2, 64), **changes))
