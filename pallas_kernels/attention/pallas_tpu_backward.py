"""Backward of attention on TPU: all three gradients in one kernel, five products a block pair.

    p  = exp2(c k q^T - lse)    dp = v do^T    ds = p (dp - delta)          c = scale log2(e)
    dv^T = do^T p^T             dk^T = scale q^T ds^T             dq^T = scale k^T ds

Transposed and overlapped like the forward: step g puts the products k q^T and v do^T of visit g
into scratch, while it takes those of visit g - 1 out of it. The visits go through the queries of
one block of keys after the other, whose dk and dv stay in scratch; dq is added to in HBM, one block
a step, by copies that run beside the products.

    B batch   N query heads   G query heads of a step's key head   H head dim   P visits
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import pallas_tpu_tiles as tiling
from pallas_kernels.attention.pallas_tpu_tiles import NN, NT, dot, piece
from pallas_kernels.attention.pallas_tpu_visits import BORDER, FIRST, LANES, row, visits

__all__ = ["backward_kernel"]


def backward_kernel(params, tiles, q, k, v, q_ids, kv_ids, offset, do, lse, delta):
    """Return dq^T [B,N,H,T] fp32, not scaled, and dk, dv of every group of heads, as k.

    q, k, v and do are views of `tiling.view`; lse (base 2) and delta are fp32 [B,N,1,T].
    """
    table, count = visits(params, tiles, q_ids, kv_ids, offset, by_keys=True)
    (B, P), (N, H) = table.shape, params.shape_q[2:]
    call = tiling.Call(params, tiles, P)
    G, rows, columns = call.group, tiles.rows, tiles.columns
    both = [(q, call.queries), (do, call.queries), (k, call.keys)]
    inputs = [(x, window(lag)) for x, window in both for lag in (0, 1)]
    inputs += [(v, call.keys(0)), (lse, call.query_rows(1)), (delta, call.query_rows(1))]
    if q_ids is not None:
        inputs += zip(call.ids(q_ids, kv_ids), (call.query_ids(0), call.key_ids(0)), strict=True)
    dq = jnp.zeros((B, N, H, rows * tiles.counts[0]), jnp.float32)
    inputs.append((dq, pl.BlockSpec(memory_space=pl.ANY)))
    operands, specs = zip(*inputs, strict=True)
    shape = tiling.view_shape(B, columns * tiles.counts[1], N // G, H)
    # Of several groups they are added up, in fp32.
    gradient = jax.ShapeDtypeStruct(shape, k.dtype if call.groups == 1 else jnp.float32)
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, N // G, P * G + 1),
            in_specs=specs,
            out_specs=[pl.BlockSpec(memory_space=pl.ANY), *[call.key_gradients(1)] * 2],
            scratch_shapes=[
                pltpu.VMEM((columns, LANES), jnp.int32),  # ids of the keys
                *[pltpu.VMEM((columns, rows), jnp.float32)] * 2,  # k q^T and v do^T
                *[pltpu.VMEM((H, columns), jnp.float32)] * 2,  # dk^T and dv^T
                *[pltpu.VMEM((H, rows), jnp.float32)] * 3,  # dq^T: of this visit, read, written
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(dq.shape, dq.dtype), gradient, gradient],
        input_output_aliases={2 + len(operands): 0},
        compiler_params=call.compiler_params(),
        name="attention_bwd",
    )(table.reshape(-1), count, call.offsets(offset), *operands)


def _kernel(call, table, count, offset, *refs):
    q, q1, do, do1, k, k1, v, lse, delta, *ids, _, dq, dk, dv = refs[:-10]
    key_ids, logits, dweights, dk_t, dv_t, dq_t, *buffers = refs[-10:]
    step = call.step(table, count)
    block = step.head(1) + call.group * pl.program_id(1), row(step.visit(1))
    copies = Accumulator(dq, *buffers, step.b)

    @pl.when(pl.program_id(2) == 0)
    def _():
        copies.reset()

    @pl.when(step.running)
    def _():
        @pl.when(pl.program_id(2) > 0)
        def _():
            copies.fetch(*block)

        if ids:

            @pl.when((step.visit(0) & FIRST != 0) & (step.head(0) == 0))
            def _():
                call.key_columns(ids[1], key_ids)

        @pl.when((step.visit(1) & FIRST != 0) & (step.head(1) == 0))
        def _():
            dk_t[...] = jnp.zeros_like(dk_t)
            dv_t[...] = jnp.zeros_like(dv_t)

        new, old = (q, do, k, v), (q1, do1, k1[0].T, lse, delta)
        run = functools.partial(_overlapped, call, new, old, (logits, dweights, dk_t, dv_t, dq_t))
        border = step.visit(0) & BORDER != 0
        of_pair = [ids[0], key_ids] if ids else []
        mask = functools.partial(call.seen, step.visit(0), offset[step.b], of_pair)
        pl.when(~border)(run)
        pl.when(border)(lambda: run(mask))

        @pl.when(pl.program_id(2) > 0)
        def _():
            copies.add(dq_t, *block)

        @pl.when(step.finishes(1) & (step.head(1) == call.group - 1))
        def _():
            dk[0] = (dk_t[...] * call.params.scale).T.astype(dk.dtype)
            dv[0] = dv_t[...].T.astype(dv.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        copies.drain()


def _overlapped(call, new, old, scratch, mask=None):
    """Turn the last visit's logits into gradients and put this one's in their place.

    `mask` says what this visit sees. With it the body is a loop over queries, to be less code.
    """
    (q, do, k, v), (q1, do1, k_t, lse, delta) = new, old
    logits, dweights, dk_t, dv_t, dq_t = scratch
    tiles, dtype = call.tiles, q.dtype
    across, down = piece(tiles.rows), piece(tiles.columns)

    def part(i):
        lanes, product = pl.ds(i, across), None
        top, mean = lse[0, 0, :, lanes], delta[0, 0, :, lanes]
        q_t, do_t = q1[0, lanes].T, do1[0, lanes].T
        for j in range(0, tiles.columns, down):
            keys = slice(j, j + down)
            weights = jnp.exp2(logits[keys, lanes] * call.exponent - top)
            dlogits = (weights * (dweights[keys, lanes] - mean)).astype(dtype)
            fresh = dot(k[0, keys], q[0, lanes], NT)
            if mask is not None:
                fresh = jnp.where(mask((j, down), (i, across)), fresh, -jnp.inf)
            logits[keys, lanes] = fresh
            dweights[keys, lanes] = dot(v[0, keys], do[0, lanes], NT)
            dv_t[:, keys] += dot(do_t, weights.astype(dtype), NT)
            dk_t[:, keys] += dot(q_t, dlogits, NT)
            fresh = dot(k_t[:, keys], dlogits, NN)
            product = fresh if product is None else product + fresh
        dq_t[:, lanes] = product

    if mask is None:
        for i in range(0, tiles.rows, across):
            part(i)
    else:
        pl.loop(0, tiles.rows // across)(lambda n: part(pl.multiple_of(n * across, across)))


class Accumulator:
    """Adds blocks to dq in HBM; one copy in each direction is under way at any time."""

    def __init__(self, dq, fetched, stored, pending, semaphores, b):
        self._dq, self._fetched, self._stored = dq, fetched, stored
        self._pending, self._semaphores, self._b = pending, semaphores, b

    def reset(self):
        self._pending[0] = -1

    def fetch(self, head, block):
        self.settle(head, block)
        self._read(head, block).start()

    def settle(self, head, block):
        """Wait for a block that is still being written."""
        pl.when(self._pending[0] == self._number(head, block))(self._wait)

    def add(self, part, head, block):
        self._read(head, block).wait()
        pl.when(self._pending[0] >= 0)(self._wait)
        self._stored[...] = self._fetched[...] + part[...]
        self._write(head, block).start()
        self._pending[0] = self._number(head, block)

    def drain(self):
        pl.when(self._pending[0] >= 0)(self._wait)

    def _number(self, head, block):
        return head * (self._dq.shape[3] // self._stored.shape[1]) + block

    def _wait(self):
        # Only the size of the copy counts.
        self._write(0, 0).wait()
        self._pending[0] = -1

    def _at(self, head, block):
        rows = self._stored.shape[1]
        return self._dq.at[self._b, head, :, pl.ds(pl.multiple_of(block * rows, rows), rows)]

    def _read(self, head, block):
        return pltpu.make_async_copy(self._at(head, block), self._fetched, self._semaphores.at[0])

    def _write(self, head, block):
        return pltpu.make_async_copy(self._stored, self._at(head, block), self._semaphores.at[1])
