"""Eight fake CPU devices for every test, and skips with reasons for absent hardware."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Compiling is nearly all the time tests take, and tiny models gain nothing from it.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest


def pytest_collection_modifyitems(items):
    """`gpu` and `tpu` tests run where such a device is."""
    platform = jax.devices()[0].platform
    for item in items:
        for kind in ("gpu", "tpu"):
            if item.get_closest_marker(kind) and platform != kind:
                item.add_marker(pytest.mark.skip(reason=f"needs a {kind}, found {platform}"))
