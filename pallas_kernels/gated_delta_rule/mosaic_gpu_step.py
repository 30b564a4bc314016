"""One token of the gated delta rule on Hopper, at the speed at which the state can be moved.

    S <- exp(g) S     u = beta (v - S^T k)     S <- S + k u^T     o = scale S^T q

A block has 64 columns of one state, which do not mix with the others: it reads them once, works in
registers and writes them back to where they came from. So a state that the caller of the jitted
program donates is updated in place.

    B batch   K key heads   R value heads   H key dim   E value dim
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.dispatch import decline
from pallas_kernels.gated_delta_rule import mosaic_gpu, step
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import TILE
from pallas_kernels.hopper import matrix, parameters

DTYPES = ("bfloat16", "float32")


def check(params) -> None:
    """Decline below jax 0.11 and what the kernel is not written for."""
    hopper.check_version()
    H, E = params.shape_q[-1], params.shape_v[-1]
    if H not in mosaic_gpu.HEAD_DIMS or E % TILE:
        raise decline(
            hopper.NAME, f"needs a key dim in {mosaic_gpu.HEAD_DIMS}, values by {TILE}", (H, E)
        )
    if params.dtype.name not in DTYPES:
        raise decline(hopper.NAME, f"takes {', '.join(DTYPES)}", params.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(params, q, k, v, g, beta, state):
    """Advance the state by one token; return (o [B,R,E], state)."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, R, H, E = state.shape
    groups = R // q.shape[1]

    def body(q, k, v, decay, beta, states, o):
        r, b, n = (jax.lax.axis_index(x) for x in ("head", "batch", "columns"))
        key_head = jax.lax.div(r, jnp.int32(groups))
        columns = pl.ds(n * TILE, TILE)

        def run(state_s, q_s, k_s, v_s, o_s, full):
            for source, target in (
                (states.at[b, r, :, columns], state_s),
                (q.at[b, key_head], q_s),
                (k.at[b, key_head], k_s),
                (v.at[b, r, columns], v_s),
            ):
                plgpu.copy_gmem_to_smem(source, target, full)
            keep, strength = decay[b, r], beta[b, r]
            plgpu.barrier_wait(full)
            k_rows, q_rows = _along_rows(k_s, H), _along_rows(q_s, H)
            state = keep * plgpu.load(state_s, layout=plgpu.Layout.WGMMA)
            read = jnp.sum(k_rows * state, axis=0)
            given = plgpu.load(v_s, layout=plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
            u = strength * (given - read)
            state = state + k_rows * jax.lax.broadcast_in_dim(u, (H, TILE), [1])
            state_s[...] = state
            o_s[...] = (params.scale * jnp.sum(q_rows * state, axis=0)).astype(o_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s, states.at[b, r, :, columns])
            plgpu.copy_smem_to_gmem(o_s, o.at[b, r, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.run_scoped(
            run,
            matrix(jnp.float32, H, TILE),
            plgpu.SMEM((H,), q.dtype),
            plgpu.SMEM((H,), k.dtype),
            plgpu.SMEM((TILE,), v.dtype),
            plgpu.SMEM((TILE,), v.dtype),
            plgpu.Barrier(num_arrivals=4),
        )

    advance = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        mesh=plgpu.Mesh(grid=(R, B, E // TILE), grid_names=("head", "batch", "columns")),
        compiler_params=parameters(barriers=True),
        name="gdn_step",
    )
    states = jax.new_ref(state)
    o = advance(q, k, v, jnp.exp(g), beta, states)
    return o, jax.freeze(states)


def _along_rows(ref, rows):
    """Numbers of the rows of a tile, repeated along them in fp32."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
    return jax.lax.broadcast_in_dim(x, (rows, TILE), [0])


def _forward(params, *operands):
    return apply(params, *operands), operands


def _backward(params, operands, cotangents):
    return jax.vjp(functools.partial(step.apply, params), *operands)[1](cotangents)


apply.defvjp(_forward, _backward)
