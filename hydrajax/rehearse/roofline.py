"""A step's time from what it must compute and move; a model of the machine, not a measurement.

    compute = FLOPs / peak     hbm = bytes / HBM bandwidth     ici = bytes sent / ICI bandwidth

The step takes at least the longest of the three (all overlap) and about their sum when nothing
does. FLOPs are those of the mathematics (`flops.py`), so a model FLOPs utilisation follows; what is
computed twice (remat) or outside of matrix units is not in them.
"""

from dataclasses import dataclass

from hydrajax.rehearse.chips import Chip

ASSUMPTIONS = (
    "FLOPs: hydrajax/flops.py, no recomputation, at the peak of bf16",
    "HBM: bytes of the compiled program, loops included, at the full bandwidth",
    "ICI: ring algorithms that keep all links of a device busy, one direction each",
    "floor: compute, HBM and ICI overlap fully; ceiling: one after the other",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds that one device spends on each resource in one step, at least."""

    compute_s: float
    hbm_s: float
    ici_s: float

    @property
    def floor_s(self) -> float:
        """Step time if everything overlaps."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def ceiling_s(self) -> float:
        """Step time if nothing does."""
        return self.compute_s + self.hbm_s + self.ici_s

    @property
    def bound(self) -> str:
        """The resource that limits the floor."""
        times = {"compute": self.compute_s, "HBM": self.hbm_s, "ICI": self.ici_s}
        return max(times, key=times.get)

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilisation at the ceiling and at the floor."""
        return self.compute_s / self.ceiling_s, self.compute_s / self.floor_s


def roofline(chip: Chip, flops: float, hbm_bytes: float, ici_bytes: float) -> Roofline:
    """Roofline of one device's share of a step."""
    return Roofline(
        flops / chip.peak, hbm_bytes / chip.hbm_bandwidth, ici_bytes / chip.ici_bandwidth
    )
