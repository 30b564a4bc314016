"""Compile for an H100 on a machine without a GPU, and read what ptxas says about the kernels."""

import pathlib
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGET = pathlib.Path(__file__).parents[1] / "h100.txtpb"
SHARED_MEMORY = 232_448  # bytes of a block


def topology():
    """One H100 to compile for; skips, with the reason, where jax has no CUDA plugin."""
    try:
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=TARGET.read_text(), topology="1x1x1"
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"no CUDA plugin of jax to compile with: {error}")


def compiled(function, operands, **options):
    """The program for one H100; `options` are those of `jax.jit`."""
    devices = np.array(topology().devices)
    sharding = NamedSharding(Mesh(devices, ("x",)), PartitionSpec())
    operands = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), operands
    )
    return jax.jit(function, **options).lower(*operands).compile()


def resources(function, operands, monkeypatch, capfd) -> dict[str, tuple[int, int]]:
    """Kernel name -> bytes of spills, bytes of shared memory."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_RESOURCES", "1")
    capfd.readouterr()
    compiled(function, operands)
    out, err = capfd.readouterr()
    text = out + err
    names = re.findall(r"Function properties for (\w+)_mosaic_gpu_kernel", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads\nptxas info", text)
    shared = re.findall(r"smem_scratch_bytes=(\d+)", text)
    sizes = [(int(a) + int(b), int(c)) for (a, b), c in zip(spills, shared, strict=True)]
    return dict(zip(names, sizes, strict=True))
