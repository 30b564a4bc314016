"""Run Hopper kernels on the CPU: jax's interpreter, told how to do what it does not know.

It has no `wgmma` whose left operand is in registers, and no `run_state`, which starts accumulators
from a value. Here every warpgroup passes the operand through shared memory of its own, at most
[64, 128], and the value is added after the product.

Nor does it know what the warpgroups of a block share on the device behind the scenes: the scratch
of a sum over the rows of a tile. Here such a sum passes through shared memory too, and sums that no
barrier orders race.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl


@contextlib.contextmanager
def interpreted():
    """Everything traced inside is interpreted, with race detection."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def transforms(dtype):
        width = 128 // jnp.dtype(dtype).itemsize
        return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)

    kernel, over_refs, wgmma, add = plgpu.kernel, pl.kernel, plgpu.wgmma, jnp.sum
    staging = []  # of the kernel being traced

    def staged(body, threads, thread_name):
        """The body with what it stages through; also what to run it with."""

        def wrapped(*refs):
            *refs, shared, scratch = refs
            thread = jax.lax.axis_index(thread_name) if threads else 0
            own = {dtype: ref.at[thread] for dtype, ref in shared.items()}
            staging.append(own | {"scratch": scratch})
            body(*refs)
            staging.pop()

        shared = {
            dtype: plgpu.SMEM((threads or 1, 64, 128), dtype, transforms=transforms(dtype))
            for dtype in ("bfloat16", "float32")
        }
        return wrapped, [shared, plgpu.SMEM((64,), jnp.float32)]

    def kernel_with_staging(body, *, scratch_types, num_threads=None, thread_name=None, **kwargs):
        body, extra = staged(body, num_threads, thread_name)
        if num_threads:
            kwargs |= {"num_threads": num_threads, "thread_name": thread_name}
        return kernel(body, scratch_types=[*scratch_types, *extra], **kwargs)

    def kernel_over_refs(body, *, mesh, **kwargs):
        """Kernels that change arrays in place are made by `pl.kernel`."""

        def run(*refs):
            wrapped, extra = staged(lambda *_: body(*refs), mesh.num_threads, mesh.thread_name)
            axes = mesh.thread_name if mesh.num_threads else ()
            pl.run_scoped(wrapped, *extra, collective_axes=axes)

        return over_refs(run, mesh=mesh, **kwargs)

    def wgmma_through_shared(acc, a, b):
        if isinstance(a, jax.Array):
            part = staging[-1][a.dtype.name].at[:, pl.ds(0, a.shape[1])]
            part[...] = a
            plgpu.commit_smem()
            a = part
        wgmma(acc, a, b)

    def sum_through_shared(x, axis=None, **kwargs):
        result = add(x, axis=axis, **kwargs)
        if staging and axis == 0:
            scratch = staging[-1]["scratch"]
            scratch[...] = result
            result = scratch[...]
        return result

    def run_state(body):
        def call(starts):
            values, tree = jax.tree.flatten(starts)

            def added(*accs):
                body(jax.tree.unflatten(tree, accs))
                return [acc[...] for acc in accs]

            sums = pl.run_scoped(added, *(plgpu.ACC(x.shape, jnp.float32) for x in values))
            return jax.tree.unflatten(tree, [x + y for x, y in zip(values, sums, strict=True)])

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "kernel", kernel_with_staging)
        patch.setattr(pl, "kernel", kernel_over_refs)
        patch.setattr(plgpu, "wgmma", wgmma_through_shared)
        patch.setattr(jnp, "sum", sum_through_shared)
        patch.setattr(plgpu.ACC, "init", staticmethod(lambda x: x))
        patch.setattr(pl, "run_state", run_state)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
