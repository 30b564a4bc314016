"""The teacher's facts: frozen dataclasses of a decoder LM and its rotary embedding."""

from dataclasses import dataclass
from typing import Any

from hydrajax.typing import UserError

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3", "mistral")


def one_of(owner: str, name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise UserError(
            f"{owner}.{name}={value!r} is unknown; choose one of {', '.join(map(str, allowed))}."
        )


def check_choices(owner: str, cfg: Any, choices: dict[str, tuple]) -> None:
    for name, allowed in choices.items():
        one_of(owner, name, getattr(cfg, name), allowed)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the teacher; field meanings are those of Hugging Face's rope styles."""

    theta: float = 10_000.0
    kind: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_context: int = 0  # llama3, yarn: context before scaling
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 0.0  # yarn: 0 means 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def __post_init__(self):
        one_of("rope", "kind", self.kind, ("default", "linear", "llama3", "yarn"))
        if self.theta <= 0 or self.factor < 1:
            raise UserError(
                f"rope needs theta > 0 and factor >= 1, got {self.theta} and {self.factor}."
            )
        if self.kind in ("llama3", "yarn") and self.original_context < 1:
            raise UserError(f"rope.kind={self.kind} needs original_context >= 1.")


@dataclass(frozen=True)
class ModelConfig:
    """Facts of a decoder LM (Llama, Qwen2, Qwen3, SmolLM3, Mistral); nothing about hybrids."""

    family: str = "llama"
    vocab_size: int = 0
    width: int = 0
    mlp_width: int = 0
    num_layers: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = False  # RMSNorm of [head_dim] on q and k before rope (Qwen3)
    qkv_bias: bool = False  # Qwen2, Llama with attention_bias
    out_bias: bool = False  # Llama with attention_bias
    mlp_bias: bool = False
    tied_embeddings: bool = True
    no_rope_layers: tuple[int, ...] = ()  # layers without rope (SmolLM3)
    max_context: int = 2048
    bos_id: int = -1  # -1: none
    eos_ids: tuple[int, ...] = ()
    pad_id: int = -1

    def __post_init__(self):
        one_of("model", "family", self.family, FAMILIES)
        for name in (
            "vocab_size",
            "width",
            "mlp_width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide "
                f"num_heads={self.num_heads}."
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim must be even for rope, got {self.head_dim}.")
        if self.no_rope_layers and not set(self.no_rope_layers) <= set(range(self.num_layers)):
            raise UserError(
                f"model.no_rope_layers={self.no_rope_layers} names layers that do not exist."
            )
