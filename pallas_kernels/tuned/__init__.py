"""Measured numbers of segments, a file for each kind of device, written by `pallas_kernels.tune`."""
