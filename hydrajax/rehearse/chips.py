"""Limits of one JAX device of each kind, for the roofline; peak FLOP/s are those of `flops`.

    source: docs.cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x (read in 2026)
    ICI     a page gives both directions of all links of a chip; a device sends half of that
    TPU7x   a chip is two devices: half a chip each

The usable HBM is a little less than the data sheet says; where it matters the compiler judges.
"""

from dataclasses import dataclass

from hydrajax.flops import peak_flops
from hydrajax.typing import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Bytes, bytes/s and FLOP/s of one device."""

    kind: str
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float  # sent, over all links of the device

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        return peak_flops(self.kind)


CHIPS = (
    Chip("TPU v5 lite", 16 * GIB, 819e9, 400e9 / 2),
    Chip("TPU v5", 95 * GIB, 2765e9, 1200e9 / 2),
    Chip("TPU v6 lite", 32 * GIB, 1638e9, 800e9 / 2),
    Chip("TPU7x", 192 * GIB / 2, 7380e9 / 2, 1200e9 / 2 / 2),
)


def chip_of(device_kind: str) -> Chip:
    """The row of a device kind, as JAX spells it."""
    for chip in CHIPS:
        if chip.kind == device_kind:
            return chip
    raise UserError(
        f"devices of kind {device_kind!r} are not in the table of hydrajax/rehearse/chips.py, "
        f"which knows {', '.join(chip.kind for chip in CHIPS)}."
    )
