"""Facts of a Hugging Face config.json as a ModelConfig, and back; plain JSON, no transformers.

Rope is stored in two styles: `rope_theta` with `rope_scaling`, and `rope_parameters` (all that
transformers 5 writes, and what transformers 4 silently overlooks). Both are read, must agree, and
both are written.
"""

import dataclasses
import math
from typing import Any

from hydrajax.model_config import FAMILIES, ModelConfig, RopeConfig
from hydrajax.typing import UserError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "mistral": "MistralForCausalLM",
}

# What transformers (4.57 and 5.23) takes for a field that the file leaves out. A field that is
# not here is not read for that family: Qwen2 always has q/k/v biases, Mistral never.
_COMMON = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, hidden_act="silu",
               num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, rope_theta=1e4,
               tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
               pad_token_id=None)  # fmt: skip
_QWEN = dict(_COMMON, vocab_size=151_936, intermediate_size=22_016, num_key_value_heads=32,
             max_position_embeddings=32_768, use_sliding_window=False, sliding_window=4096,
             max_window_layers=28)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(_COMMON, vocab_size=32_000, intermediate_size=11_008, bos_token_id=1,
                  max_position_embeddings=2048, attention_bias=False, mlp_bias=False,
                  eos_token_id=2),
    "qwen2": _QWEN,
    "qwen3": dict(_QWEN, head_dim=128, attention_bias=False),
    "smollm3": dict(_COMMON, vocab_size=128_256, hidden_size=2048, intermediate_size=11_008,
                    num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4,
                    max_position_embeddings=32_768, rope_theta=2e6, tie_word_embeddings=True,
                    attention_bias=False, mlp_bias=False, use_sliding_window=False,
                    sliding_window=None, no_rope_layers=None, no_rope_layer_interval=4,
                    bos_token_id=128_000, eos_token_id=128_001, pad_token_id=128_004),
    "mistral": dict(_COMMON, vocab_size=32_000, intermediate_size=14_336, num_key_value_heads=8,
                    max_position_embeddings=131_072, sliding_window=4096, bos_token_id=1,
                    eos_token_id=2),
}  # fmt: skip

# Keys of a rope section that each kind reads; the first group must be there.
_ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "truncate")),
}
_ROPE_IDLE = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned"}


