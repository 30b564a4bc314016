"""The parallel half of the gated delta rule's backward on Hopper: one block per chunk and head.

From the states S, the inverse X and what the sweep leaves, dS+ and dR~ (letters of the README):

    R   = V - a K S                     V'  = X (beta R)             P = s tril(Q K^T * D)
    dP  = tril(dO V'^T)                 dA  = -tril(dR~ V'^T, -1)    B = tril(K K^T * D, -1)
    dQ1 = s a dO S^T                    dQ  = dQ1 + (s dP * D) K
    dK1 = z V' dS+^T                    dK2 = -a beta dR~ S^T        Y = beta (dA * D)
    dK  = dK1 + dK2 + (s dP * D)^T Q + (Y + Y^T) K                   dV = beta dR~
    E   = dP * P + beta dA * B          dbeta = rowsum(dR~ * R) + rowsum(dA * B)

A warpgroup takes 64 columns of everything as wide as a head; of the [C,C] products the first one
takes dP's, the last one dA's. Sums over the rows of a tile pass through shared memory that Mosaic
gives to the block, not to the warpgroup: they take turns.

    B batch   Z chunks   C = 64 rows of a chunk   K key heads   R value heads
    H key dim = E value dim   W warpgroups, H / 64
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_gpu_gates import BETA, CUMULATIVE, READ, RUN, WRITE
from pallas_kernels.gated_delta_rule.mosaic_gpu_tiles import (
    TILE,
    add_products,
    decay,
    indices,
    load,
    load_row,
    matrix,
    products,
)

# The sums: rowsum(E) + rowsum(Q * dQ1) + rowsum(K * dK2), colsum(E), rowsum(K * dK1), dbeta, all
# by rows of the chunk, and <S, dS+> by rows of S.
OF_ROWS, OF_COLUMNS, WRITTEN, DBETA, KEPT = range(5)


def gradients(scale, q, k, v, do, gates, t_inv, states, dstates, dr):
    """Return dq, dk, dv [B,Z*C,R,H] and fp32 sums [Z,B,R,W,5,C], each to be summed over W.

    Arguments as the sweep takes and leaves them; dq and dk are per value head.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    Z, B, R, rows, C = gates.shape
    H, dtype = q.shape[3], q.dtype
    W, groups = H // TILE, R // q.shape[2]

    def body(*refs):
        sources, (dq, dk, dv, sums), scratch = refs[:9], refs[9:13], refs[13:]
        read, computed, (first, second, met, turn) = scratch
        z, b, r, w = (jax.lax.axis_index(n) for n in ("chunk", "batch", "head", "columns"))
        tokens, of_head = (b, pl.ds(z * C, C), r), (z, b, r)
        of_key_head = (b, pl.ds(z * C, C), jax.lax.div(r, jnp.int32(groups)))
        x = _Chunk(*read, *computed, pl.ds(w * TILE, TILE), w)

        def leader(function):
            pl.when(w == 0)(function)

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        @leader
        def _():
            places = of_key_head, of_head, tokens, *[of_head] * 3, of_key_head, tokens, of_head
            barriers = *[first] * 6, *[second] * 3
            for source, place, target, barrier in zip(sources, places, read, barriers, strict=True):
                plgpu.copy_gmem_to_smem(source.at[place], target, barrier)

        plgpu.barrier_wait(first)
        dbeta = _correct(x)
        meet()
        plgpu.barrier_wait(second)
        _pairs(x, scale, dbeta, W, turn)
        _keep(x, W)
        meet()
        dq_own, of_rows = _of_queries(x, scale)
        dk_own = _of_keys(x, of_rows)
        meet()  # all have read what the results overwrite
        x.v[:, x.own] = (load_row(x.gates.at[BETA]) * load(x.dr.at[:, x.own])).astype(dtype)
        x.do[:, x.own] = dq_own
        x.k[:, x.own] = dk_own
        meet()

        @leader
        def _():
            for result, target in ((x.do, dq), (x.k, dk), (x.v, dv)):
                plgpu.copy_smem_to_gmem(result, target.at[tokens])
            plgpu.copy_smem_to_gmem(x.sums, sums.at[of_head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    keys, square = matrix(dtype, C, H), matrix(dtype, H, H)
    chunk, gate = matrix(dtype, C, C), plgpu.SMEM((rows, C), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=(
            *[jax.ShapeDtypeStruct((B, Z * C, R, H), dtype)] * 3,
            jax.ShapeDtypeStruct((Z, B, R, W, 5, C), jnp.float32),
        ),
        scratch_types=[
            [keys, square, keys, gate, chunk, keys, keys, keys, square],
            [chunk, chunk, plgpu.SMEM((W, 5, C), jnp.float32)],
            [
                plgpu.Barrier(num_arrivals=6),
                plgpu.Barrier(num_arrivals=3),
                plgpu.Barrier(num_arrivals=W),
                plgpu.Barrier(num_arrivals=1),
            ],
        ],
        grid=(R, Z, B),
        grid_names=("head", "chunk", "batch"),
        num_threads=W,
        thread_name="columns",
        kernel_name="gdn_gradients",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(k, states, v, gates, t_inv, dr, q, do, dstates)


class _Chunk(NamedTuple):
    """One chunk in shared memory: what is read, what is computed, and a warpgroup's columns."""

    k: Any  # [C,H]
    state: Any  # [H,H]
    v: Any  # [C,H]  V, then V'
    gates: Any  # [6,C]
    t_inv: Any  # [C,C]
    dr: Any  # [C,H]  dR~
    q: Any  # [C,H]
    do: Any  # [C,H]
    dstate: Any  # [H,H]  dS+^T
    dqk: Any  # [C,C]  s dP * D
    y: Any  # [C,C]
    sums: Any  # [W,5,C]
    own: Any
    w: Any


def _correct(x):
    """Replace V by V' and return rowsum(dR~ * R)."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    v = x.v.at[:, x.own]
    (k_state,) = products([(x.k, x.state.at[:, x.own])])
    rest = load(v) - load_row(x.gates.at[READ]) * k_state
    v[...] = (load_row(x.gates.at[BETA]) * rest).astype(x.k.dtype)
    plgpu.commit_smem()
    (v_new,) = products([(x.t_inv, v)])
    v[...] = v_new.astype(x.k.dtype)
    return jnp.sum(load(x.dr.at[:, x.own]) * rest, axis=1)


def _pairs(x, scale, dbeta, warpgroups, turn):
    """Store s dP * D and Y, and what E and dA * B add to the sums."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def add(e, dbeta):
        x.sums[x.w, OF_ROWS] = jnp.sum(e, axis=1)
        x.sums[x.w, OF_COLUMNS] = jnp.sum(e, axis=0)
        x.sums[x.w, DBETA] = dbeta

    if warpgroups == 1:
        e, of_pairs = _key_pairs(x)
        add(_query_pairs(x, scale) + e, dbeta + of_pairs)
        return

    @pl.when(x.w == 0)
    def _():
        add(_query_pairs(x, scale), dbeta)
        plgpu.barrier_arrive(turn)

    @pl.when(x.w == warpgroups - 1)
    def _():
        e, of_pairs = _key_pairs(x)
        plgpu.barrier_wait(turn)
        add(e, dbeta + of_pairs)


def _query_pairs(x, scale):
    """Store s dP * D, return dP * P."""
    dp, scores = products([(x.do, x.v.T)], [(x.q, x.k.T)])
    dqk = scale * dp * decay(x.gates.at[CUMULATIVE], x.gates.at[RUN])
    x.dqk[...] = dqk.astype(x.k.dtype)
    return dqk * scores


def _key_pairs(x):
    """Store Y, return dA * A and rowsum(dA * B)."""
    dr_v, pairs = products([(x.dr, x.v.T)], [(x.k, x.k.T)])
    i, j = indices()
    da = jnp.where(i > j, -decay(x.gates.at[CUMULATIVE], x.gates.at[RUN]) * dr_v, 0.0)
    y = load_row(x.gates.at[BETA]) * da
    x.y[...] = y.astype(x.k.dtype)
    return y * pairs, jnp.sum(da * pairs, axis=1)


def _of_queries(x, scale):
    """Return dQ and rowsum(Q * dQ1)."""
    (do_state,) = products([(x.do, x.state.at[x.own].T)])
    state = scale * load_row(x.gates.at[READ]) * do_state
    of_rows = jnp.sum(load(x.q.at[:, x.own]) * state, axis=1)
    return add_products(state, (x.dqk, x.k.at[:, x.own])).astype(x.k.dtype), of_rows


def _of_keys(x, of_rows):
    """Return dK; store rowsum(K * dK1) and add rowsum(K * dK2) and `of_rows` to their sum."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    k = x.k.at[:, x.own]
    dr_state, v_dstate = products([(x.dr, x.state.at[x.own].T)], [(x.v, x.dstate.at[:, x.own])])
    read = -load_row(x.gates.at[READ]) * load_row(x.gates.at[BETA]) * dr_state
    write = load_row(x.gates.at[WRITE]) * v_dstate
    of_pairs = plgpu.load(x.sums.at[x.w, OF_ROWS], layout=plgpu.Layout.WGMMA.reduce(1))
    x.sums[x.w, OF_ROWS] = of_pairs + of_rows + jnp.sum(load(k) * read, axis=1)
    x.sums[x.w, WRITTEN] = jnp.sum(load(k) * write, axis=1)
    dk = add_products(read + write, (x.dqk.T, x.q.at[:, x.own]), (x.y, k), (x.y.T, k))
    return dk.astype(x.k.dtype)


def _keep(x, warpgroups):
    """Store <S, dS+>."""
    from jax.experimental import pallas as pl

    parts = [pl.ds(i * TILE, TILE) for i in range(warpgroups)]
    kept = [load(x.state.at[x.own, i]) * load(x.dstate.at[i, x.own].T) for i in parts]
    x.sums[x.w, KEPT] = jnp.sum(functools.reduce(jnp.add, kept), axis=1)
