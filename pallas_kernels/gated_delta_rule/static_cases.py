"""The kernels of the gated delta rule whose schedules on TPU are recorded and held to ceilings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import pallas_tpu, pallas_tpu_blocks, pallas_tpu_step
from pallas_kernels.gated_delta_rule.api import GatedDeltaConfig, GatedDeltaParams
from pallas_kernels.tpu_schedule import Case

__all__ = ["CASES"]


@dataclasses.dataclass(frozen=True)
class _Call:
    """Sizes of one call; long enough that operands stay in HBM, as in a model."""

    tokens: int = 1 << 16
    key_heads: int = 8
    value_heads: int = 8
    dim: int = 128
    chunk: int = 128
    dtype: str = "bfloat16"
    documents: bool = False
    residuals: bool = True

    @property
    def params(self) -> GatedDeltaParams:
        return GatedDeltaParams(
            scale=self.dim**-0.5,
            config=GatedDeltaConfig(chunk=self.chunk),
            shape_q=(1, self.tokens, self.key_heads, self.dim),
            shape_v=(1, self.tokens, self.value_heads, self.dim),
            dtype=jnp.dtype(self.dtype),
            residuals=self.residuals,
        )

    def arguments(self) -> tuple:
        """Shapes of q, k, v, g, beta, runs, initial state."""
        p, (B, T, R, D) = self.params, self.params.shape_v
        gate = jax.ShapeDtypeStruct((B, T, R), jnp.float32)
        q, v = (jax.ShapeDtypeStruct(shape, p.dtype) for shape in (p.shape_q, p.shape_v))
        runs = jax.ShapeDtypeStruct((B, T), jnp.int32) if self.documents else None
        return q, q, v, gate, gate, runs, jax.ShapeDtypeStruct((B, R, D, D), jnp.float32)

    def residual_arguments(self) -> tuple:
        """Shapes of the inverses, the states, and the gradients of the outputs."""
        p, (B, T, R, D), C = self.params, self.params.shape_v, self.chunk
        x = jax.ShapeDtypeStruct((T // C, B, R, C, C), p.dtype)
        states = jax.ShapeDtypeStruct((T // C, B, R, D, D), p.dtype)
        do = jax.ShapeDtypeStruct(p.shape_v, p.dtype)
        return x, states, do, jax.ShapeDtypeStruct((B, R, D, D), jnp.float32)

    def case(self, name: str, kernel: str) -> Case:
        C, D, blocks = self.chunk, self.dim, pallas_tpu_blocks.cut(self.params)
        if kernel == "gdn_forward":
            function, arguments = pallas_tpu.forward, self.arguments()
            products = 4 * C + 3 * D  # multiply-adds of a token-head by D, the inverse apart
        else:
            function = pallas_tpu.backward
            arguments = (*self.arguments(), *self.residual_arguments())
            products = 11 * C + 7 * D
        facts = {n: getattr(self, n) for n in ("dim", "chunk", "dtype", "documents")}
        facts |= {"heads": f"{self.key_heads}/{self.value_heads}", "residuals": self.residuals}
        return Case(
            name=name,
            kernel=kernel,
            function=functools.partial(function, self.params),
            arguments=arguments,
            unit="token-head",
            work=C * blocks.heads,
            multiply_adds=products * D,
            facts=facts,
        )


def _step(name: str, rows: int, heads: int, dim: int) -> Case:
    params = GatedDeltaParams(
        scale=dim**-0.5,
        config=GatedDeltaConfig(),
        shape_q=(rows, heads, dim),
        shape_v=(rows, heads, dim),
        dtype=jnp.dtype(jnp.bfloat16),
    )
    x = jax.ShapeDtypeStruct(params.shape_q, params.dtype)
    gate = jax.ShapeDtypeStruct((rows, heads), jnp.float32)
    state = jax.ShapeDtypeStruct((rows, heads, dim, dim), jnp.float32)
    return Case(
        name=name,
        kernel="gdn_step",
        function=functools.partial(pallas_tpu_step.apply, params),
        arguments=(x, x, x, gate, gate, state),
        unit="token-head",
        work=heads,
        multiply_adds=0,
        facts={"dim": dim, "dtype": "bfloat16", "heads": f"{heads}/{heads}"},
    )


CASES = (
    _Call().case("gdn_fwd", "gdn_forward"),
    _Call().case("gdn_bwd", "gdn_backward"),
    _step("gdn_step", rows=256, heads=16, dim=128),
    _Call(residuals=False).case("gdn_fwd_inference", "gdn_forward"),
    _Call(documents=True).case("gdn_fwd_documents", "gdn_forward"),
    _Call(documents=True).case("gdn_bwd_documents", "gdn_backward"),
    _Call(key_heads=2).case("gdn_fwd_grouped", "gdn_forward"),
    _Call(key_heads=2).case("gdn_bwd_grouped", "gdn_backward"),
    _Call(dim=64).case("gdn_fwd_d64", "gdn_forward"),
    _Call(dim=64).case("gdn_bwd_d64", "gdn_backward"),
    _Call(chunk=64).case("gdn_fwd_c64", "gdn_forward"),
    _Call(chunk=64).case("gdn_bwd_c64", "gdn_backward"),
    _Call(dtype="float32").case("gdn_fwd_f32", "gdn_forward"),
    _Call(dtype="float32").case("gdn_bwd_f32", "gdn_backward"),
)
