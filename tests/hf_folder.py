"""Tiny Hugging Face folders made without transformers, and edits that break them."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from hydrajax.hf.config import write_config
from hydrajax.hf.rules import rules
from hydrajax.hf.target import Output, write_json, write_weights
from hydrajax.model_config import ModelConfig, RopeConfig

TINY = ModelConfig(family="llama", vocab_size=96, width=32, mlp_width=48, num_layers=2, num_heads=4,
                   num_kv_heads=2, head_dim=8, norm_eps=1e-5, max_context=64, bos_id=1,
                   eos_ids=(2,), pad_id=0)  # fmt: skip
LLAMA3 = RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_context=32)
YARN = RopeConfig(kind="yarn", factor=4.0, original_context=16)
LINEAR = RopeConfig(kind="linear", factor=2.0)
# One model of every family and rope kind; widths that would hide a wrong reshape are avoided.
CONFIGS = {
    "llama": replace(TINY, tied_embeddings=False),
    "llama_biases": replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True),
    "llama_llama3": replace(TINY, rope=LLAMA3),
    "llama_linear": replace(TINY, rope=LINEAR),
    "qwen2": replace(TINY, family="qwen2", qkv_bias=True),
    "qwen2_yarn": replace(TINY, family="qwen2", qkv_bias=True, rope=YARN),
    "qwen3": replace(TINY, family="qwen3", qk_norm=True, head_dim=16),
    "smollm3": replace(TINY, family="smollm3", num_layers=4, no_rope_layers=(1, 3)),
    "mistral": replace(TINY, family="mistral", head_dim=16, tied_embeddings=False),
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensors(cfg: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name, large enough that every part shows in the logits."""
    rng = np.random.default_rng(seed)

    def draw(rule):
        values = rng.normal(0, 0.25, rule.hf_shape)
        return (values + 1 if rule.hf.endswith("norm.weight") else values).astype(DTYPES[dtype])

    return {rule.hf: draw(rule) for rule in rules(cfg)}


def save(folder: Path, weights: dict[str, np.ndarray], shard_bytes: int = 10**9) -> list[str]:
    outputs = [Output(k, v.shape, v.dtype, lambda v=v: v) for k, v in weights.items()]
    return write_weights(folder, outputs, shard_bytes)


def make(folder: Path, cfg: ModelConfig = TINY, dtype: str = "float32", **kwargs) -> Path:
    """Folder with weights, config.json and a tokenizer of `vocab_size` tokens."""
    folder.mkdir(parents=True)
    save(folder, tensors(cfg, dtype), **kwargs)
    write_json(folder / "config.json", write_config(cfg, dtype))
    (folder / "tokenizer.json").write_text(tokenizer(cfg.vocab_size))
    write_json(folder / "generation_config.json", {"eos_token_id": list(cfg.eos_ids)})
    return folder


def tokenizer(size: int) -> str:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return words.to_str()


def edit(folder: Path, remove: tuple[str, ...] = (), **fields) -> Path:
    """Change fields of config.json."""
    path = folder / "config.json"
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    write_json(path, values | fields)
    return folder
