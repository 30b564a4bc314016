"""HydraAttention: a layer's heads split by plan, fused at one scale, mixed by the teacher's W_O.

    O^ = O / sqrt(mean_H O^2 + 1e-6) * w      O~ = gamma_n O^ z      y = concat_n(O~) W_O

HydraHead (2606.20097) Eq. 13-14; the other `fusion` modes are the ablations and the peers'.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrajax.attention import FullHeads
from hydrajax.cache import KVCache, LayerState
from hydrajax.config import HydraConfig, KernelConfig, ModelConfig
from hydrajax.deltanet import LinearHeads
from hydrajax.head_plan import LayerPlan
from hydrajax.layers import Sequence, constant, project, rms_norm, take_heads, weight
from hydrajax.sharding import constrain
from hydrajax.typing import Array, Float, Int

FUSION_EPS = 1e-6
NORM_ALL = ("scale_norm", "gated_competition")  # modes that normalise FA heads too


class Fusion(nnx.Module):
    """Brings both branches to one scale, per head.

    scale_norm          norm and gamma on every head (paper)
    la_only_norm        norm and gamma on LA heads; FA heads pass untouched
    scale_only          gamma on every head, no norm
    gated_competition   norm on every head, N softmax_n(x W_c) in place of gamma
    joint_norm          one RMSNorm over all LA channels, none on FA (HALO's code)
    layer_norm_adapter  a LayerNorm per LA head, none on FA (2602.11374)
    none                plain concatenation
    """

    def __init__(self, cfg: ModelConfig, hydra: HydraConfig, plan: LayerPlan, rngs: nnx.Rngs):
        mode, n, h, r = hydra.fusion, plan.num_heads, cfg.head_dim, len(plan.la)
        self.mode, self.gate_pos, self.plan = mode, hydra.gate_pos, plan
        per_head = hydra.norm_weight == "per_head"
        weighted = hydra.norm_weight != "none"
        fa_norm = mode in NORM_ALL and weighted and bool(plan.fa)
        la_norm = (mode in NORM_ALL or mode == "la_only_norm") and weighted and r > 0
        la_other = mode in ("joint_norm", "layer_norm_adapter") and r > 0
        fa_shape = (len(plan.fa), h) if per_head else (h,)
        la_shape = (r, h) if per_head or la_other else (h,)
        gammas = {"scale_norm": n, "scale_only": n, "la_only_norm": r}.get(mode, 0)

        def scale(shape: tuple, heads: str) -> nnx.Param:
            return constant(shape, (None,) if len(shape) == 1 else (heads, None), 1.0)

        self.w_fa = scale(fa_shape, "fa_heads") if fa_norm else None
        self.w_la = scale(la_shape, "la_heads") if la_norm or la_other else None
        adapter = mode == "layer_norm_adapter" and r > 0
        self.bias_la = constant((r, h), ("la_heads", None)) if adapter else None
        self.gamma = constant((gammas,), ("heads",), 1.0) if gammas else None
        competing = mode == "gated_competition"
        self.w_c = weight(rngs, (cfg.width, n), ("width", "heads")) if competing else None

    def __call__(self, x: Array, fa: tuple | None, la: tuple | None) -> Float[Array, "B T N H"]:
        """Fuse (output, gate) of each branch; a branch without heads is None."""
        share = None
        if self.w_c is not None:
            logits = jnp.einsum("btd,dn->btn", x.astype(jnp.float32), self.w_c[...])
            share = self.plan.num_heads * jax.nn.softmax(logits, axis=-1)
        parts = []
        if fa is not None:
            normed = self.mode in NORM_ALL
            gamma = self._gamma(share, self.plan.fa) if self.mode != "la_only_norm" else None
            parts.append(self._branch(*fa, self.w_fa, normed, gamma))
        if la is not None:
            normed = self.mode in NORM_ALL or self.mode == "la_only_norm"
            heads = tuple(range(len(self.plan.la))) if self.mode == "la_only_norm" else self.plan.la
            parts.append(
                self._branch(*la, self.w_la, normed, self._gamma(share, heads), is_la=True)
            )
        if len(parts) == 1:
            return parts[0]
        return take_heads(jnp.concatenate(parts, axis=2), self.plan.restore)

    def _gamma(self, share: Array | None, heads: tuple[int, ...]) -> Array | None:
        """[..., heads] scale of a branch: learned, or each token's share in the competition."""
        if share is not None:
            return share[:, :, np.array(heads)]
        return None if self.gamma is None else self.gamma[...][np.array(heads)]

    def _branch(self, o: Array, z: Array | None, w, normed: bool, gamma, is_la=False) -> Array:
        dtype = o.dtype
        if z is not None and self.gate_pos == "pre_norm":
            o = o * z.astype(dtype)
        if normed:
            o = rms_norm(o.astype(jnp.float32), None, FUSION_EPS)
            o = o if w is None else o * w[...]
        elif is_la and self.mode == "joint_norm":
            flat = rms_norm(o.astype(jnp.float32).reshape(*o.shape[:2], -1), None, FUSION_EPS)
            o = flat.reshape(o.shape) * w[...]
        elif is_la and self.mode == "layer_norm_adapter":
            centred = o.astype(jnp.float32) - jnp.mean(o, axis=-1, keepdims=True, dtype=jnp.float32)
            o = rms_norm(centred, None, FUSION_EPS) * w[...] + self.bias_la[...]
        if gamma is not None:
            o = o * gamma[..., None]
        if z is not None and self.gate_pos == "post_norm":
            o = o * z.astype(o.dtype)
        return o.astype(dtype)


class TiedKV(nnx.Module):
    """K and V projections that both branches read (`qkv_split=False`)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, k, h = cfg.width, cfg.num_kv_heads, cfg.head_dim
        axes = ("fa_kv_heads", None)
        self.w_k = weight(rngs, (d, k, h), ("width", *axes))
        self.w_v = weight(rngs, (d, k, h), ("width", *axes))
        self.b_k = constant((k, h), axes) if cfg.qkv_bias else None
        self.b_v = constant((k, h), axes) if cfg.qkv_bias else None

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        k = project("btd,dkh->btkh", x, self.w_k, self.b_k)
        return k, project("btd,dkh->btkh", x, self.w_v, self.b_v)


class HydraAttention(nnx.Module):
    """One attention block; a plan without FA or without LA heads simply lacks that branch."""

    def __init__(
        self,
        cfg: ModelConfig,
        hydra: HydraConfig,
        plan: LayerPlan,
        layer: int,
        kernels: KernelConfig,
        rngs: nnx.Rngs,
    ):
        n, h, d = cfg.num_heads, cfg.head_dim, cfg.width
        self.plan = plan
        self.fa = FullHeads(cfg, hydra, plan, layer, kernels, rngs) if plan.fa else None
        self.la = LinearHeads(cfg, hydra, plan, layer, kernels, rngs) if plan.la else None
        self.kv = None if hydra.qkv_split else TiedKV(cfg, rngs)
        self.fusion = Fusion(cfg, hydra, plan, rngs)
        self.w_o = weight(rngs, (n, h, d), ("heads", None, "width"))
        self.b_o = constant((d,), (None,)) if cfg.out_bias else None

    def __call__(self, x: Float[Array, "B T D"], seq: Sequence) -> tuple[Array, Array]:
        """(y [B,T,D] after W_O, head outputs [B,T,N,H] before it, in the original head order)."""
        return self.mix(x, *self.branches(x, seq))

    def branches(
        self, x: Float[Array, "B T D"], seq: Sequence
    ) -> tuple[tuple | None, tuple | None]:
        """(output, gate) of the FA and of the LA heads, before fusion."""
        kv_fa, kv_la = self.tied(x)
        fa = la = None
        if self.fa is not None:
            fa = (self.fa(x, seq, kv_fa), self.fa.gate(x))
        if self.la is not None:
            la = (self.la(x, seq, kv_la), self.la.gate(x))
        return fa, la

    def mix(self, x: Array, fa: tuple | None, la: tuple | None) -> tuple[Array, Array]:
        """Fusion and W_O."""
        o_BTNH = constrain(self.fusion(x, fa, la), "batch", "tokens", "heads", None)
        y = project("btnh,nhd->btd", o_BTNH, self.w_o, self.b_o)
        return constrain(y, "batch", "tokens", None), o_BTNH

    def prefill(
        self, x: Array, seq: Sequence, state: LayerState, at: Int[Array, "B"] | None
    ) -> tuple[Array, LayerState]:
        return self._cached("prefill", x, seq, state, at)

    def step(
        self, x: Array, seq: Sequence, state: LayerState, at: Int[Array, "B"]
    ) -> tuple[Array, LayerState]:
        return self._cached("step", x, seq, state, at)

    def empty(self, batch: int, max_len: int, dtype) -> LayerState:
        kv = delta = None
        if self.fa is not None:
            kv = KVCache.empty(batch, max_len, self.fa.num_kv, self.fa.head_dim, dtype)
        if self.la is not None:
            delta = self.la.empty(batch, dtype)
        return LayerState(kv, delta)

    def _cached(self, method: str, x, seq, state: LayerState, at) -> tuple[Array, LayerState]:
        kv_fa, kv_la = self.tied(x)
        fa = la = None
        kv, delta = state.kv, state.delta
        if self.fa is not None:
            o, kv = getattr(self.fa, method)(x, seq, kv_fa, kv, at)
            fa = (o, self.fa.gate(x))
        if self.la is not None:
            o, delta = getattr(self.la, method)(x, seq, kv_la, delta)
            la = (o, self.la.gate(x))
        y, _ = self.mix(x, fa, la)
        return y, LayerState(kv, delta)

    def tied(self, x: Array) -> tuple[tuple | None, tuple | None]:
        """Raw K, V for each branch where they are tied, picked from the teacher's KV heads."""
        if self.kv is None:
            return None, None
        k, v = self.kv(x)
        pick_fa, pick_la = np.array(self.plan.kv_fa, int), np.array(self.plan.kv_la, int)
        return (k[:, :, pick_fa], v[:, :, pick_fa]), (k[:, :, pick_la], v[:, :, pick_la])
