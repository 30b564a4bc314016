"""LinearHeads: the query heads of a layer that became Gated DeltaNet (2412.06464).

    beta_t = sigmoid(x_t W_b + beta_bias)         g_t = -exp(a_log) softplus(x_t W_a + dt_bias)
    S_t = e^{g_t} (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = H^{-1/2} S_t^T q_t

q and k are projected, convolved, activated, normalised as in the teacher, rotated and brought to
unit length, in this order. Gates, decay and state are fp32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from hydrajax.cache import DeltaState
from hydrajax.config import CONV_WIDTH, HydraConfig, KernelConfig, ModelConfig
from hydrajax.head_plan import LayerPlan
from hydrajax.layers import (
    Sequence,
    apply_rope,
    constant,
    project,
    take_heads,
    weight,
)
from hydrajax.sharding import constrain, per_device
from hydrajax.typing import Array, Float
from pallas_kernels import (
    GatedDeltaConfig,
    causal_conv,
    causal_conv_step,
    gated_delta_rule,
    gated_delta_step,
)

L2_EPS = 1e-6

# Axes of the delta rule's arrays: rows and heads do not mix, tokens by the state between them.
_HEADS = ("batch", "tokens", "la_heads", None)
_STATE = ("batch", "la_heads", None, None)
_RULE_AXES = {
    "q": _HEADS,
    "k": _HEADS,
    "v": _HEADS,
    "g": _HEADS[:3],
    "beta": _HEADS[:3],
    "initial_state": _STATE,
    "segment_ids": ("batch", "tokens"),
}
_CONV_AXES = {
    "x": _HEADS,
    "w": (None, *_HEADS[2:]),
    "initial_state": ("batch", None, *_HEADS[2:]),
    "segment_ids": _RULE_AXES["segment_ids"],
}
_STEP_AXES = {name: _RULE_AXES[name][:1] + _RULE_AXES[name][2:] for name in ("q", "k", "v")} | {
    "g": _STATE[:2],
    "beta": _STATE[:2],
    "state": _STATE,
}


class LinearHeads(nnx.Module):
    """R LA heads, with K and V of their own (mha) or shared as in the teacher (gqa)."""

    def __init__(
        self,
        cfg: ModelConfig,
        hydra: HydraConfig,
        plan: LayerPlan,
        layer: int,
        kernels: KernelConfig,
        rngs: nnx.Rngs,
    ):
        d, h, r = cfg.width, cfg.head_dim, len(plan.la)
        self.hydra, self.eps, self.head_dim = hydra, cfg.norm_eps, h
        self.implementation = kernels.gated_delta_rule or None
        self.conv_implementation = kernels.causal_conv or None
        no_rope = hydra.la_pos == "nope" or layer in cfg.no_rope_layers
        self.rope_dims = 0 if no_rope else h
        self.kv_of = None if hydra.la_kv == "mha" else plan.la_to_kv
        kv = r if hydra.la_kv == "mha" else len(plan.kv_la)
        self.num_heads, self.num_kv = r, kv

        heads, kv_heads = ("la_heads", None), ("la_kv_heads", None)
        self.w_q = weight(rngs, (d, r, h), ("width", *heads))
        self.b_q = constant((r, h), heads) if cfg.qkv_bias else None
        if hydra.qkv_split:
            self.w_k = weight(rngs, (d, kv, h), ("width", *kv_heads))
            self.w_v = weight(rngs, (d, kv, h), ("width", *kv_heads))
            self.b_k = constant((kv, h), kv_heads) if cfg.qkv_bias else None
            self.b_v = constant((kv, h), kv_heads) if cfg.qkv_bias else None
        self.q_norm = constant((h,), (None,), 1.0) if cfg.qk_norm else None
        self.k_norm = constant((h,), (None,), 1.0) if cfg.qk_norm else None
        self.w_z = weight(rngs, (d, r, h), ("width", *heads)) if hydra.la_gate != "none" else None
        self.b_z = constant((r, h), heads) if hydra.la_gate != "none" else None
        self.w_a = weight(rngs, (d, r), ("width", "la_heads"))
        self.w_b = weight(rngs, (d, r), ("width", "la_heads"))
        self.a_log = constant((r,), ("la_heads",))
        self.dt_bias = constant((r,), ("la_heads",))
        self.beta_bias = constant((r,), ("la_heads",))
        self.has_conv = hydra.la_short_conv != "off"
        if self.has_conv:
            std = CONV_WIDTH**-0.5
            self.conv_q = weight(rngs, (CONV_WIDTH, r, h), (None, *heads), std)
            self.conv_k = weight(rngs, (CONV_WIDTH, kv, h), (None, *kv_heads), std)
            self.conv_v = weight(rngs, (CONV_WIDTH, kv, h), (None, *kv_heads), std)

    def __call__(
        self, x: Float[Array, "B T D"], seq: Sequence, kv: tuple[Array, Array] | None
    ) -> Float[Array, "B T R E"]:
        """Head outputs of a whole sequence; documents do not see each other's state."""

        def prepare(raw: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            if self.has_conv:
                raw = self._conv(raw, segment_ids=seq.segment_ids)
            return self._finish(raw, seq)

        # Cheap to do again; else the backward pass would keep q, k and v as they are between.
        q, k, v = jax.checkpoint(prepare)(self._project(x, kv))
        g, beta = self.gates(x, _is_token(seq))
        o, _ = self._rule(q, k, v, g, beta, segment_ids=seq.segment_ids)
        return o

    def prefill(
        self, x: Float[Array, "B T D"], seq: Sequence, kv, memory: DeltaState
    ) -> tuple[Float[Array, "B T R E"], DeltaState]:
        """Go on from `memory`; rows are right-padded, padding (segment 0) leaves no trace."""
        raw, conv = self._project(x, kv), memory.conv
        if conv is not None:
            # The next call needs the last inputs before the padding, not those before the end.
            past = jnp.concatenate([conv.astype(x.dtype), self._flat(raw)], axis=1)
            raw = self._conv(raw, initial_state=conv)
            ends = jnp.sum(seq.segment_ids > 0, axis=1)
            index = ends[:, None] + jnp.arange(CONV_WIDTH - 1)[None, :]
            conv = jnp.take_along_axis(past, index[:, :, None], axis=1)
        q, k, v = self._finish(raw, seq)
        # Segment ids would start a new document, with an empty state, at the padding.
        g, beta = self.gates(x, _is_token(seq))
        o, state = self._rule(q, k, v, g, beta, initial_state=memory.state)
        return o, DeltaState(state, conv)

    def step(
        self, x: Float[Array, "B 1 D"], seq: Sequence, kv, memory: DeltaState
    ) -> tuple[Float[Array, "B 1 R E"], DeltaState]:
        """One token a row."""
        raw, conv = self._project(x, kv), memory.conv
        if conv is not None:
            y, conv = causal_conv_step(
                self._flat(raw)[:, 0], self._taps(x.dtype), conv, activation=self._activation()
            )
            raw = self._unflat(y[:, None])
        q, k, v = self._finish(raw, seq)
        g, beta = self.gates(x, None)
        step = functools.partial(gated_delta_step, scale=self.head_dim**-0.5)
        o, state = per_device(step, _STEP_AXES, (_STEP_AXES["q"], _STATE))(
            q=q[:, 0],
            k=self._spread(k)[:, 0],
            v=self._spread(v)[:, 0],
            g=g[:, 0],
            beta=beta[:, 0],
            state=memory.state,
        )
        return o[:, None], DeltaState(state, conv)

    def empty(self, batch: int, dtype) -> DeltaState:
        h = self.head_dim
        channels = (self.num_heads + 2 * self.num_kv) * h
        conv = jnp.zeros((batch, CONV_WIDTH - 1, channels), dtype) if self.has_conv else None
        return DeltaState(jnp.zeros((batch, self.num_heads, h, h), jnp.float32), conv)

    def gate(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R E"] | None:
        if self.w_z is None:
            return None
        z = project("btd,drh->btrh", x, self.w_z, self.b_z)
        return jax.nn.silu(z) if self.hydra.la_gate == "silu" else jax.nn.sigmoid(z)

    def gates(self, x: Array, is_token: Array | None) -> tuple[Array, Array]:
        """Log decay g <= 0 and write strength beta, [B, T, R] fp32; both 0 on padding."""
        # Stacked, not joined: each device has the columns of its own heads.
        w_DnR = jnp.stack([self.w_a[...], self.w_b[...]], axis=1)
        a, b = jnp.moveaxis(wide_product(x, w_DnR), 2, 0)
        g = -jnp.exp(self.a_log[...]) * jax.nn.softplus(a + self.dt_bias[...])
        beta = jax.nn.sigmoid(b + self.beta_bias[...]) * (2.0 if self.hydra.neg_eigval else 1.0)
        if is_token is not None:
            g, beta = jnp.where(is_token, g, 0.0), jnp.where(is_token, beta, 0.0)
        return g, beta

    def _project(self, x: Array, kv: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        q = project("btd,drh->btrh", x, self.w_q, self.b_q)
        if kv is not None:
            return q, *kv
        k = project("btd,dkh->btkh", x, self.w_k, self.b_k)
        v = project("btd,dkh->btkh", x, self.w_v, self.b_v)
        return q, k, v

    def _finish(self, raw: tuple[Array, Array, Array], seq: Sequence) -> tuple[Array, Array, Array]:
        """Activation (unless the convolution did it), inherited norm, rope, unit length."""
        q, k, v = raw
        if not self.has_conv and self.hydra.la_qkv_act == "silu":
            q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
        q, k = self._unit(q, self.q_norm, seq), self._unit(k, self.k_norm, seq)
        return constrain(q, "batch", "tokens", "la_heads", None), k, v

    def _unit(self, x: Array, scale: nnx.Param | None, seq: Sequence) -> Array:
        """x after the norm, rotated, of unit length, rounded once.

        Rope multiplies lengths by one number, yarn's factor, so both sums over a head are of what
        is before it: then one pass.
        """
        x32 = x.astype(jnp.float32)
        factor = jnp.float32(1.0)
        if scale is not None:
            factor = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
            x32 = x32 * scale[...]
        squares = factor * factor * jnp.sum(x32 * x32, axis=-1, keepdims=True)
        if self.rope_dims:
            squares *= (seq.cos[..., :1] ** 2 + seq.sin[..., :1] ** 2)[:, :, None]
        unit = x32 * (factor * jax.lax.rsqrt(squares + L2_EPS))
        return apply_rope(unit, seq, self.rope_dims).astype(x.dtype)

    def _rule(self, q, k, v, g, beta, **optional) -> tuple[Array, Array]:
        rule = functools.partial(
            gated_delta_rule,
            scale=self.head_dim**-0.5,
            config=GatedDeltaConfig(chunk=self.hydra.chunk or None),
            implementation=self.implementation,
        )
        optional = {name: x for name, x in optional.items() if x is not None}
        return per_device(rule, _RULE_AXES, (_HEADS, _STATE))(
            q=q, k=self._spread(k), v=self._spread(v), g=g, beta=beta, **optional
        )

    def _spread(self, k: Float[Array, "B T K H"]) -> Float[Array, "B T R H"]:
        """One key per LA head; shared KV heads (gqa) come in ragged groups, so they are copied."""
        return k if self.kv_of is None else take_heads(k, self.kv_of)

    def _activation(self) -> str | None:
        return "silu" if self.hydra.la_qkv_act == "silu" else None

    def _taps(self, dtype) -> Float[Array, "W Ch"]:
        return self._flat((self.conv_q[...], self.conv_k[...], self.conv_v[...])).astype(dtype)

    def _conv(self, raw, segment_ids=None, initial_state=None) -> tuple[Array, Array, Array]:
        """Convolve q, k and v apart: joined, their heads would not lie as devices split them."""
        conv = functools.partial(
            causal_conv, activation=self._activation(), implementation=self.conv_implementation
        )

        def op(x, w, initial_state=None, **optional):
            if initial_state is not None:
                optional["initial_state"] = _channels(initial_state)
            y, _ = conv(_channels(x), _channels(w), **optional)
            return (y.reshape(x.shape),)

        run, convolved = per_device(op, _CONV_AXES, (_HEADS,)), []
        taps = (self.conv_q, self.conv_k, self.conv_v)
        states = (None, None, None) if initial_state is None else self._unflat(initial_state)
        for x, w, state in zip(raw, taps, states, strict=True):
            optional = {"initial_state": state, "segment_ids": segment_ids}
            optional = {name: a for name, a in optional.items() if a is not None}
            convolved += run(x=x, w=w[...].astype(x.dtype), **optional)
        return tuple(convolved)

    def _flat(self, raw: tuple[Array, Array, Array]) -> Float[Array, "... Ch"]:
        return jnp.concatenate([_channels(a) for a in raw], axis=-1)

    def _unflat(self, y: Float[Array, "B T Ch"]) -> tuple[Array, Array, Array]:
        h, r, kv = self.head_dim, self.num_heads, self.num_kv
        q, k, v = jnp.split(y, (r * h, (r + kv) * h), axis=-1)
        rows = y.shape[:-1]
        return q.reshape(*rows, r, h), k.reshape(*rows, kv, h), v.reshape(*rows, kv, h)


@jax.custom_vjp
def wide_product(x: Float[Array, "B T D"], w: Float[Array, "D n R"]) -> Float[Array, "B T n R"]:
    """x w in fp32 for a narrow x and fp32 weights.

    Weights, and the gradients that their own are made of, are sums of two in the dtype of x: 16
    bits of them are multiplied where x is bf16. An fp32 product would first write x in fp32.
    """
    return _sum_of_halves("btd,dnr->btnr", x, w)


def _sum_of_halves(equation: str, x: Array, y: Array) -> Array:
    """einsum of x and both halves of y, which its second axis from the end counts."""
    if x.dtype == y.dtype:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
    # A cast there and back is what XLA for GPUs leaves out, and no rest would be left.
    kept = jnp.finfo(x.dtype)
    high = jax.lax.reduce_precision(y, kept.nexp, kept.nmant)
    halves = jnp.concatenate([high, y - high], axis=-2).astype(x.dtype)
    parts = jnp.einsum(equation, x, halves, preferred_element_type=jnp.float32)
    return sum(jnp.split(parts, 2, axis=-2))


def _keep_factors(x: Array, w: Array):
    return wide_product(x, w), (x, w)


def _product_gradients(factors: tuple[Array, Array], dy: Array):
    x, w = factors
    dx = jnp.einsum("btnr,dnr->btd", dy.astype(x.dtype), w.astype(x.dtype))
    return dx, _sum_of_halves("btd,btnr->dnr", x, dy).astype(w.dtype)


wide_product.defvjp(_keep_factors, _product_gradients)


def _channels(x: Float[Array, "... N H"]) -> Float[Array, "... Ch"]:
    return x.reshape(*x.shape[:-2], -1)


def _is_token(seq: Sequence) -> Array | None:
    return None if seq.segment_ids is None else (seq.segment_ids > 0)[:, :, None]
