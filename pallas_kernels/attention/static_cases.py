"""The TPU kernels of attention whose schedules are recorded and held to ceilings, and jax's beside.

A step of the grid takes one head through one pair of blocks, 1024 queries and 1024 keys. `loops`
are the bodies of such a step: the first without a mask, which most pairs of a long document take,
and the second with it, a loop over pieces of 256 queries of which the cycles are those of one. What
splash has is one body with the mask of documents and of causal order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.attention import pallas_tpu, pallas_tpu_step, splash
from pallas_kernels.attention.api import AttentionParams, StepParams
from pallas_kernels.tpu_schedule import Case

__all__ = ["CASES"]


@dataclasses.dataclass(frozen=True)
class _Call:
    """Sizes of one causal call on a packed row; so many heads that operands stay in HBM."""

    tokens: int = 4096
    heads: int = 64
    key_heads: int = 32
    dim: int = 128
    dtype: str = "bfloat16"

    @property
    def params(self) -> AttentionParams:
        return AttentionParams(
            scale=self.dim**-0.5,
            causal=True,
            window=None,
            q_offset=0,
            segmented=True,
            paired=False,
            ordered=True,
            shape_q=(1, self.tokens, self.heads, self.dim),
            shape_k=(1, self.tokens, self.key_heads, self.dim),
            dtype=jnp.dtype(self.dtype),
        )

    def arguments(self) -> tuple:
        """Shapes of q, k, v, the ids of both, and the offset."""
        p = self.params
        q, k = (jax.ShapeDtypeStruct(shape, p.dtype) for shape in (p.shape_q, p.shape_k))
        ids = jax.ShapeDtypeStruct(p.shape_q[:2], jnp.int32)
        return q, k, k, ids, ids, None

    def case(self, name: str, kernel: str) -> Case:
        p, arguments = self.params, self.arguments()
        do = arguments[0]
        backward = "bwd" in name
        if name.startswith("splash"):
            function = functools.partial(_splash_with_gradients, p)
            arguments, loops = (*arguments[:4], do), 1
        elif backward:
            lse = jax.ShapeDtypeStruct(p.shape_q[:3], jnp.float32)
            function = functools.partial(pallas_tpu.backward, p)
            arguments, loops = (*arguments, do, lse, do), 2
        else:
            function, loops = functools.partial(pallas_tpu.forward, p), 2
        size = pallas_tpu.block(p)
        return Case(
            name=name,
            kernel=kernel,
            function=function,
            arguments=arguments,
            unit=f"block pair of {size} x {size}",
            work=1,
            multiply_adds=(5 if backward else 2) * size * size * self.dim,
            facts={"dim": self.dim, "dtype": self.dtype, "documents": True},
            loops=loops,
        )


def _splash_with_gradients(params, q, k, v, ids, do):
    def run(q, k, v):
        return splash.apply(params, q, k, v, ids, ids, None)

    o, vjp = jax.vjp(run, q, k, v)
    return o, vjp(do)


def _step(name: str, heads: int, key_heads: int, dim: int) -> Case:
    dtype, rows, entries = jnp.dtype(jnp.bfloat16), 64, 8192
    shape_q, shape_k = (rows, heads, dim), (rows, entries, key_heads, dim)
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in (shape_q, shape_k))
    params = StepParams(dim**-0.5, shape_q, shape_k, dtype)
    size = pallas_tpu_step.block(params)
    return Case(
        name=name,
        kernel="attention_step",
        function=functools.partial(pallas_tpu_step.apply, params),
        arguments=(q, k, k, jax.ShapeDtypeStruct((rows,), jnp.int32)),
        unit=f"{size} cache entries of all heads",
        work=1,
        multiply_adds=2 * size * heads * dim,
        facts={"dim": dim, "dtype": dtype.name, "heads": f"{heads}/{key_heads}"},
    )


_PEER = _Call(heads=2, key_heads=1)  # many heads take splash minutes to compile

CASES = (
    _Call().case("attn_fwd", "attention_fwd"),
    _Call().case("attn_bwd", "attention_bwd"),
    _PEER.case("splash_fwd", "splash_mha_fwd_segmented_residuals"),
    _PEER.case("splash_bwd", "splash_mha_dkv_segmented_no_residuals"),
    _Call(dim=64).case("attn_fwd_d64", "attention_fwd"),
    _Call(dim=64).case("attn_bwd_d64", "attention_bwd"),
    _Call(dtype="float32").case("attn_fwd_f32", "attention_fwd"),
    _Call(dtype="float32").case("attn_bwd_f32", "attention_bwd"),
    _step("attn_step", heads=16, key_heads=8, dim=128),
    _step("attn_step_d64", heads=9, key_heads=3, dim=64),
)
