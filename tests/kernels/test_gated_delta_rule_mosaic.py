"""The Hopper kernels without a GPU: interpreted against float64, compiled for an H100, declined."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import GatedDeltaConfig, gated_delta_rule, hopper
from pallas_kernels.gated_delta_rule import api, mosaic_gpu, reference, xla
from pallas_kernels.gated_delta_rule.mosaic_gpu_fold import fold
from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import gate_rows
from pallas_kernels.gated_delta_rule.mosaic_gpu_segments import (
    count_segments,
    count_sweeps,
    reach,
    segment_ends,
    segment_starts,
)
from tests.helpers import assert_close
from tests.kernels import h100
from tests.kernels.mosaic_interpreter import interpreted

NEWEST = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"needs jax >= 0.11, found {jax.__version__}"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; `keys` is random, or repeated: the same key for ever."""

    B: int = 1
    T: int = 130
    K: int = 1
    R: int = 1
    H: int = 64
    keys: str = "random"
    decay: float = 0.2
    documents: bool = False
    segments: int = 0


CASES = {
    "ragged_and_grouped": Case(B=2, T=70, K=1, R=2),
    "repeated": Case(T=128, keys="repeated", decay=0.01),
    "wide": Case(T=128, H=128, documents=True),
    "strong_decay": Case(T=100, decay=40.0),
    "segments": Case(T=300, documents=True, segments=3),
    "forgetting_segments": Case(T=576, decay=1.0, segments=3),  # e^-32 a chunk
}


def draw(case: Case) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    B, T, K, R, H = (getattr(case, name) for name in "BTKRH")
    q, k, v = (rng.normal(size=(B, T, n, H)) for n in (K, K, R))
    if case.keys == "repeated":
        k = np.repeat(k[:, :1], T, 1)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    arrays = {
        "q": q.astype(jnp.bfloat16),
        "k": k.astype(jnp.bfloat16),
        "v": v.astype(jnp.bfloat16),
        "g": -rng.uniform(0, case.decay, (B, T, R)).astype(np.float32),
        "beta": rng.uniform(0.5, 1, (B, T, R)).astype(np.float32),
        "initial_state": rng.normal(size=(B, R, H, H)).astype(np.float32),
    }
    if case.documents:  # several in a chunk, one over a border, an id that comes back
        ids = np.searchsorted([3, 20, 60, 70, 150, T], np.arange(T), side="right") % 3
        arrays["segment_ids"] = np.broadcast_to(ids, (B, T)).astype(np.int32)
    return arrays


@NEWEST
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, capsys, monkeypatch):
    """Outputs and residuals equal those in float64, and nothing races."""
    case = CASES[name]
    if case.segments:
        monkeypatch.setattr(mosaic_gpu, "choose_segments", lambda *_: case.segments)
    arrays = draw(case)
    with jax.enable_x64(True):
        exact = {n: x if n == "segment_ids" else np.float64(x) for n, x in arrays.items()}
        want = forward(reference, exact), forward(xla, exact)[2:]
    with interpreted():
        got = forward(mosaic_gpu, arrays)
    assert "RACE DETECTED" not in capsys.readouterr().out
    for what, x, y in zip(("o", "state", "t_inv", "states"), sum(want, ()), got, strict=True):
        assert_close(f"{name} {what}", np.asarray(x), np.asarray(y, np.float64), 1e-2)


def forward(implementation, arrays):
    """With residuals, which the op does not return; the reference has none."""
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    ids = arrays.pop("segment_ids", None)
    runs = None if ids is None else api.run_numbers(ids)
    params, state = params_of(arrays, residuals=True), arrays.pop("initial_state")
    run = getattr(implementation, "apply" if implementation is reference else "forward")
    return jax.jit(functools.partial(run, params))(*arrays.values(), runs, state)


def params_of(arrays, residuals):
    q, v = arrays["q"], arrays["v"]
    scale = q.shape[-1] ** -0.5
    return api.GatedDeltaParams(
        scale, GatedDeltaConfig(chunk=64), q.shape, v.shape, q.dtype, residuals
    )


