"""What every Mosaic GPU kernel for NVIDIA Hopper asks of jax and of the chip, and its memory.

Mosaic GPU, not the same in every jax, is imported where a kernel is built.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import decline

__all__ = [
    "CHIPS",
    "NAME",
    "check_device",
    "check_version",
    "hidden_zero",
    "matrix",
    "parameters",
    "slot_of",
]

NAME = "mosaic_gpu"
CHIPS = ("H100", "H200", "H20", "H800", "GH200")


def check_version() -> None:
    """Decline below jax 0.11."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(
            f"{NAME}: needs jax >= 0.11 (Python >= 3.12), found {jax.__version__}"
        )


def check_device(kind: str | None) -> None:
    """Decline what is not Hopper; None is a device that is not known while tracing."""
    if kind is None or not set(CHIPS) & set(kind.split()):
        raise decline(NAME, f"runs on Hopper ({', '.join(CHIPS)})", kind)


def matrix(dtype, *shape):
    """Shared memory for matrices in the layout that wgmma and TMA read."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = jnp.dtype(dtype).itemsize
    width = min(shape[-1], 128 // size)
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * size))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def slot_of(i, slots: int):
    """The slot of step i."""
    return jax.lax.rem(i, jnp.array(slots, i.dtype))


def hidden_zero(own, i):
    """0 by the number of a block or warpgroup and of a step, which the compiler cannot know.

    As an index it keeps the compiler from holding the addresses of all operands in registers from
    step to step, and from spilling. The sum of 2^14 `own` and i is below 2^28.
    """
    return jax.lax.shift_right_logical((own << 14) + i, 28)


def parameters(barriers: bool = False):
    """Of the compiler; with `barriers` it puts some around every store to shared memory and before
    every copy, which what does little else does not feel.

    Our longer kernels say themselves where the four warps of a warpgroup wait for each other, by
    `commit_smem`, `wait_smem_to_gmem` or a barrier at which all threads arrive. One is due wherever
    memory is read and then written: between a product and the store that replaces its operand, as
    each warp waits for its own rows of the product alone, and between a load and a store, unless
    both have the same layout, so that every warp writes what it has read itself.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=not barriers,
    )
