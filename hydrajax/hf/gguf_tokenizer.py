"""tokenizer.json out of a GGUF's token list, for the pre-tokenizers whose rules are known."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hydrajax.typing import UserError

# llama.cpp names the rule that splits text before BPE; here is what each name stands for.
_DIGITS = {"smollm": True, "gpt-2": False, "gpt2": False}
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def tokenizer_files(path: Path, meta: dict[str, Any], config: dict) -> dict[str, bytes]:
    """Name -> bytes of tokenizer.json, tokenizer_config.json and generation_config.json."""
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _DIGITS:
        raise UserError(
            f"{path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; supported: "
            f"'gpt2' with {', '.join(_DIGITS)}. Import the model's Hugging Face folder instead."
        )
    tokens, kinds = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    merges = meta.get("tokenizer.ggml.merges")
    for key, value in (("tokens", tokens), ("token_type", kinds), ("merges", merges)):
        if not isinstance(value, list):
            raise UserError(f"{path}: metadata field tokenizer.ggml.{key} is missing.")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in merges]))
    except Exception as e:  # the library raises bare Exceptions
        raise UserError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({e}).") from e
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if _DIGITS[pre] else byte_level
    )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    added = [(t, k) for t, k in zip(tokens, kinds, strict=False) if k in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([_added(t) for t, k in added if k == _CONTROL])
    tokenizer.add_tokens([_added(t) for t, k in added if k == _USER_DEFINED])
    generation = {k: v for k, v in config.items() if k.endswith("_token_id") and v is not None}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(_tokenizer_config(path, meta, tokens, config)),
        "generation_config.json": _json(generation),
    }


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _tokenizer_config(path: Path, meta: dict, tokens: list[str], config: dict) -> dict:
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in
           (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise UserError(f"{path}: {name} token id {i} is outside the {len(tokens)} tokens.")
    template = meta.get("tokenizer.chat_template")
    return {
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        **({"chat_template": template} if template else {}),
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