@NEWEST
@pytest.mark.parametrize("backward", [False, True])
def test_maps_are_applied_without_rounding_them(backward, capsys):
    """Three maps in a row, with bf16 operands, are as good as in fp32."""
    rng = np.random.default_rng(0)
    added, factors = rng.normal(size=(4, 1, 1, 64, 64)), rng.normal(size=(5, 1, 1, 64, 64)) / 8
    added, factors = (x.astype(np.float32) for x in (added, factors))
    want = np.float64(added)
    for n in (2, 1, 0) if backward else (1, 2, 3):
        m = np.float64(factors[2 + n]).swapaxes(-1, -2) if backward else np.float64(factors[1 + n])
        want[n] += want[n + 1 if backward else n - 1] @ m
    with interpreted():
        got = fold(*map(jnp.asarray, (added, factors)), 4, 2, jnp.bfloat16, backward)
    assert "RACE DETECTED" not in capsys.readouterr().out
    assert_close("folded", want, np.float64(got), 1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_a_segment_reaches_as_far_as_its_decay(backward):
    """Two segments of four chunks and one of three, against the sums written out."""
    rng = np.random.default_rng(0)
    logs = -rng.uniform(0, 40, (11, 2, 3))
    logs[[3, 4, 9], 0, 0] = -np.inf  # a document ends
    logs[:, 1, 1] = 0.0
    got = reach(jnp.exp(jnp.float32(logs)), 3, backward)
    whole = np.concatenate([logs, np.zeros((1, 2, 3))]).reshape(3, 4, 2, 3)
    beyond = [whole[:, :i] if backward else whole[:, i:] for i in range(5)]
    want = sum(np.sum(x, 1) >= -64 * np.log(2) for x in beyond)
    np.testing.assert_array_equal(got, want)
    assert set(want.ravel()) >= {1, 2, 4, 5}


@NEWEST
def test_what_a_segment_forgets_is_not_read(monkeypatch):
    """Values that are no numbers, and gradients of such outputs, where nothing of them is left."""
    arrays = draw(Case(T=576, decay=1.0))
    q, k, v, g, beta, state = map(jnp.asarray, arrays.values())
    gates = gate_rows(64, g, beta, None)
    with interpreted():
        t_inv = mosaic_gpu.prepare(k, gates)
        early, late = v.at[:, :64].set(jnp.nan), v.at[:, 320:384].set(jnp.nan)
        starts = segment_starts(k, early, gates, t_inv, state, 3)
        ends = segment_ends(1.0, q, k, late, gates, t_inv, state, 3)
    assert np.isfinite(starts).all() and np.isfinite(ends).all()


@NEWEST
def test_the_op_without_residuals_equals_the_op_with_them():
    arrays = draw(Case(T=70))
    with interpreted():
        got = gated_delta_rule(**arrays, implementation="mosaic_gpu")
        want = forward(mosaic_gpu, arrays)
    for x, y in zip(got, want, strict=False):
        np.testing.assert_array_equal(x, y)


@NEWEST
def test_races_are_seen(capsys, monkeypatch):
    """The interpreter complains where nothing orders a store and the TMA that reads it."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    said = ""
    try:
        with interpreted():
            forward(mosaic_gpu, draw(Case(T=64)))
    except jax.errors.JaxRuntimeError as error:  # since jax 0.12; before, it is printed
        said = str(error)
    assert "RACE DETECTED" in said + capsys.readouterr().out


@NEWEST
@pytest.mark.aot_gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_compiled_for_an_h100(dim, monkeypatch, capfd):
    """Nothing spills, all kernels fit, with and without residuals."""
    monkeypatch.setattr(mosaic_gpu, "choose_segments", lambda *_: 3)
    arrays = draw(Case(T=500, R=2, H=dim))
    kernels = []
    for residuals in (False, True):
        run = functools.partial(mosaic_gpu.forward, params_of(arrays, residuals))
        q, k, v, g, beta, state = arrays.values()
        found = h100.resources(run, (q, k, v, g, beta, None, state), monkeypatch, capfd)
        segments = {"gdn_segment_maps", "gdn_segment_fold"}
        assert found.keys() == segments | {"gdn_prepare", "gdn_recurrence"}
        kernels += found.values()
    for spilled, shared in kernels:
        assert spilled == 0 and shared <= h100.SHARED_MEMORY


H100 = "NVIDIA H100 80GB HBM3"


@NEWEST
@pytest.mark.parametrize("kind, taken", [(H100, True), ("NVIDIA B200", False)])
def test_the_device_of_the_mesh_decides(kind, taken):
    """It is taken by the table for a Hopper mesh alone, and lowered for no device but CUDA's."""
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 132, "gpu"))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in draw(Case()).items()}
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda x: gated_delta_rule(**x)[0]).trace(shapes)
    assert ("gdn_recurrence" in str(traced.jaxpr)) == taken
    assert "gdn_recurrence" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@NEWEST
@pytest.mark.parametrize(
    "name, value, words",
    [
        ("dtype", jnp.float32, "takes bfloat16, got float32"),
        ("H", 96, r"dims in \(64, 128\), got \(96, 96\)"),
        ("chunk", 32, "needs chunks of 64, got 32"),
    ],
)
def test_declines(name, value, words):
    arrays = draw(Case(T=64, H=value if name == "H" else 64))
    if name == "dtype":
        arrays |= {n: arrays[n].astype(value) for n in "qkv"}
    config = GatedDeltaConfig(chunk=value if name == "chunk" else 64)
    with pytest.raises(NotImplementedError, match=f"^mosaic_gpu: .*{words}$"):
        gated_delta_rule(**arrays, config=config, implementation="mosaic_gpu")


def test_declines_an_old_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    words = r"mosaic_gpu: needs jax >= 0.11 \(Python >= 3.12\), found 0.10.2"
    with pytest.raises(NotImplementedError, match=f"^{words}$"):
        gated_delta_rule(**draw(Case(T=64)), implementation="mosaic_gpu")


@pytest.mark.parametrize("kind", [None, "cpu", "NVIDIA A100-SXM4-40GB", "NVIDIA B200"])
def test_declines_other_devices(kind):
    with pytest.raises(NotImplementedError, match=rf"^mosaic_gpu: runs on Hopper .*, got {kind}$"):
        hopper.check_device(kind)


@pytest.mark.parametrize("heads, chunks, dim", [(448, 8, 64), (128, 64, 128), (16, 512, 128)])
@pytest.mark.parametrize("count", [count_segments, count_sweeps])
def test_segments_fill_the_chip_and_cover_the_sequence(count, heads, chunks, dim):
    n = count(heads, chunks, dim)
    assert (n - 1) * -(-chunks // n) < chunks
    assert (n > 1) == (heads == 16)


def test_every_short_sequence_has_full_segments():
    """All but the last one have the same length, which the maps rely on, and none is empty."""
    counts = count_segments, count_sweeps
    for count, heads, chunks in itertools.product(counts, (1, 2, 3, 16, 40), range(1, 70)):
        n = count(heads, chunks, 128)
        assert n >= 1 and (n - 1) * -(-chunks // n) < chunks
