"""Measured numbers of segments, a file for each kind of device; `pallas_kernels.tune` writes it."""
