"""FullHeads: the query heads of a layer that keep softmax attention.

    s_t = ln(t + a) / ln a                                 (fa_logit_scale; t inside the document)
    o   = softmax_causal(s_t q k^T / sqrt(H)) v            z = sigmoid(x W_z + b_z)

HydraHead (2606.20097) §FA branch; the logit scale and NoPE follow HALO (2601.22156).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrajax.cache import KVCache
from hydrajax.config import HydraConfig, KernelConfig, ModelConfig
from hydrajax.head_plan import LayerPlan
from hydrajax.layers import (
    Sequence,
    apply_rope,
    constant,
    project,
    rms_norm,
    take_heads,
    weight,
)
from hydrajax.sharding import constrain, devices_of, per_device
from hydrajax.typing import Array, Float, Int
from pallas_kernels import attention, attention_step

# Key heads are split like the query heads that read them, or neither is; tokens and keys likewise.
_HEADS = ("batch", "tokens", "fa_heads", None)
_AXES = {
    "q": _HEADS,
    "k": _HEADS,
    "v": _HEADS,
    "segment_ids": ("batch", "tokens"),
    "q_offset": ("batch",),
}
_CACHE = ("batch", None, "fa_heads", None)
_STEP_AXES = {
    "q": ("batch", "fa_heads", None),
    "k_cache": _CACHE,
    "v_cache": _CACHE,
    "lengths": ("batch",),
}


class FullHeads(nnx.Module):
    """A FA heads over their kept KV heads; heads are always an axis."""

    def __init__(
        self,
        cfg: ModelConfig,
        hydra: HydraConfig,
        plan: LayerPlan,
        layer: int,
        kernels: KernelConfig,
        rngs: nnx.Rngs,
    ):
        d, h, a = cfg.width, cfg.head_dim, len(plan.fa)
        self.hydra, self.eps, self.head_dim = hydra, cfg.norm_eps, h
        self.implementation = kernels.attention or None
        self.rope_dims = _rope_dims(hydra.fa_pos, h, layer in cfg.no_rope_layers)
        # kv_of[i] is the position, among the keys this layer holds, of FA head i's key.
        self.kv_of = tuple(range(a)) if hydra.fa_kv == "expanded" else plan.fa_to_kv
        self.num_kv = a if hydra.fa_kv == "expanded" else len(plan.kv_fa)

        heads, kv_heads = ("fa_heads", None), ("fa_kv_heads", None)
        self.w_q = weight(rngs, (d, a, h), ("width", *heads))
        self.b_q = constant((a, h), heads) if cfg.qkv_bias else None
        if hydra.qkv_split:
            self.w_k = weight(rngs, (d, self.num_kv, h), ("width", *kv_heads))
            self.w_v = weight(rngs, (d, self.num_kv, h), ("width", *kv_heads))
            self.b_k = constant((self.num_kv, h), kv_heads) if cfg.qkv_bias else None
            self.b_v = constant((self.num_kv, h), kv_heads) if cfg.qkv_bias else None
        self.q_norm = constant((h,), (None,), 1.0) if cfg.qk_norm else None
        self.k_norm = constant((h,), (None,), 1.0) if cfg.qk_norm else None
        gated = hydra.fa_gate != "none"
        shape, axes = ((a, h), heads) if hydra.fa_gate == "sigmoid" else ((a,), heads[:1])
        self.w_z = weight(rngs, (d, *shape), ("width", *axes)) if gated else None
        self.b_z = constant(shape, axes) if gated else None

    def __call__(
        self, x: Float[Array, "B T D"], seq: Sequence, kv: tuple[Array, Array] | None
    ) -> Float[Array, "B T A H"]:
        """Head outputs of a whole sequence; `kv` are raw keys and values when they are tied."""
        q, k, v = self.qkv(x, seq, kv)
        return self._attend(q, k, v, segment_ids=seq.segment_ids)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        seq: Sequence,
        kv,
        cache: KVCache,
        at: Int[Array, "B"] | None,
    ) -> tuple[Float[Array, "B T A H"], KVCache]:
        """Append T tokens at each row's position `at`; `None` says that the cache is empty."""
        q, k, v = self.qkv(x, seq, kv)
        if at is None:
            start = jnp.zeros(x.shape[0], jnp.int32)
            return self._attend(q, k, v), cache.write(k, v, start)
        cache = cache.write(k, v, at)
        return self._attend(q, cache.k, cache.v, q_offset=at), cache

    def step(
        self, x: Float[Array, "B 1 D"], seq: Sequence, kv, cache: KVCache, at: Int[Array, "B"]
    ) -> tuple[Float[Array, "B 1 A H"], KVCache]:
        """One token a row against its cache."""
        q, k, v = self.qkv(x, seq, kv)
        cache = cache.write(k, v, at)
        # Queries are padded to whole groups instead of copying keys: at decode the keys are the
        # traffic. Slot [kv, g] of the padded layout holds a query head or a dummy.
        slots, back = _group_slots(self.kv_of, self.num_kv)
        grouped = q[:, 0, np.maximum(slots, 0)] * (slots >= 0).astype(q.dtype)[None, :, None]
        step = functools.partial(attention_step, scale=self.head_dim**-0.5)
        (out,) = per_device(lambda **x: (step(**x),), _STEP_AXES, (_STEP_AXES["q"],))(
            q=grouped, k_cache=cache.k, v_cache=cache.v, lengths=at + 1
        )
        return out[:, None, back], cache

    def gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T A H"] | None:
        """Output gate z; [B, T, A, 1] when it is one number a head."""
        if self.w_z is None:
            return None
        if self.hydra.fa_gate == "headwise":
            return jax.nn.sigmoid(project("btd,da->bta", x, self.w_z, self.b_z))[..., None]
        return jax.nn.sigmoid(project("btd,dah->btah", x, self.w_z, self.b_z))

    def qkv(
        self, x: Array, seq: Sequence, kv: tuple[Array, Array] | None
    ) -> tuple[Array, Array, Array]:
        """Queries (scaled by s_t where that is on), keys and values with norm and positions."""
        q = project("btd,dah->btah", x, self.w_q, self.b_q)
        if kv is None:
            k = project("btd,dkh->btkh", x, self.w_k, self.b_k)
            v = project("btd,dkh->btkh", x, self.w_v, self.b_v)
        else:
            k, v = kv
        if self.q_norm is not None:
            q = rms_norm(q, self.q_norm[...], self.eps)
            k = rms_norm(k, self.k_norm[...], self.eps)
        q, k = apply_rope(q, seq, self.rope_dims), apply_rope(k, seq, self.rope_dims)
        mode, base = self.hydra.fa_logit_scale, self.hydra.fa_logit_base
        if mode == "always" or (mode == "eval" and not seq.training):
            s_BT = jnp.log(seq.positions.astype(jnp.float32) + base) / math.log(base)
            q = (q.astype(jnp.float32) * s_BT[:, :, None, None]).astype(q.dtype)
        return (
            constrain(q, "batch", "tokens", "fa_heads", None),
            constrain(k, "batch", "tokens", "fa_kv_heads", None),
            constrain(v, "batch", "tokens", "fa_kv_heads", None),
        )

    def _attend(self, q, k, v, **optional) -> Array:
        run = functools.partial(
            attention, scale=self.head_dim**-0.5, implementation=self.implementation
        )
        optional = {name: x for name, x in optional.items() if x is not None}
        return per_device(lambda **arrays: (run(**arrays),), _AXES, (_HEADS,))(
            q=q, k=self._spread(k), v=self._spread(v), **optional
        )[0]

    def _spread(self, k: Float[Array, "B S K H"]) -> Array:
        """Keys as the op wants them: one per query head where groups are ragged, or where devices
        split the query heads and cannot split the keys with them; else as they are."""
        heads = len(self.kv_of)
        group, rest = divmod(heads, self.num_kv)
        parts = devices_of("fa_heads")
        together = self.num_kv % parts == 0 or heads % parts
        if together and rest == 0 and self.kv_of == tuple(i // group for i in range(heads)):
            return k
        return take_heads(k, self.kv_of)


def _rope_dims(fa_pos: str, head_dim: int, no_rope: bool) -> int:
    """Rotated dims of FA heads; a layer without rope in the teacher keeps none."""
    if no_rope or fa_pos == "nope":
        return 0
    return head_dim if fa_pos == "rope" else head_dim // 4


def _group_slots(kv_of: tuple[int, ...], num_kv: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded query order for equal groups: slots[j] is a query head or -1; back undoes it."""
    group = max(kv_of.count(j) for j in range(num_kv))
    slots = np.full((num_kv, group), -1)
    back = np.zeros(len(kv_of), int)
    filled = [0] * num_kv
    for head, kv in enumerate(kv_of):
        slots[kv, filled[kv]] = head
        back[head] = kv * group + filled[kv]
        filled[kv] += 1
    return slots.reshape(-1), back
