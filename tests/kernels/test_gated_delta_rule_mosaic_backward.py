"""The Hopper backward without a GPU: interpreted against float64, and compiled for an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gated_delta_rule
from pallas_kernels.gated_delta_rule import (
    api,
    mosaic_gpu_backward,
    mosaic_gpu_gradients,
    xla,
)
from pallas_kernels.gated_delta_rule.arg_specs import GatedDeltaArgs
from tests.helpers import assert_close
from tests.kernels import h100
from tests.kernels.mosaic_interpreter import interpreted

NEWEST = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"needs jax >= 0.11, found {jax.__version__}"
)
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
DOCUMENTS = ((1, 3), (2, 50), (1, 30), (3, 1), (4, 44), (0, 2))  # a border at 128, too

CASES = {
    "ragged_grouped": GatedDeltaArgs(shape=(2, 70, 1, 2, 64, 64)),
    "documents": GatedDeltaArgs(shape=(1, 130, 1, 1, 64, 64), documents=DOCUMENTS),
    "repeated": GatedDeltaArgs(
        shape=(1, 128, 1, 1, 64, 64), keys="repeated", beta=(0.9, 0.98), gate=(0.0, -0.1)
    ),
    "extreme": GatedDeltaArgs(
        shape=(1, 128, 1, 1, 64, 64), beta=(0.0, 1.0), gate=(0.0, -0.1, -40.0)
    ),
    "segments": GatedDeltaArgs(
        shape=(1, 300, 1, 1, 64, 64), documents=((1, 280), (2, 20)), gate=(0.0, -0.1)
    ),
    "forgetting_segments": GatedDeltaArgs(shape=(1, 576, 1, 1, 64, 64), gate=(-0.1, -1.0)),
    "wide": GatedDeltaArgs(shape=(1, 190, 1, 1, 128, 128), keys="correlated"),
    "wide_documents": GatedDeltaArgs(shape=(1, 130, 1, 2, 128, 128), documents=DOCUMENTS),
}
# Of 2, 2 and 1 chunks, a document over both borders; of 3, of which 2 are felt.
SEGMENTS = {"segments": 3, "forgetting_segments": 3}
BLOCK = {"wide": 3, "wide_documents": 2}  # chunks of a block, of three
HARD = {
    "wide_slow": GatedDeltaArgs(shape=(1, 128, 1, 1, 128, 128), gate=(-5e-4, -1e-3, -2e-3)),
    "wide_repeated": GatedDeltaArgs(
        shape=(1, 128, 1, 1, 128, 128), keys="repeated", gate=(-5e-4, -1e-3, -2e-3)
    ),
}
# What the past holds along a key that is repeated is overwritten whatever its decay: dg is the
# small rest of large terms, and fp32 loses two digits of it, as everywhere.
CANCELS = {("repeated", "g"): 100}


def draw(case):
    """Arguments and cotangents whose values are exact in bf16."""
    rng = np.random.default_rng(0)
    arrays = case.arrays(rng)
    B, T, _, R, H, E = case.shape
    arrays["initial_state"] = rng.standard_normal((B, R, H, E))
    cotangents = rng.standard_normal((B, T, R, E)), rng.standard_normal((B, R, H, E))
    ids = arrays.pop("segment_ids")
    rounded = {n: x.astype(jnp.bfloat16).astype(np.float64) for n, x in arrays.items()}
    cotangents = [x.astype(jnp.bfloat16).astype(np.float64) for x in cotangents]
    return rounded, ids, cotangents


@functools.cache
def truth(name):
    """Gradients of the token loop in float64."""
    arrays, ids, cotangents = draw(_case(name))

    def outputs(arrays):
        return gated_delta_rule(**arrays, segment_ids=ids, implementation="reference")

    with jax.enable_x64(True):
        cotangents = tuple(map(jnp.asarray, cotangents))
        return jax.jit(lambda x: jax.vjp(outputs, x)[1](cotangents)[0])(arrays)


def gradients(name, dtype, of_xla=False):
    """Of the interpreted kernels, with the residuals of xla, or all of xla."""
    arrays, ids, (do, dstate) = draw(_case(name))
    wide = {"q", "k", "v"}
    x = {n: jnp.asarray(a, dtype if n in wide else jnp.float32) for n, a in arrays.items()}
    runs = None if ids is None else api.run_numbers(jnp.asarray(ids))
    operands = (*(x[n] for n in NAMES[:-1]), runs, x["initial_state"])
    params = api.GatedDeltaParams(
        x["q"].shape[-1] ** -0.5,
        api.GatedDeltaConfig(chunk=64),
        x["q"].shape,
        x["v"].shape,
        dtype,
        True,
    )
    t_inv, states = xla.forward(params, *operands)[2:]
    cotangents = jnp.asarray(do, dtype), jnp.asarray(dstate, jnp.float32)
    operands = (*operands, t_inv, states, *cotangents)
    if of_xla:
        return dict(zip(NAMES, xla.backward(params, *operands), strict=True))
    with interpreted(), pytest.MonkeyPatch.context() as patch:
        count = SEGMENTS.get(name, 1)
        patch.setattr(mosaic_gpu_backward, "choose_segments", lambda *_: count)
        patch.setattr(mosaic_gpu_gradients, "block_length", lambda *_: BLOCK.get(name, 1))
        results = mosaic_gpu_backward.backward(params, *operands)
    return dict(zip(NAMES, results, strict=True))


def _case(name):
    return (CASES | HARD)[name]


@NEWEST
@pytest.mark.parametrize("name", CASES)
def test_in_float32(name, capsys):
    """The kernels' mathematics, exactly, and no races: interpreted operands may be fp32."""
    got = gradients(name, jnp.float32)
    assert "RACE DETECTED" not in capsys.readouterr().out
    for of, want in truth(name).items():
        rel = 3e-6 * CANCELS.get((name, of), 1)
        assert_close(f"{name} d_{of}", want, got[of], rel)


