"""config.json: both rope styles, family defaults, and what is refused."""

import numpy as np
import pytest

from hydrajax.hf.config import CLASSES, DEFAULTS, read_config, write_config
from hydrajax.layers import rope_frequencies
from hydrajax.model_config import ModelConfig, RopeConfig
from hydrajax.typing import UserError
from tests.hf_folder import CONFIGS, LINEAR, LLAMA3, TINY, YARN, replace

OLD = ("rope_theta", "rope_scaling")


def read(values: dict) -> ModelConfig:
    return read_config(values, "config.json")[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dropped", [(), ("rope_parameters",), OLD], ids=["both", "old", "new"])
def test_written_config_reads_back_in_either_rope_style(name, dropped):
    values = write_config(CONFIGS[name], "float32")
    assert read({k: v for k, v in values.items() if k not in dropped}) == CONFIGS[name]


def test_rope_of_both_styles_and_dtype_under_both_names():
    values = write_config(replace(TINY, rope=LLAMA3), "bfloat16")
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"
    assert values["rope_scaling"].items() <= values["rope_parameters"].items()
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 5e5


def test_oldest_style_says_type():
    values = write_config(TINY, "float32")
    del values["rope_parameters"]
    assert read(values | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope.kind == "linear"


@pytest.mark.parametrize("family", DEFAULTS)
def test_absent_fields_take_the_familys_default_and_are_reported(family):
    facts, absent = read_config({"model_type": family, "sliding_window": None}, "config.json")
    names = " ".join(absent)
    assert "rope_theta" in names and "hidden_size" in names
    assert facts.num_kv_heads == {"llama": 32, "mistral": 8, "smollm3": 4}.get(family, 32)
    assert facts.rope.theta == (2e6 if family == "smollm3" else 1e4)
    assert facts.tied_embeddings == (family == "smollm3")


def test_qwen3_head_dim_is_128_whatever_the_width():
    values = write_config(replace(CONFIGS["qwen3"], head_dim=128), "float32")
    assert read({k: v for k, v in values.items() if k != "head_dim"}).head_dim == 128


def test_no_rope_layers_by_interval():
    values = write_config(CONFIGS["smollm3"], "float32")
    del values["no_rope_layers"]
    assert read(values).no_rope_layers == (3,)
    assert read(values | {"no_rope_layer_interval": 2}).no_rope_layers == (1, 3)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}),
        ("smollm3", {"sliding_window": 16, "use_sliding_window": True, "no_rope_layers": [1] * 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen3", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_inactive_windows_are_accepted(family, fields):
    read(write_config(CONFIGS[family], "float32") | fields)


def test_export_refuses_what_the_family_cannot_say():
    with pytest.raises(UserError, match=r"cannot express model\.qk_norm"):
        write_config(replace(TINY, qk_norm=True), "float32")
    with pytest.raises(UserError, match="no_rope_layers"):
        write_config(replace(TINY, no_rope_layers=(1,)), "float32")


@pytest.mark.torch
@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, CLASSES[family].replace("ForCausalLM", "Config"))()
    for key, value in DEFAULTS[family].items():
        if key in ("rope_theta", "no_rope_layers", "sliding_window"):  # folded or derived there
            continue
        if value is not None or key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(theirs, key, value) == value, key
    assert theirs.rope_parameters["rope_theta"] == DEFAULTS[family]["rope_theta"]
    rows = {"model_type": family, "sliding_window": None}
    assert read(rows).head_dim == (getattr(theirs, "head_dim", None) or 128)


@pytest.mark.torch
@pytest.mark.parametrize("rope", [
    LINEAR, LLAMA3, YARN,
    replace(LLAMA3, factor=32.0, original_context=8192),
    replace(YARN, factor=32.0, original_context=4096, theta=1e6),
    replace(YARN, factor=8.0, attention_factor=1.5, beta_fast=16.0, truncate=False),
], ids=lambda rope: f"{rope.kind}-{rope.factor:g}")  # fmt: skip
def test_rope_frequencies_are_those_of_transformers(rope: RopeConfig):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    cfg = replace(TINY, rope=rope, head_dim=64, max_context=131_072)
    values = write_config(cfg, "float32")
    config = transformers.LlamaConfig(**values)
    theirs, scale = ROPE_INIT_FUNCTIONS[rope.kind](config, "cpu")
    ours, our_scale = rope_frequencies(rope, 64)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
    assert our_scale == pytest.approx(scale)
    for position in (7, 100_000):  # angles, short and long, up to float32 rounding of theirs
        error = np.abs(np.cos(position * ours) - np.cos(position * theirs.numpy().astype(float)))
        assert error.max() <= 1e-6 + position * 2e-7
