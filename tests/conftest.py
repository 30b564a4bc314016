"""Every test on eight fake CPU devices, also where a GPU or TPU is; its own by `pytest -m gpu`.

One accelerator has no room for several workers, no second device for meshes, and TF32 for float32.
"""

import os

import pytest

CPU = (
    " --xla_force_host_platform_device_count=8"
    # Compiling is nearly all the time tests take, and tiny models gain nothing from it.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)


def pytest_configure(config):
    """Before jax is there; processes that tests start inherit it."""
    asked = config.option.markexpr.split()
    if not asked or not {*asked} <= {"gpu", "tpu", "or"}:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + CPU


def pytest_collection_modifyitems(items):
    """`gpu` and `tpu` tests run where they alone are asked for and such a device is."""
    import jax

    platform = jax.devices()[0].platform
    for item in items:
        for kind in ("gpu", "tpu"):
            if item.get_closest_marker(kind) and platform != kind:
                reason = f"needs a {kind} and pytest -m {kind}, found {platform}"
                item.add_marker(pytest.mark.skip(reason=reason))
