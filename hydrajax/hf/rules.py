"""The key table: one row per tensor, read forwards by import and backwards by export.

Axes are spelled in shape letters. A word is one axis of the Hugging Face tensor, so "NH D" is a
matrix whose rows run over heads and head dims together. Our side always keeps heads as an axis.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hydrajax.config import ModelConfig

# Hugging Face key, our path, its axes there, its axes here, the flag of ModelConfig it needs.
_EMBEDDINGS = (
    ("model.embed_tokens.weight", "embed.w", "V D", "V D", ""),
    ("model.norm.weight", "norm.scale", "D", "D", ""),
    ("lm_head.weight", "unembed.w", "V D", "D V", "untied"),
)
_LAYER = (
    ("input_layernorm.weight", "attn_norm.scale", "D", "D", ""),
    ("self_attn.q_proj.weight", "attn.fa.w_q", "NH D", "D N H", ""),
    ("self_attn.k_proj.weight", "attn.fa.w_k", "KH D", "D K H", ""),
    ("self_attn.v_proj.weight", "attn.fa.w_v", "KH D", "D K H", ""),
    ("self_attn.o_proj.weight", "attn.w_o", "D NH", "N H D", ""),
    ("self_attn.q_proj.bias", "attn.fa.b_q", "NH", "N H", "qkv_bias"),
    ("self_attn.k_proj.bias", "attn.fa.b_k", "KH", "K H", "qkv_bias"),
    ("self_attn.v_proj.bias", "attn.fa.b_v", "KH", "K H", "qkv_bias"),
    ("self_attn.o_proj.bias", "attn.b_o", "D", "D", "out_bias"),
    ("self_attn.q_norm.weight", "attn.fa.q_norm", "H", "H", "qk_norm"),
    ("self_attn.k_norm.weight", "attn.fa.k_norm", "H", "H", "qk_norm"),
    ("post_attention_layernorm.weight", "mlp_norm.scale", "D", "D", ""),
    ("mlp.gate_proj.weight", "mlp.w_gate", "F D", "D F", ""),
    ("mlp.up_proj.weight", "mlp.w_up", "F D", "D F", ""),
    ("mlp.down_proj.weight", "mlp.w_down", "D F", "F D", ""),
    ("mlp.gate_proj.bias", "mlp.b_gate", "F", "F", "mlp_bias"),
    ("mlp.up_proj.bias", "mlp.b_up", "F", "F", "mlp_bias"),
    ("mlp.down_proj.bias", "mlp.b_down", "D", "D", "mlp_bias"),
)


@dataclass(frozen=True)
class Rule:
    """One tensor on both sides: split the outside's axes to `split`, then permute by `order`."""

    hf: str
    path: str
    hf_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def same(cls, path: str, shape: tuple[int, ...]) -> "Rule":
        """A tensor stored outside exactly as here."""
        return cls(path, path, shape, shape, tuple(range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.split[i] for i in self.order)

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.split).transpose(self.order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.transpose(np.argsort(self.order)).reshape(self.hf_shape)


def rules(cfg: ModelConfig) -> tuple[Rule, ...]:
    """Every tensor of a model, in Hugging Face's usual order."""
    sizes = {"V": cfg.vocab_size, "D": cfg.width, "F": cfg.mlp_width, "N": cfg.num_heads,
             "K": cfg.num_kv_heads, "H": cfg.head_dim}  # fmt: skip
    flags = {name: getattr(cfg, name) for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm")}
    flags |= {"": True, "untied": not cfg.tied_embeddings}

    def select(table: Iterable, hf_prefix: str = "", prefix: str = "") -> Iterable[Rule]:
        for hf, path, hf_axes, axes, flag in table:
            if flags[flag]:
                words, letters = hf_axes.split(), hf_axes.replace(" ", "")
                yield Rule(
                    hf_prefix + hf,
                    prefix + path,
                    tuple(math.prod(sizes[c] for c in word) for word in words),
                    tuple(sizes[c] for c in letters),
                    tuple(letters.index(c) for c in axes.split()),
                )

    layers = (
        rule
        for l in range(cfg.num_layers)
        for rule in select(_LAYER, f"model.layers.{l}.", f"layers.{l}.")
    )
    return (*select(_EMBEDDINGS), *layers)
