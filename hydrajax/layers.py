"""The teacher's plain layers: parameters, RMSNorm, SwiGLU, embedding, rotary positions.

Rotary tables follow Hugging Face's `ROPE_INIT_FUNCTIONS` (linear, llama3, yarn); vectors are
rotated in halves: pair i is (x_i, x_{i + H/2}).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.tree_util import register_dataclass

from hydrajax.model_config import ModelConfig, RopeConfig
from hydrajax.sharding import Split, split_of
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
    """einsum of an activation with a master weight, in the activation's dtype; b added in fp32.

    In x's dtype XLA for GPUs adds a bias of heads inside the matmul, as a matrix: it writes one
    of the output's size for every layer, and all of them at the start of the program.
    """
    y = jnp.einsum(equation, x, w[...].astype(x.dtype))
    return y if b is None else (y.astype(jnp.float32) + b[...].astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def to_float32(equation: str, x: Array, w: Array) -> Array:
    """einsum with a result in fp32, whose gradient meets the operands in their own dtype.

    Products of an fp32 gradient and a bf16 operand would be in fp32: a quarter of the rate on GPUs.
    """
    return jnp.einsum(equation, x, w, preferred_element_type=jnp.float32)


def _keep_operands(equation: str, x: Array, w: Array):
    return to_float32(equation, x, w), (x, w)


def _narrow_gradients(equation: str, operands: tuple[Array, Array], dy: Array):
    _, pull = jax.vjp(functools.partial(jnp.einsum, equation), *operands)
    return pull(dy.astype(operands[0].dtype))


to_float32.defvjp(_keep_operands, _narrow_gradients)


def in_pieces(
    fn: Callable[[Any, Array], Array], weights: Any, x: Float[Array, "B T D"], most: int
) -> Float[Array, "B T D"]:
    """fn(weights, x), of every token alone, for at most `most` tokens of a device at a time.

    The backward pass has x alone and computes each piece again. Every device walks over its own
    tokens with all of the weights, in the dtype of x; their gradients are added up in fp32 and
    meet the other devices' once. A length that has no fitting divisor is taken whole.
    """
    split = split_of(("batch", "tokens"), x.shape[:2])
    rows, tokens = split.share(x.shape[:2])
    least = -(-rows * tokens // most)
    count = next((n for n in range(least, 2 * least + 1) if tokens % n == 0), 1)
    return fn(weights, x) if count == 1 else _in_pieces(fn, count, split, weights, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_pieces(fn: Callable, count: int, split: Split, weights: Any, x: Array) -> Array:
    def own(weights: Any, x: Array) -> Array:
        def body(i: Array, out: Array) -> Array:
            return _put(out, i, fn(weights, _piece(out, i)))

        # Pieces take the place of their inputs. With an output of its own a loop would start from
        # zeros, and XLA makes those of all layers at once, at the start of the program.
        return jax.lax.fori_loop(0, count, body, _cut(x, count)).reshape(x.shape)

    return split.run(own, split.parts)(_cast(weights, x.dtype), x)


def _keep_inputs(fn, count: int, split: Split, weights: Any, x: Array):
    return _in_pieces(fn, count, split, weights, x), (weights, x)


def _piece_gradients(fn, count: int, split: Split, inputs: tuple[Any, Array], dout: Array):
    def own(weights: Any, arrays: tuple[Array, Array]) -> tuple[Any, Array]:
        x, dout = (_cut(a, count) for a in arrays)

        def body(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            dx, sums = carry
            _, pull = jax.vjp(fn, weights, _piece(x, i))
            more, piece = pull(_piece(dx, i))
            sums = jax.tree.map(lambda total, w: total + w.astype(total.dtype), sums, more)
            return _put(dx, i, piece), sums

        # Zeros that are not there before this layer's turn, for the same reason.
        zero = 0.0 * dout[0, 0, 0, 0].astype(jnp.float32)
        sums = jax.tree.map(lambda w: jnp.broadcast_to(zero, w.shape), weights)
        dx, sums = jax.lax.fori_loop(0, count, body, (dout, sums))
        return jax.tree.map(split.sum, sums), dx.reshape(arrays[0].shape)

    weights, x = inputs
    run = split.run(own, (P(), split.parts))
    dweights, dx = run(_cast(weights, x.dtype), (x, dout))
    return jax.tree.map(lambda w, dw: dw.astype(w.dtype), weights, dweights), dx


_in_pieces.defvjp(_keep_inputs, _piece_gradients)


def _cast(weights: Any, dtype) -> Any:
    return jax.tree.map(lambda w: w.astype(dtype), weights)


def _cut(x: Array, count: int) -> Array:
    return x.reshape(len(x), count, -1, x.shape[-1])


def _piece(x: Array, i: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)


def _put(x: Array, i: Array, piece: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, piece, i, 1)


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
        return to_float32("...d,vd->...v", x, w.astype(x.dtype))


class Unembedding(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.w = weight(rngs, (cfg.width, cfg.vocab_size), ("width", "vocab"))

    @staticmethod
    def logits(w: Float[Array, "D V"], x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of words of their own, fp32."""
        return to_float32("...d,dv->...v", x, w.astype(x.dtype))


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
