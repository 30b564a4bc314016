"""TPU kernels compiled for every chip without one: schedules stay below their ceilings."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import static, tpu_schedule

REASON = tpu_schedule.unavailable()
pytestmark = [
    pytest.mark.aot_tpu,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
CASES = {case.name: case for case in static.CASES}

# Cycles of a token-head (`gdn_step`: of a head) that no change may pass, by case and chip: the
# schedules of libtpu 0.0.48 and 0.0.50, whichever is longer, and 3 to 5 %. All kernels for all
# chips, other shapes of them for one.
CEILINGS = {
    "gdn_fwd": {"v5e": 4.7, "v5p": 4.85, "v6e": 4.5, "tpu7x": 4.65},
    "gdn_bwd": {"v5e": 6.3, "v5p": 6.55, "v6e": 5.3, "tpu7x": 5.4},
    "gdn_step": {"v5e": 110, "v5p": 119, "v6e": 91, "tpu7x": 94},
    "gdn_fwd_documents": {"v5e": 4.7},
    "gdn_bwd_documents": {"v6e": 5.4},
    "gdn_fwd_d64": {"v5e": 5.0},
    "gdn_bwd_d64": {"v6e": 6.4},
    "gdn_fwd_c64": {"v6e": 6.3},
    "gdn_bwd_grouped": {"v5e": 6.3},
    "gdn_fwd_f32": {"v5e": 15.5},
    "gdn_bwd_f32": {"v6e": 22},
}


@pytest.mark.parametrize(
    ("name", "chip"), [(name, chip) for name, chips in CEILINGS.items() for chip in chips]
)
def test_cycles(name, chip):
    row = CASES[name].row(chip)
    assert row["cycles"] <= CEILINGS[name][chip], row


def test_the_schedule_of_a_matmul_is_its_rows_through_the_matrix_units():
    def kernel(x, y, o):
        o[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def matmul(x, y):
        out = jax.ShapeDtypeStruct((512, 512), jnp.float32)
        return pl.pallas_call(kernel, out_shape=out, name="tile")(x, y) + 1

    tile = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    for chip, peak in tpu_schedule.MULTIPLY_ADDS.items():
        (schedule,) = tpu_schedule.static_schedule(matmul, tile, tile, chip=chip).values()
        ideal = 512**3 / peak
        assert ideal <= schedule.cycles <= ideal + 350
        assert schedule.slots["MXU"] == schedule.capacity["MXU"] * ideal


def test_wrong_calls_are_named():
    tile = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    with pytest.raises(ValueError, match=r"chip: expected one of \['tpu7x', .*\], got 'v3'"):
        tpu_schedule.static_schedule(jnp.sin, tile, chip="v3")
    with pytest.raises(RuntimeError, match="expected a Pallas kernel in the function"):
        tpu_schedule.static_schedule(jnp.sin, tile, chip="v5e")
