"""How the Triton kernels are called: through jax-triton, for the device of the mesh in use.

jax-triton asks the machine's first GPU what to compile for, unless told. Where the kind of the mesh
in use is known its compute capability is told, so that a program can be compiled on a machine
without a GPU.
"""

import os
import re

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import decline, device_kind

NAME = "triton_gpu"
# Words in the names of the kinds that each compute capability has: "NVIDIA A100-SXM4-40GB".
CAPABILITIES = {
    80: "A100 A800 A30",
    86: "A2 A10 A10G A10M A16 A40 A2000 A4000 A4500 A5000 A5500 A6000 3050 3060 3070 3080 3090",
    89: "L2 L4 L20 L40 L40S L40G Ada 4050 4060 4070 4080 4090",
}


def capability(kind: str | None) -> int | None:
    """Return 80, 86 or 89 for a kind of Ampere or Ada device, None for any other."""
    words = set(re.split(r"\W+", kind or ""))
    return next((n for n, names in CAPABILITIES.items() if words & set(names.split())), None)


def jax_triton():
    """Import jax-triton, which needs a CUDA build of jax; decline without."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
    except (ImportError, AttributeError) as error:  # the latter from a jax newer than it
        raise decline(NAME, "needs jax-triton beside a CUDA build of jax", error) from None
    # Importing it empties this variable, and other users of Triton in the process would fail.
    if cache is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = cache
    if not (0, 3) <= getattr(jax_triton, "__version_info__", ()) < (0, 4):
        raise decline(NAME, "needs jax-triton 0.3", getattr(jax_triton, "__version__", "none"))
    return jax_triton


def tiling(dtype, H: int, E: int) -> dict[str, int | str]:
    """Warps of a block, W columns of a tile, and how operands are multiplied.

    fp32 operands follow `jax_default_matmul_precision`: TF32 unless that asks for fp32, for which
    Triton adds three products of TF32 parts.
    """
    wide = dtype == jnp.float32
    exact = jax.config.jax_default_matmul_precision in ("highest", "float32", "F32_F32_F32")
    return {
        "warps": 8 if wide or max(H, E) > 64 else 4,
        "W": 16 if wide else 32,
        "HOW": "tf32x3" if wide and exact else "tf32",
    }


def launch(kernel, operands, outputs, grid, warps, aliases=None, **constants):
    """Call a kernel on arrays and numbers, then outputs; `constants` are its `tl.constexpr`.

    `stages` among them is how far Triton fetches ahead in loops; `aliases` are
    {operand: output} that share memory.
    """
    return jax_triton().triton_call(
        *operands,
        kernel=kernel,
        out_shape=outputs,
        grid=grid,
        name=kernel.__name__,
        num_warps=warps,
        num_stages=constants.pop("stages", 1),
        compute_capability=capability(device_kind()),
        input_output_aliases=aliases,
        **constants,
    )
