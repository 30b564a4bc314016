"""GGUF files of llama.cpp, presented as the Hugging Face folder they were made from.

llama.cpp interleaves the two rotary halves of q and k rows, for its Llama class only; forgotten,
or undone where it was not done, the model speaks fluent nonsense.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hydrajax.hf.files import Entry
from hydrajax.hf.gguf_tokenizer import tokenizer_files
from hydrajax.typing import UserError

# Archs whose q and k rows are permuted (Mistral files are of arch llama too).
PERMUTED = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"

Opened = tuple[dict, dict[str, Entry], dict[str, bytes], str]


def open_gguf(path: Path) -> Opened:
    """config.json's values, tensors by Hugging Face name, tokenizer files, and a dtype to store."""
    try:
        import gguf
    except ImportError as e:
        raise UserError(f"{path}: reading GGUF needs a package; install hydrajax[gguf].") from e
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file; give the folder that holds a checkpoint.")
    try:
        reader = gguf.GGUFReader(path)
        meta = {key: item.contents() for key, item in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as e:
        raise UserError(f"{path}: not a sound GGUF file ({e}).") from e
    arch = meta.get("general.architecture")
    if arch not in PERMUTED:
        raise UserError(
            f"{path}: architecture {arch!r} is not supported; supported: {', '.join(PERMUTED)}."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = _config(path, meta, arch, tensors)
    heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
    entries = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FREQS:
            continue
        hf, part = _name(path, name)
        permuted = heads.get(part) if PERMUTED[arch] else None
        shape = tuple(int(n) for n in tensor.shape[::-1])
        read = _reader(path, tensor, gguf.dequantize, permuted)
        entries[hf] = Entry(path, shape, "float32", read)
    return values, entries, tokenizer_files(path, meta, values), _natural_dtype(tensors.values())


def _natural_dtype(tensors) -> str:
    """float32 and bfloat16 files stay so; float16 holds every quantised kind well enough."""
    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    return "float32" if "F32" in kinds else "bfloat16" if "BF16" in kinds else "float16"


def _name(path: Path, name: str) -> tuple[str, str]:
    """Hugging Face's name of a tensor, and the part of the layer it belongs to."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}", parts[0]
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER:
        return f"model.layers.{int(parts[1])}.{_LAYER[parts[2]]}.{parts[3]}", parts[2]
    raise UserError(f"{path}: tensor {name} has no place in a supported model.")


def _reader(path: Path, tensor, dequantize: Callable, heads: int | None) -> Callable:
    def read() -> np.ndarray:
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
            array = array.reshape([int(n) for n in tensor.shape[::-1]])
            return array if heads is None else unpermute(array, heads)
        except (NotImplementedError, ValueError) as e:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {tensor.name} of type {kind} cannot be read ({e}).") from e

    return read


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows (or a bias) of interleaved rotary pairs back to one half after the other."""
    pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _config(path: Path, meta: dict[str, Any], arch: str, tensors: dict) -> dict:
    """The config.json that the metadata came from, as far as it is told."""

    def need(key: str) -> Any:
        if f"{arch}.{key}" not in meta:
            raise UserError(f"{path}: metadata field {arch}.{key} is missing.")
        return meta[f"{arch}.{key}"]

    if "token_embd.weight" not in tensors:
        raise UserError(f"{path}: tensor token_embd.weight is missing.")
    width, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = meta.get(f"{arch}.attention.head_count_kv", heads)
    for key, value in (("head_count", heads), ("head_count_kv", kv_heads)):
        if type(value) is not int or value < 1:  # a list: other counts in other layers
            raise UserError(f"{path}: {arch}.attention.{key}: expected one number, got {value!r}.")
    if window := meta.get(f"{arch}.attention.sliding_window"):
        raise UserError(f"{path}: {arch}.attention.sliding_window={window} is not supported.")
    rope_dim = meta.get(f"{arch}.rope.dimension_count", width // heads)
    head_dim = meta.get(f"{arch}.attention.key_length", rope_dim)
    value_dim = meta.get(f"{arch}.attention.value_length", head_dim)
    if not head_dim == rope_dim == value_dim:
        raise UserError(
            f"{path}: {arch}: key_length={head_dim}, value_length={value_dim} and "
            f"rope.dimension_count={rope_dim} must be equal."
        )
    theta = _shortest(meta.get(f"{arch}.rope.freq_base", 10_000.0))
    ids = {f"{k}_token_id": meta.get(f"tokenizer.ggml.{name}_token_id")
           for k, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}  # fmt: skip
    values = {
        "model_type": arch,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(path, meta, arch, tensors, theta),
        **ids,
    }
    if arch in ("llama", "smollm3"):
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return values


def _shortest(value: float) -> float:
    """1e-05 of the float32 that reads 9.999999747e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(path: Path, meta: dict, arch: str, tensors: dict, theta: float) -> dict | None:
    prefix = f"{arch}.rope.scaling."
    kind = meta.get(prefix + "type", "none")
    if _ROPE_FREQS in tensors:
        return _llama3_scaling(path, np.asarray(tensors[_ROPE_FREQS].data, np.float64), theta)
    if kind == "none":
        return None
    told = {key.removeprefix(prefix) for key in meta if key.startswith(prefix)}
    if odd := sorted(told - {"type", "factor", "original_context_length", "finetuned"}):
        raise UserError(f"{path}: {prefix}{odd[0]} is not supported.")
    scaling = {"rope_type": kind, "factor": _shortest(meta.get(prefix + "factor", 1.0))}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = meta.get(prefix + "original_context_length")
    return scaling  # read_config refuses other kinds by name


def _llama3_scaling(path: Path, divisors: np.ndarray, theta: float) -> dict:
    """The settings behind the divisors that llama.cpp stores instead of them.

    Llama 3 differs in `factor` alone between releases, so the table of that factor must come out.
    """
    factor = float(f"{divisors.max():.5g}")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    exponents = np.arange(divisors.size) / divisors.size
    turns = 8192 * theta**-exponents / (2 * math.pi)  # rotations within the original context
    blend = np.clip((turns - 1.0) / 3.0, 0, 1)
    if not np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4):
        raise UserError(
            f"{path}: {_ROPE_FREQS} is not the scaling of Llama 3; import the model's Hugging Face "
            "folder instead."
        )
    return scaling
