"""The Hopper kernels without a GPU: interpreted against float64, compiled for an H100, declined."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mosaic_interpreter import interpreted

from pallas_kernels import GatedDeltaConfig, gated_delta_rule
from pallas_kernels.gated_delta_rule import api, mosaic_gpu, xla
from tests.helpers import assert_close

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


CASES = {
    "ragged_length": Case(T=150),
    "grouped": Case(B=2, T=64, K=2, R=4),
    "repeated": Case(T=192, keys="repeated", decay=0.01),
    "documents": Case(T=256, documents=True),
    "wide": Case(T=192, H=128, documents=True),
    "strong_decay": Case(T=128, decay=40.0),
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


def in_float64(arrays):
    return {n: x if n == "segment_ids" else np.float64(x) for n, x in arrays.items()}


@NEWEST
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, capsys):
    """Outputs and residuals, without races."""
    case = CASES[name]
    arrays = draw(case)
    with jax.enable_x64(True):
        want = gated_delta_rule(**in_float64(arrays), implementation="reference")
        residuals = forward(xla, in_float64(arrays))[2:]
    with interpreted():
        got = gated_delta_rule(**arrays, implementation="mosaic_gpu")
        saved = forward(mosaic_gpu, arrays)
    assert "RACE DETECTED" not in capsys.readouterr().out
    for what, x, y in zip(
        ("o", "state", "t_inv", "states"), (*want, *residuals), saved, strict=True
    ):
        assert_close(f"{name} {what}", np.asarray(x), np.asarray(y, np.float64), 1e-2)
        assert x.shape == y.shape
    for x, y in zip(got, saved, strict=False):
        np.testing.assert_array_equal(x, y)


def forward(implementation, arrays):
    """With residuals, which the op does not return."""
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    ids = arrays.pop("segment_ids", None)
    runs = None if ids is None else api.run_numbers(ids)
    state = arrays.pop("initial_state")
    params = api._params(arrays["q"], arrays["v"], None, None)
    params = dataclasses.replace(params, residuals=True)
    return implementation.forward(params, *arrays.values(), runs, state)


@NEWEST
def test_races_are_seen(capsys, monkeypatch):
    """Without the fence before the inverse is read by TMA, the interpreter complains."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    with interpreted():
        gated_delta_rule(**draw(Case(T=64)), implementation="mosaic_gpu")
    assert "RACE DETECTED" in capsys.readouterr().out
