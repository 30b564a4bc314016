"""Comparisons shared by the tests."""

import numpy as np


def assert_close(name, want, got, rel):
    """Compare arrays by RMS(want - got) / RMS(want), or by RMS(got) alone where want is zero."""
    want = np.asarray(want).astype(np.float64)
    got = np.asarray(got).astype(np.float64)
    assert want.shape == got.shape, f"{name}: expected shape {want.shape}, got {got.shape}"
    assert np.isfinite(got).all(), f"{name}: {int((~np.isfinite(got)).sum())} values are not finite"
    if want.size == 0:
        return
    error, size = np.sqrt(np.mean((want - got) ** 2)), np.sqrt(np.mean(want**2))
    if size > 0:
        error /= size
    assert error <= rel, f"{name}: relative RMS error {error:.3e}, allowed {rel:.1e}"
