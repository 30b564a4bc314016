"""Model: a decoder LM whose attention blocks follow a head plan; all-full it is the teacher.

Modules give structure only. Outside of them parameters are one flat dict, path -> array:
`graphdef, params = split_params(model)`, and inside a jitted function `bind(graphdef, params)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from hydrajax.cache import DecodeState
from hydrajax.config import HydraConfig, KernelConfig, ModelConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.hydra import HydraAttention
from hydrajax.layers import (
    Embedding,
    RMSNorm,
    Sequence,
    SwiGLU,
    Unembedding,
    in_pieces,
    rope_tables,
)
from hydrajax.sharding import HOST, constrain
from hydrajax.typing import Array, Float, Int, Params, UserError

TAPS = ("attn_in", "attn_out", "head_out", "resid")

DEFAULT_KERNELS = KernelConfig()

# Tokens of a device that are in an MLP at a time: their inner activations are three widths each,
# and as many gradients, beside all that the attention of the layer keeps.
MLP_TOKENS = 16_384

BLOCK_INPUT = "block_input"  # as `checkpoint_name` marks it for REMAT["host"]

# Where tokens are split, a GDN layer's states between devices are kept: small, and dear to redo.
_KEPT = ["gdn_parts"]
_PARTS = jax.checkpoint_policies.save_only_these_names(*_KEPT)
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _PARTS
    ),
    "block": _PARTS,
    "host": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=_KEPT,
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst=HOST,
    ),
}


@dataclass
class Taps:
    """Inner values of a forward pass, each a tuple over layers; empty unless asked for.

    attn_in [B,T,D] after the input norm, attn_out [B,T,D] after W_O, head_out [B,T,N,H] before
    W_O, resid [B,T,D] the block's input. With `tap_at` T is the number of gathered positions.
    """

    attn_in: tuple = ()
    attn_out: tuple = ()
    head_out: tuple = ()
    resid: tuple = ()


jax.tree_util.register_dataclass(Taps, list(TAPS), [])


class Block(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, attn: HydraAttention, rngs: nnx.Rngs, remat: str):
        self.redo = remat not in ("none", "dots")  # all of a block, its matmuls too
        self.attn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attn = attn
        self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = SwiGLU(cfg, rngs)

    def __call__(self, x: Float[Array, "B T D"], seq: Sequence) -> tuple[Array, dict[str, Array]]:
        """The block's output and everything that can be tapped."""
        attn_in = self.attn_norm(x)
        attn_out, head_out = self.attn(attn_in, seq)
        taps = {"attn_in": attn_in, "attn_out": attn_out, "head_out": head_out, "resid": x}
        return self.after_attention(x + attn_out), taps

    def after_attention(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The MLP half; where blocks are redone, of many tokens a piece at a time."""
        if self.redo and x.ndim == 3:
            graph, weights = nnx.split((self.mlp_norm, self.mlp))

            def half(weights: nnx.State, x: Array) -> Array:
                norm, mlp = nnx.merge(graph, weights)
                return x + mlp(norm(x))

            return constrain_rows(in_pieces(half, weights, x, MLP_TOKENS))
        return constrain_rows(x + self.mlp(self.mlp_norm(x)))


def constrain_rows(x: Array) -> Array:
    return constrain(x, "batch", "tokens", *(None,) * (x.ndim - 2))


class Model(nnx.Module):
    """Decoder LM. `dtype` is the compute dtype; parameters are fp32 masters."""

    def __init__(
        self,
        cfg: ModelConfig,
        hydra: HydraConfig,
        plan: HeadPlan,
        *,
        dtype=jnp.bfloat16,
        remat: str = "none",
        kernels: KernelConfig = DEFAULT_KERNELS,
        rngs: nnx.Rngs,
    ):
        plan.fits(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
        self.cfg, self.hydra, self.plan = cfg, hydra, plan
        self.dtype, self.remat = dtype, remat
        self.embed = Embedding(cfg, dtype, rngs)
        self.layers = nnx.List(
            [
                Block(cfg, HydraAttention(cfg, hydra, plan.layer(l), l, kernels, rngs), rngs, remat)
                for l in range(cfg.num_layers)
            ]
        )
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.unembed = None if cfg.tied_embeddings else Unembedding(cfg, rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        training: bool = False,
    ) -> Float[Array, "B T V"]:
        """fp32 logits. Use `hidden` and a chunked loss where [B, T, V] would be too large."""
        x, _ = self.hidden(tokens, segment_ids=segment_ids, positions=positions, training=training)
        return self.logits(x)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        training: bool = False,
        taps: tuple[str, ...] = (),
        tap_at: Int[Array, "B P"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Taps]:
        """Hidden states after the final norm, and the named taps (at positions `tap_at`)."""
        seq = self.sequence(tokens.shape, segment_ids, positions, training)

        def run(block: Block, x: Array) -> tuple[Array, dict[str, Array]]:
            x, seen = block(checkpoint_name(x, BLOCK_INPUT), seq)
            kept = {name: seen[name] for name in taps}
            return x, kept if tap_at is None else {k: _gather(v, tap_at) for k, v in kept.items()}

        x = constrain_rows(self.embed(tokens))
        tapped = []
        for l, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{l}"):
                if self.remat == "none":
                    x, kept = run(block, x)
                else:
                    step = jax.checkpoint(lambda x, b=block: run(b, x), policy=REMAT[self.remat])
                    x, kept = step(x)
            tapped.append(kept)
        return self.norm(x), Taps(**{name: tuple(t[name] for t in tapped) for name in taps})

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Unembedding of hidden states, fp32."""
        logits, words = self.unembedding()
        return logits(words, x)

    def unembedding(self) -> tuple[Callable[[Array, Array], Array], Array]:
        """`logits(words, x)` and the words, for losses that walk over tokens with them."""
        layer = self.embed if self.unembed is None else self.unembed
        return layer.logits, layer.w[...]

    def sequence(
        self, shape: tuple[int, int], segment_ids=None, positions=None, training: bool = False
    ) -> Sequence:
        """Positions and rotary tables that all layers share."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        cos, sin = rope_tables(self.cfg.rope, self.cfg.head_dim, positions)
        return Sequence(positions, segment_ids, cos, sin, training)

    def init_state(self, batch: int, max_len: int) -> DecodeState:
        """Empty memory for `max_len` tokens a row."""
        layers = tuple(block.attn.empty(batch, max_len, self.dtype) for block in self.layers)
        return DecodeState(layers, jnp.zeros(batch, jnp.int32), fresh=True)

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        state: DecodeState,
        *,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], DecodeState]:
        """Read a prompt, or more of one; rows are right-padded to T with `lengths` real tokens.

        Returns the logits after each row's last real token and the state to go on from.
        """
        batch, length = tokens.shape
        lengths = jnp.full((batch,), length, jnp.int32) if lengths is None else lengths
        offsets = jnp.arange(length, dtype=jnp.int32)[None, :]
        is_token = (offsets < lengths[:, None]).astype(jnp.int32)
        seq = self.sequence((batch, length), is_token, state.length[:, None] + offsets)
        at = None if state.fresh else state.length
        x, layers = self.embed(tokens), []
        for block, memory in zip(self.layers, state.layers, strict=True):
            y, memory = block.attn.prefill(block.attn_norm(x), seq, memory, at)
            x = block.after_attention(x + y)
            layers.append(memory)
        last = _gather(x, jnp.maximum(lengths - 1, 0)[:, None])[:, 0]
        logits = self.logits(self.norm(last))
        return logits, DecodeState(tuple(layers), state.length + lengths)

    def step(
        self, tokens: Int[Array, "B"], state: DecodeState
    ) -> tuple[Float[Array, "B V"], DecodeState]:
        """One token a row: logits for the next one, and the new state."""
        at = state.length
        seq = self.sequence((tokens.shape[0], 1), None, at[:, None])
        x, layers = self.embed(tokens[:, None]), []
        for block, memory in zip(self.layers, state.layers, strict=True):
            y, memory = block.attn.step(block.attn_norm(x), seq, memory, at)
            x = block.after_attention(x + y)
            layers.append(memory)
        logits = self.logits(self.norm(x[:, 0]))
        return logits, replace(state, layers=tuple(layers), length=at + 1, fresh=False)


def _gather(x: Float[Array, "B T ..."], at: Int[Array, "B P"]) -> Float[Array, "B P ..."]:
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def abstract_model(cfg: ModelConfig, hydra: HydraConfig, plan: HeadPlan, **kwargs) -> Model:
    """A model of shapes only: no memory, no random numbers drawn."""
    return nnx.eval_shape(lambda: Model(cfg, hydra, plan, rngs=nnx.Rngs(0), **kwargs))


def init_params(
    cfg: ModelConfig, hydra: HydraConfig, plan: HeadPlan, seed: int, **kwargs
) -> tuple[nnx.GraphDef, Params]:
    """Structure and fresh fp32 parameters.

    Drawn one by one: a program that draws them all takes minutes to compile for a deep model,
    while arrays of one shape share one small program.
    """
    return split_params(Model(cfg, hydra, plan, rngs=nnx.Rngs(seed), **kwargs))


def split_params(model: Model) -> tuple[nnx.GraphDef, Params]:
    """Structure and flat parameters; leaves are ShapeDtypeStructs for an abstract model."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, {_path(p): v.get_value() for p, v in nnx.to_flat_state(state)}


def bind(graphdef: nnx.GraphDef, params: Params) -> Model:
    """The model again, usable inside jit: parameters are traced values."""
    flat = [(_key(path), nnx.Param(value)) for path, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def logical_axes(model: Model) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every parameter path, as declared where it was made."""
    _, state = nnx.split(model, nnx.Param)
    return {_path(p): v.get_metadata()["axes"] for p, v in nnx.to_flat_state(state)}


def _path(key: tuple) -> str:
    return ".".join(map(str, key))


def _key(path: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in path.split("."))


def load_model(run, *, dtype=jnp.bfloat16, **kwargs) -> tuple[nnx.GraphDef, Params]:
    """Graph and parameters of a loaded run (checkpoint.Run), with the switches its stage used.

    Raises UserError listing paths when the stored parameters are not this model's.
    """
    info = run.info
    stage = info.run["stage"] if info.run else ""
    model = abstract_model(
        info.model, info.hydra.for_stage(stage), info.plan, dtype=dtype, **kwargs
    )
    graphdef, abstract = split_params(model)
    wrong = sorted(set(abstract) ^ set(run.params)) or sorted(
        path for path, a in abstract.items() if a.shape != run.params[path].shape
    )
    if wrong:
        raise UserError(f"{info.path}: parameters do not fit its config.json, e.g. {wrong[:5]}.")
    return graphdef, run.params
