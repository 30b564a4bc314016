"""What decoding remembers: KV of the FA heads' KV heads, and one fp32 state per LA head."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.tree_util import register_dataclass

from hydrajax.typing import Array, Float, Int


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the KV heads that some FA head reads; row b holds `length[b]` tokens."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    @classmethod
    def empty(cls, batch: int, max_len: int, heads: int, head_dim: int, dtype) -> "KVCache":
        zeros = jnp.zeros((batch, max_len, heads, head_dim), dtype)
        return cls(zeros, zeros)

    def write(self, k: Array, v: Array, at: Int[Array, "B"]) -> "KVCache":
        """Put T new tokens at each row's position `at`; what would fall off the end is dropped."""
        batch, tokens = k.shape[:2]
        rows = jnp.arange(batch)[:, None]
        cols = at[:, None] + jnp.arange(tokens)[None, :]
        return KVCache(
            self.k.at[rows, cols].set(k.astype(self.k.dtype), mode="drop"),
            self.v.at[rows, cols].set(v.astype(self.v.dtype), mode="drop"),
        )


@dataclass(frozen=True)
class DeltaState:
    """Recurrent memory of a layer's LA heads, and the last W - 1 inputs of their convolution."""

    state: Float[Array, "B R H E"]  # fp32
    conv: Float[Array, "B W-1 Ch"] | None


@dataclass(frozen=True)
class LayerState:
    kv: KVCache | None
    delta: DeltaState | None


@dataclass(frozen=True)
class DecodeState:
    """All layers' memory. `fresh` is static: an empty cache lets prefill skip reading it."""

    layers: tuple[LayerState, ...]
    length: Int[Array, "B"]
    fresh: bool = False

    def nbytes(self) -> int:
        """Bytes held per sequence, counters apart: the measured side of head_plan.cache_bytes."""
        arrays = [
            a
            for layer in self.layers
            for part in (layer.kv, layer.delta)
            if part is not None
            for a in vars(part).values()
            if a is not None
        ]
        return sum(a.nbytes for a in arrays) // self.length.shape[0]


register_dataclass(KVCache, ["k", "v"], [])
register_dataclass(DeltaState, ["state", "conv"], [])
register_dataclass(LayerState, ["kv", "delta"], [])
register_dataclass(DecodeState, ["layers", "length"], ["fresh"])
