"""The teacher's plain layers: parameters, RMSNorm, SwiGLU, embedding, rotary positions.

Rotary tables follow Hugging Face's `ROPE_INIT_FUNCTIONS` (linear, llama3, yarn); vectors are
rotated in halves: pair i is (x_i, x_{i + H/2}).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import register_dataclass

from hydrajax.model_config import ModelConfig, RopeConfig
from hydrajax.typing import Array, Float, Int

INIT_STD = 0.02


def weight(rngs: nnx.Rngs, shape: tuple, axes: tuple, std: float = INIT_STD) -> nnx.Param:
    """Normal(0, std) master weight in fp32; `axes` names its logical axes (sharding.RULES)."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes)


def constant(shape: tuple, axes: tuple, value: float = 0.0) -> nnx.Param:
    """Constant fp32 parameter: biases, norm scales."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"] | None, eps: float) -> Array:
    """RMSNorm in fp32, result in the dtype of x."""
    x32 = x.astype(jnp.float32)
    out = (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype)
    return out if scale is None else out * scale.astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale = constant((width,), (None,), 1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.scale[...], self.eps)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, f = cfg.width, cfg.mlp_width
        self.w_gate = weight(rngs, (d, f), ("width", "mlp"))
        self.w_up = weight(rngs, (d, f), ("width", "mlp"))
        self.w_down = weight(rngs, (f, d), ("mlp", "width"))
        self.b_gate = constant((f,), ("mlp",)) if cfg.mlp_bias else None
        self.b_up = constant((f,), ("mlp",)) if cfg.mlp_bias else None
        self.b_down = constant((d,), (None,)) if cfg.mlp_bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate = project("...d,df->...f", x, self.w_gate, self.b_gate)
        up = project("...d,df->...f", x, self.w_up, self.b_up)
        return project("...f,fd->...d", jax.nn.silu(gate) * up, self.w_down, self.b_down)


def project(equation: str, x: Array, w: nnx.Param, b: nnx.Param | None = None) -> Array:
    """einsum of an activation with a master weight, in the activation's dtype."""
    y = jnp.einsum(equation, x, w[...].astype(x.dtype))
    return y if b is None else y + b[...].astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, cfg: ModelConfig, dtype, rngs: nnx.Rngs):
        self.w = weight(rngs, (cfg.vocab_size, cfg.width), ("vocab", "width"))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Looked up before the cast: the gradients of a frequent token add up in fp32.
        return self.w[...][tokens].astype(self.dtype)

    @staticmethod
    def logits(w: Float[Array, "V D"], x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of tied embeddings, fp32."""
        w = w.astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, w, preferred_element_type=jnp.float32)


class Unembedding(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.w = weight(rngs, (cfg.width, cfg.vocab_size), ("width", "vocab"))

    @staticmethod
    def logits(w: Float[Array, "D V"], x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of words of their own, fp32."""
        w = w.astype(x.dtype)
        return jnp.einsum("...d,dv->...v", x, w, preferred_element_type=jnp.float32)


def take_heads(x: Float[Array, "B T N H"], heads: tuple[int, ...]) -> Float[Array, "B T M H"]:
    """x[:, :, heads] as joined slices: the gradient of a gather is a scatter, slow on GPUs."""
    starts = [i for i in range(len(heads)) if i == 0 or heads[i] != heads[i - 1] + 1]
    ends = [*starts[1:], len(heads)]
    runs = [x[:, :, heads[a] : heads[a] + b - a] for a, b in zip(starts, ends, strict=True)]
    return runs[0] if len(runs) == 1 else jnp.concatenate(runs, axis=2)


@dataclass(frozen=True)
class Sequence:
    """What every layer needs to know about its tokens; made once per forward pass."""

    positions: Int[Array, "B T"]  # inside the document, from 0
    segment_ids: Int[Array, "B T"] | None  # 0 = padding; None = one document, no padding
    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]
    training: bool = False


register_dataclass(Sequence, ["positions", "segment_ids", "cos", "sin"], ["training"])


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] in float64 and the factor on cos and sin (1 except for yarn)."""
    inv = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return inv / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inv), 1.0
    if rope.kind == "yarn":
        scale = rope.attention_factor or 0.1 * math.log(rope.factor) + 1.0
        return _yarn(rope, inv, head_dim), scale
    return inv, 1.0


def _llama3(rope: RopeConfig, inv: np.ndarray) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = np.clip((rope.original_context / wavelength - low) / (high - low), 0, 1)
    return (1 - blend) * inv / rope.factor + blend * inv


def _yarn(rope: RopeConfig, inv: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (2309.00071): dims turning often in the original context are kept, slow ones divided."""

    def dim_of(rotations: float) -> float:
        return (
            head_dim
            * math.log(rope.original_context / (rotations * 2 * math.pi))
            / (2 * math.log(rope.theta))
        )

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return inv / rope.factor * (1 - keep) + inv * keep


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Array, Array]:
    """cos and sin [B, T, H/2], fp32."""
    inv, scale = rope_frequencies(rope, head_dim)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(inv, jnp.float32)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def apply_rope(x: Float[Array, "B T N H"], seq: Sequence, dims: int) -> Float[Array, "B T N H"]:
    """Rotate the fastest `dims` of H dims (dims = H: all); pairs beyond them stay as they are."""
    if dims == 0:
        return x
    half = x.shape[-1] // 2
    cos, sin = seq.cos[:, :, None, :], seq.sin[:, :, None, :]
    if dims < 2 * half:
        rotated = np.arange(half) < dims // 2
        cos, sin = jnp.where(rotated, cos, 1.0), jnp.where(rotated, sin, 0.0)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
