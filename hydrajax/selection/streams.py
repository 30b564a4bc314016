"""Streams: a forward pass as a walk over blocks, so that many runs share what they have in common.

The host walks from block to block; each kind of step is one small compiled program that serves
all layers and all passes. Compile time does not grow with depth, a run that differs from the clean
one at layer l starts from the clean residual of layer l, and no more than one layer's head outputs
exist at a time.

Rows are split over the mesh's data axes, and with them their streams; all steps keep the split.

`M` counts the streams of a row, usually one per head; `R` = B·M rows, a row's streams together.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hydrajax.layers import Sequence
from hydrajax.model import Block, Model, constrain_rows
from hydrajax.typing import Array, Float, Int


def begin(model: Model, tokens: Int[Array, "B T"], segment_ids=None, positions=None):
    """Embedded tokens and what all layers know of them."""
    return _embed(model.embed, tokens), model.sequence(tokens.shape, segment_ids, positions)


def widen(seq: Sequence, streams: int) -> Sequence:
    """The same rows, each as often as it has streams."""
    return jax.tree.map(lambda a: jnp.repeat(a, streams, axis=0), seq)


@jax.jit
def tapped(block: Block, x: Float[Array, "B T D"], seq: Sequence) -> tuple[Array, Array, Array]:
    """(the block's output, attention output after W_O, head outputs before it)."""
    after, taps = block(x, seq)
    return after, taps["attn_out"], taps["head_out"]


@jax.jit
def plain(block: Block, x: Float[Array, "R T D"], seq: Sequence) -> Float[Array, "R T D"]:
    """A block as it is."""
    return block(x, seq)[0]


@jax.jit
def shifted(
    block: Block,
    x: Float[Array, "B T D"],
    attn_out: Float[Array, "B T D"],
    delta: Float[Array, "B T M H"],
    heads: Int[Array, "M"],
) -> Float[Array, "R T D"]:
    """A block whose attention output is given, with one head changed in each stream."""
    w_MHD = block.attn.w_o[...][heads].astype(x.dtype)
    change_BMTD = jnp.einsum("btmh,mhd->bmtd", delta, w_MHD)
    x_BMTD = (x + attn_out)[:, None] + change_BMTD
    return block.after_attention(x_BMTD.reshape(-1, *x.shape[1:]))


@jax.jit
def frozen(
    block: Block, x: Float[Array, "R T D"], attn_out: Float[Array, "B T D"]
) -> Float[Array, "R T D"]:
    """A block whose attention output is the clean one, whatever x is."""
    return block.after_attention(x + _per_stream(attn_out, x))


@jax.jit
def carried(
    block: Block,
    x: Float[Array, "R T D"],
    attn_out: Float[Array, "B T D"],
    head_out: Float[Array, "B T N H"],
    live: Float[Array, "N"],
    seq: Sequence,
) -> Float[Array, "R T D"]:
    """As `frozen`, but the heads with live = 1 are recomputed from x."""
    _, o_RTNH = block.attn(block.attn_norm(x), seq)
    change_RTNH = (o_RTNH - _per_stream(head_out, x)) * live[:, None]
    return block.after_attention(x + _per_stream(attn_out, x) + _mixed(block, change_RTNH))


@jax.jit
def given(
    block: Block,
    x: Float[Array, "R T D"],
    other: Float[Array, "R T D"],
    live: Float[Array, "N"],
    seq: Sequence,
) -> Float[Array, "R T D"]:
    """A block on x whose heads with live = 1 say what they say on another residual."""
    attn_out, o_RTNH = block.attn(block.attn_norm(x), seq)
    _, other_RTNH = block.attn(block.attn_norm(other), seq)
    change_RTNH = (other_RTNH - o_RTNH) * live[:, None]
    return block.after_attention(x + attn_out + _mixed(block, change_RTNH))


@jax.jit
def attend_at(
    block: Block, x: Float[Array, "R T D"], seq: Sequence, at: Int[Array, "R P"]
) -> tuple[Float[Array, "R P N H"], Float[Array, "R P N T"]]:
    """Head outputs and attention weights of a few queries: [P, T] a head, never [T, T]."""
    q_RTNH, k_RTKH, v_RTKH = block.attn.fa.qkv(block.attn_norm(x), seq, None)
    q_RPNH = gather(q_RTNH, at)
    rows, places, heads, dim = q_RPNH.shape
    q_RPKGH = q_RPNH.reshape(rows, places, k_RTKH.shape[2], -1, dim)
    logits = jnp.einsum("rpkgh,rtkh->rpkgt", q_RPKGH, k_RTKH) * dim**-0.5
    seen_RPT = jnp.arange(x.shape[1]) <= at[..., None]
    if seq.segment_ids is not None:
        own_RP = gather(seq.segment_ids, at)
        seen_RPT &= seq.segment_ids[:, None] == own_RP[..., None]
    logits = jnp.where(seen_RPT[:, :, None, None], logits.astype(jnp.float32), -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    o_RPKGH = jnp.einsum("rpkgt,rtkh->rpkgh", weights.astype(x.dtype), v_RTKH)
    return o_RPKGH.reshape(q_RPNH.shape), weights.reshape(rows, places, heads, -1)


@jax.jit
def gather(x: Float[Array, "R T ..."], at: Int[Array, "R P"]) -> Float[Array, "R P ..."]:
    """The values at a few positions of each row."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


@jax.jit
def token_sum(x: Float[Array, "B T N H"], segment_ids: Int[Array, "B T"]) -> Array:
    """Sum over real tokens, [N, H] in fp32."""
    real_BT = (segment_ids > 0).astype(jnp.float32)
    return jnp.einsum("btnh,bt->nh", x.astype(jnp.float32), real_BT)


@jax.jit
def final_norm(norm: nnx.Module, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return norm(x)


@partial(jax.jit, static_argnames="streams")
def repeat(x: Array, streams: int) -> Array:
    """Rows [B, ...] as streams [R, ...]."""
    return jnp.repeat(x, streams, axis=0)


def _mixed(block: Block, change: Float[Array, "R T N H"]) -> Float[Array, "R T D"]:
    """What W_O makes of a change of head outputs, without its bias."""
    return jnp.einsum("rtnh,nhd->rtd", change, block.attn.w_o[...].astype(change.dtype))


def _per_stream(x: Float[Array, "B ..."], like: Float[Array, "R ..."]) -> Float[Array, "R ..."]:
    return jnp.repeat(x, like.shape[0] // x.shape[0], axis=0)


@jax.jit
def _embed(embed: nnx.Module, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    return constrain_rows(embed(tokens))