@NEWEST
@pytest.mark.parametrize("name", ["documents", "wide"])
def test_in_bfloat16(name):
    """What the device computes, as far as the interpreter goes."""
    got = gradients(name, jnp.bfloat16)
    for of, want in truth(name).items():
        assert_close(f"{name} d_{of}", want, got[of], 1.2e-2)


@NEWEST
@pytest.mark.parametrize("name", HARD)
def test_the_gradient_of_the_decay_is_as_exact_as_that_of_xla(name, capsys):
    """Where it is the rest of large terms; and the warpgroups' sums over rows do not race."""
    kernel, plain = (gradients(name, jnp.bfloat16, of_xla)["g"] for of_xla in (False, True))
    assert "RACE DETECTED" not in capsys.readouterr().out
    want = np.asarray(truth(name)["g"])
    kernel, plain = (np.sqrt(np.mean((np.float64(x) - want) ** 2)) for x in (kernel, plain))
    assert kernel < 1.5 * plain, f"{name}: RMS error {kernel:.2e}, of xla {plain:.2e}"


@NEWEST
def test_races_are_seen(capsys, monkeypatch):
    """Without fences between stores to shared memory and their readers, the interpreter objects."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    said = ""
    try:
        gradients("extreme", jnp.float32)
    except jax.errors.JaxRuntimeError as error:  # since jax 0.12; before, it is printed
        said = str(error)
    assert "RACE DETECTED" in said + capsys.readouterr().out


@NEWEST
@pytest.mark.aot_gpu
@pytest.mark.parametrize("H", [64, 128])
def test_compiles_for_hopper(H, monkeypatch, capfd):
    """No register is spilled and a block's shared memory suffices."""
    monkeypatch.setattr(mosaic_gpu_backward, "choose_segments", lambda *_: 3)
    monkeypatch.setattr(mosaic_gpu_gradients, "block_length", lambda *_: 4)
    B, T, K, R, Z, C = 2, 600, 2, 4, 10, 64
    params = api.GatedDeltaParams(
        1.0, api.GatedDeltaConfig(chunk=64), (B, T, K, H), (B, T, R, H), jnp.bfloat16, True
    )

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    gate, state = array(B, T, R, dtype=jnp.float32), array(B, R, H, H, dtype=jnp.float32)
    key, value = array(B, T, K, H), array(B, T, R, H)
    operands = (key, key, value, gate, gate, array(B, T, dtype=jnp.int32), state)
    residuals = array(Z, B, R, C, C), array(Z, B, R, H, H)
    backward = functools.partial(mosaic_gpu_backward.backward, params)
    found = h100.resources(backward, (*operands, *residuals, value, state), monkeypatch, capfd)
    sweeps = {"gdn_segment_sweep", "gdn_segment_maps", "gdn_segment_fold", "gdn_sweep"}
    assert found.keys() == sweeps | {"gdn_gradients"}
    for name, (spills, shared) in found.items():
        assert spills == 0, f"{name}: {spills} bytes spilled"
        assert shared <= h100.SHARED_MEMORY, f"{name}: {shared} bytes of shared memory"


@pytest.mark.parametrize(
    "chunks, heads, turns", [(64, 128, 64), (512, 16, 64), (64, 112, 64), (1, 3, 1)]
)
def test_blocks_of_chunks_come_out_even(chunks, heads, turns):
    """The chip's 132 processors are busy to the end, or nearly so."""
    length = mosaic_gpu_gradients.block_length(chunks, heads)
    blocks = -(-chunks // length) * heads
    assert -(-blocks // 132) * length <= turns
