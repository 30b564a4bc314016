"""Learned gates: how much of full attention a KV head needs, after DuoAttention (2410.10819).

    o_k  = α_k full_k + (1 - α_k) streaming_k          streaming: first 128 and last 256 tokens
    loss = mean (h - h_full)² at the answer + 0.05 mean α         h after the final norm

α starts at 1 and is clipped to [0, 1]; Adam at 0.02 with a fifth of the steps rising and a fifth
falling. Nothing else is trained. The heads of a KV group share a gate, since they share a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hydrajax.layers import Sequence
from hydrajax.model import Block, Model
from hydrajax.selection import streams
from hydrajax.selection.probes import Batch
from hydrajax.typing import Array, Float

SINKS, RECENT = 128, 256
PULL = 0.05  # weight of mean α
RATE = 0.02


def learn_gates(model: Model, parts: list[Batch], steps: int) -> Float[np.ndarray, "L K"]:
    """Gates after `steps` steps, one batch of prompts each, in turn."""
    shape = (len(model.layers), model.cfg.num_kv_heads)
    edge = max(steps // 5, 1)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, RATE, edge),
            optax.constant_schedule(RATE),
            optax.linear_schedule(RATE, 0.0, edge),
        ],
        [edge, max(steps - edge, edge)],
    )
    tx = optax.adam(rate)

    @jax.jit
    def step(model, alpha, state, batch):
        grads = jax.grad(_loss)(alpha, model, batch)
        updates, state = tx.update(grads, state)
        return jnp.clip(alpha + updates, 0, 1), state

    alpha = jnp.ones(shape)
    state = tx.init(alpha)
    for i in range(steps):
        alpha, state = step(model, alpha, state, parts[i % len(parts)])
    return jax.device_get(alpha)


def _loss(alpha: Float[Array, "L K"], model: Model, batch: Batch) -> Array:
    x = full = model.embed(batch.clean)
    seq = model.sequence(batch.clean.shape, batch.segment_ids)
    for l, block in enumerate(model.layers):
        full = block(full, seq)[0]
        x = jax.checkpoint(lambda x, a, b=block: _gated(b, x, a, seq))(x, alpha[l])
    h, want = (model.norm(streams.gather(y, batch.at)) for y in (x, full))
    real = (batch.weight > 0)[..., None]
    error = jnp.sum(jnp.where(real, jnp.square(h - want), 0)) / (real.sum() * h.shape[-1])
    return error + PULL * alpha.mean()


def _gated(block: Block, x: Float[Array, "B T D"], alpha: Float[Array, "K"], seq: Sequence):
    """A block whose heads mix full with streaming attention."""
    attn_in = block.attn_norm(x)
    y_BTD, o_BTNH = block.attn(attn_in, seq)
    o_BTKGH = o_BTNH.reshape(*o_BTNH.shape[:2], len(alpha), -1, o_BTNH.shape[-1])
    local_BTKGH = streaming(
        *block.attn.fa.qkv(attn_in, seq, None), seq.segment_ids, sinks=SINKS, recent=RECENT
    )
    change_BTKGH = (1 - alpha)[:, None, None] * (local_BTKGH - o_BTKGH)
    w_NHD = block.attn.w_o[...].astype(x.dtype)
    y_BTD = y_BTD + jnp.einsum("btnh,nhd->btd", change_BTKGH.reshape(o_BTNH.shape), w_NHD)
    return block.after_attention(x + y_BTD)


def streaming(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Array,
    *,
    sinks: int,
    recent: int,
) -> Float[Array, "B T K G H"]:
    """Attention to the first `sinks` and the last `recent` tokens, `recent` queries at a time.

    Memory is O(T): a tile holds its queries against the sinks, their block and the one before.
    """
    rows, tokens, _, dim = q.shape
    blocks = -(-tokens // recent)
    long = (0, blocks * recent - tokens)
    q_BTKGH = q.reshape(rows, tokens, k.shape[2], -1, dim)
    q_BTKGH = jnp.pad(q_BTKGH, ((0, 0), long, (0, 0), (0, 0), (0, 0)))
    first = min(sinks, tokens)
    padded = [jnp.pad(a, ((0, 0), (recent, long[1]), (0, 0), (0, 0))) for a in (k, v)]
    real = jnp.pad(segment_ids > 0, ((0, 0), (recent, long[1])))

    def tile(i: Array) -> Float[Array, "B C K G H"]:
        start = i * recent
        near = [jax.lax.dynamic_slice_in_dim(a, start, 2 * recent, axis=1) for a in padded]
        keys, values = (
            jnp.concatenate([a[:, :first], b], 1) for a, b in zip((k, v), near, strict=True)
        )
        t = start + jnp.arange(recent)
        s = jnp.concatenate([jnp.arange(first), start - recent + jnp.arange(2 * recent)])
        behind = t[:, None] - s
        in_window = (behind >= 0) & (behind < recent)
        is_sink = jnp.arange(len(s)) < first
        seen = jnp.where(is_sink, behind >= recent, in_window)  # no key is seen twice
        alive = jax.lax.dynamic_slice_in_dim(real, start, 2 * recent, axis=1)
        alive = jnp.concatenate([segment_ids[:, :first] > 0, alive], axis=1)
        seen_BCS = seen & alive[:, None]
        own = jax.lax.dynamic_slice_in_dim(q_BTKGH, start, recent, axis=1)
        logits = jnp.einsum("bckgh,bskh->bkgcs", own, keys) * dim**-0.5
        # A finite floor: a padded query sees nothing, and its gradient must stay a number.
        weights = jax.nn.softmax(jnp.where(seen_BCS[:, None, None], logits, -1e30), axis=-1)
        return jnp.einsum("bkgcs,bskh->bckgh", weights, values)

    out = jax.lax.map(tile, jnp.arange(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(rows, -1, *out.shape[3:])[:, :tokens]