class _Fields:
    """Typed reads from a config.json; remembers which fields fell back to the family's default."""

    def __init__(self, values: dict, defaults: dict[str, Any], where: str):
        self.values, self.defaults, self.where = values, defaults, where
        self.absent: list[str] = []

    def get(self, key: str) -> Any:
        if key in self.values or key not in self.defaults:
            return self.values.get(key)
        default = self.defaults[key]
        if default is not None and key not in self.absent:
            self.absent.append(key)
        return default

    def fail(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {key}: expected {expected}, got {self.get(key)!r}.")

    def size(self, key: str) -> int:
        value = self.get(key)
        # The bound keeps a nonsense file from spelling out the rules of a billion layers.
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.fail(key, "a positive integer")
        return value

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise self.fail(key, "true or false")
        return bool(value)

    def ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise self.fail(key, "a token id, a list of them or null")
        return tuple(i for i in ids if i >= 0)

    def one_id(self, key: str) -> int:
        ids = self.ids(key)
        if len(ids) > 1:
            raise self.fail(key, "one token id or null")
        return ids[0] if ids else -1


def read_config(values: dict, where: str) -> tuple[ModelConfig, list[str]]:
    """Model facts of a config.json, and the fields that had to be taken from family defaults."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}."
        )
    f = _Fields(values, DEFAULTS[family], where)
    width, heads, layers = (
        f.size(k) for k in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if layers > 4096:
        raise f.fail("num_hidden_layers", "at most 4096 layers")
    if f.get("hidden_act") != "silu":
        raise f.fail("hidden_act", "'silu'")
    eps = f.get("rms_norm_eps")
    if not _is_number(eps) or not 0 < eps < 1:
        raise f.fail("rms_norm_eps", "a number between 0 and 1")
    no_rope = _no_rope_layers(f, layers) if family == "smollm3" else ()
    _refuse_windows(f, family, layers, no_rope)
    bias = f.flag("attention_bias") if "attention_bias" in f.defaults else False
    kv_heads, head_dim = f.get("num_key_value_heads"), f.get("head_dim")
    facts = dict(
        vocab_size=f.size("vocab_size"),
        width=width,
        mlp_width=f.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else f.size("num_key_value_heads"),
        head_dim=width // heads if head_dim is None else f.size("head_dim"),
        norm_eps=float(eps),
        rope=_read_rope(f),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias") if "mlp_bias" in f.defaults else False,
        tied_embeddings=f.flag("tie_word_embeddings"),
        no_rope_layers=no_rope,
        max_context=f.size("max_position_embeddings"),
        bos_id=f.one_id("bos_token_id"),
        eos_ids=f.ids("eos_token_id"),
        pad_id=f.one_id("pad_token_id"),
    )
    try:
        cfg = ModelConfig(family=family, **facts)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return cfg, [f"{key}={f.defaults[key]!r}" for key in f.absent]


def write_config(cfg: ModelConfig, dtype: str) -> dict:
    """A config.json that transformers 4 and 5 read alike; error if the family cannot say it."""
    known = DEFAULTS[cfg.family]
    out = {
        "architectures": [CLASSES[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_width,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_context,
        "tie_word_embeddings": cfg.tied_embeddings,
        "bos_token_id": None if cfg.bos_id < 0 else cfg.bos_id,
        "eos_token_id": cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None,
        "pad_token_id": None if cfg.pad_id < 0 else cfg.pad_id,
        "torch_dtype": dtype,
        "dtype": dtype,
        **_write_rope(cfg.rope),
    }
    per_family = {
        "attention_bias": cfg.out_bias,
        "mlp_bias": cfg.mlp_bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "no_rope_layers": [int(l not in cfg.no_rope_layers) for l in range(cfg.num_layers)],
    }
    out |= {key: value for key, value in per_family.items() if key in known}
    back, _ = read_config(out, "config.json")
    if back != cfg:
        lost = [f.name for f in dataclasses.fields(cfg)
                if getattr(cfg, f.name) != getattr(back, f.name)]  # fmt: skip
        raise UserError(
            f"Hugging Face's {cfg.family!r} cannot express model.{', model.'.join(lost)}; "
            "set model.family to one that can."
        )
    return out


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _no_rope_layers(f: _Fields, layers: int) -> tuple[int, ...]:
    """SmolLM3's list is named the wrong way round: 1 means that rope is used."""
    uses_rope = f.get("no_rope_layers")
    if uses_rope is None:
        every = f.size("no_rope_layer_interval")
        return tuple(range(every - 1, layers, every))
    if not isinstance(uses_rope, list) or len(uses_rope) != layers:
        raise f.fail("no_rope_layers", f"a list of {layers} zeros and ones")
    return tuple(l for l, used in enumerate(uses_rope) if not used)


def _refuse_windows(f: _Fields, family: str, layers: int, no_rope: tuple[int, ...]) -> None:
    """Sliding windows and other layer kinds; a window that is stored but inactive is fine."""
    types = f.get("layer_types") or []
    if not isinstance(types, list):
        raise f.fail("layer_types", "a list")
    if other := sorted({str(t) for t in types} - {"full_attention"}):
        raise UserError(f"{f.where}: layer_types {other} not supported; only full_attention is.")
    window = f.get("sliding_window") if family != "llama" else None
    if window is None or family == "mistral":
        active = window is not None
    elif types:
        active = False  # layer_types wins over the older fields
    elif family == "smollm3":
        active = f.flag("use_sliding_window") and bool(no_rope)
    else:
        active = f.flag("use_sliding_window") and (f.get("max_window_layers") or 0) < layers
    if active:
        raise UserError(
            f"{f.where}: sliding_window={window!r} is active and not supported; only full "
            "attention is. A model that never needed it says null here."
        )


def _read_rope(f: _Fields) -> RopeConfig:
    old_scaling, new = f.get("rope_scaling"), f.get("rope_parameters")
    for key, section in (("rope_scaling", old_scaling), ("rope_parameters", new)):
        if section is not None and not isinstance(section, dict):
            raise f.fail(key, "an object or null")
    theta = f.values.get("rope_theta")
    if not new:
        theta = f.get("rope_theta") if theta is None else theta
        return _rope_section(f, "rope_scaling", dict(old_scaling or {}), theta)
    if theta is None and new.get("rope_theta") is None:
        theta = f.get("rope_theta")
    rope = _rope_section(f, "rope_parameters", new, theta)
    if theta is not None and theta != rope.theta:
        raise UserError(
            f"{f.where}: rope_theta={theta} and rope_parameters.rope_theta={rope.theta} disagree; "
            "remove the wrong one."
        )
    if old_scaling:
        old = _rope_section(f, "rope_scaling", old_scaling, rope.theta)
        if old != rope:
            lost = [x.name for x in dataclasses.fields(rope)
                    if getattr(old, x.name) != getattr(rope, x.name)]  # fmt: skip
            raise UserError(
                f"{f.where}: rope_scaling and rope_parameters disagree in {', '.join(lost)}; "
                "remove the wrong one."
            )
    elif "rope_scaling" in f.values and "rope_theta" in f.values and rope.kind != "default":
        raise UserError(
            f"{f.where}: rope_scaling is null but rope_parameters.rope_type is {rope.kind!r}; "
            "remove the wrong one."
        )
    return rope


def _rope_section(f: _Fields, key: str, section: dict, theta: Any) -> RopeConfig:
    where = f"{f.where}: {key}"
    unnamed = None if section.keys() - {"rope_theta"} else "default"
    kind = section.get("rope_type", section.get("type", unnamed))
    if kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}.rope_type {kind!r} is not supported; supported: {', '.join(_ROPE_KEYS)}."
        )
    needed, optional = _ROPE_KEYS[kind]
    given = {k: v for k, v in section.items() if v is not None and k not in _ROPE_IDLE}
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    if unknown := sorted(given.keys() - {*needed, *optional}):
        raise UserError(f"{where}: {', '.join(unknown)} with rope_type {kind!r} is not supported.")
    if missing := [k for k in needed if k not in given]:
        raise UserError(f"{where}: rope_type {kind!r} needs {', '.join(missing)}.")
    given["theta"] = section["rope_theta"] if section.get("rope_theta") is not None else theta
    if kind in ("llama3", "yarn"):
        # As transformers: without the field, the context was never extended.
        context = section.get("original_max_position_embeddings")
        given["original_context"] = f.get("max_position_embeddings") if context is None else context
    truncate = given.pop("truncate", True)
    for name, value in given.items():
        if not _is_number(value) or value <= 0:
            raise UserError(f"{where}: {name}: expected a positive number, got {value!r}.")
    if type(truncate) is not bool:
        raise UserError(f"{where}: truncate: expected true or false, got {truncate!r}.")
    numbers = {k: int(v) if k == "original_context" else float(v) for k, v in given.items()}
    try:
        return RopeConfig(kind=kind, truncate=truncate, **numbers)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _write_rope(rope: RopeConfig) -> dict:
    needed, optional = _ROPE_KEYS[rope.kind]
    scaling = {"rope_type": rope.kind, **{k: getattr(rope, k) for k in (*needed, *optional)}}
    if not scaling.get("attention_factor", 1):
        del scaling["attention_factor"]
    if rope.original_context:
        scaling["original_max_position_embeddings"] = rope.original_context
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
