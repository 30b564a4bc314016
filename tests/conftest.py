"""Every test on eight fake CPU devices, also where a GPU or TPU is; its own by `pytest -m gpu`.

One accelerator has no room for several workers, no second device for meshes, and TF32 for float32.
"""

import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    # Compiling is nearly all the time tests take, and tiny models gain nothing from it.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest


def pytest_configure(config):
    """Before any backend is made; processes that tests start inherit it."""
    if not re.search(r"(?<!not )\b(gpu|tpu)\b", config.option.markexpr):
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")


def pytest_collection_modifyitems(items):
    """`gpu` and `tpu` tests run where they are asked for and such a device is."""
    platform = jax.devices()[0].platform
    for item in items:
        for kind in ("gpu", "tpu"):
            if item.get_closest_marker(kind) and platform != kind:
                reason = f"pytest -m {kind} runs it where one is, found {platform}"
                item.add_marker(pytest.mark.skip(reason=reason))
