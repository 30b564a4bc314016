"""Configs: round trips, one error per mistake, every knob reviewed and read, every file valid."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from hydrajax import config as C
from hydrajax import presets
from hydrajax.config import RunConfig, from_plain, to_config_dict, to_plain
from hydrajax.model_config import ModelConfig, RopeConfig
from hydrajax.start import check_resumable
from hydrajax.typing import UserError

REPO = Path(__file__).resolve().parents[1]
MODEL = dict(
    vocab_size=8, width=8, mlp_width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
# A new knob is a new line here, so that each is looked at once more.
KNOBS = """
data.answer_only
data.files
data.holdout
data.packing
data.rows
data.seed
data.seq_len
data.synthetic
data.synthetic_share
data.text_key
data.workers
eval.agreement_rows
eval.depths
eval.lengths
eval.ppl_lengths
eval.ppl_tokens
eval.prompts
eval.rows
eval.runs
eval.seed
eval.tasks
eval.zero_la
heads
hydra.chunk
hydra.fa_gate
hydra.fa_kv
hydra.fa_logit_base
hydra.fa_logit_scale
hydra.fa_pos
hydra.fusion
hydra.gamma_init
hydra.gate_init
hydra.gate_pos
hydra.gdn_init
hydra.la_gate
hydra.la_kv
hydra.la_pos
hydra.la_qkv_act
hydra.la_short_conv
hydra.neg_eigval
hydra.nope_from
hydra.norm_weight
hydra.qkv_split
kernels.attention
kernels.causal_conv
kernels.gated_delta_rule
mesh.context
mesh.data
mesh.fsdp
mesh.model
model
optim.b1
optim.b2
optim.clip_norm
optim.end_lr
optim.eps
optim.lr_groups
optim.offload
optim.peak_lr
optim.schedule
optim.warmup_steps
optim.weight_decay
out
parent
seed
select.ablation
select.alloc
select.answer_prefix
select.context
select.duo_steps
select.fuse_norm
select.general
select.ie_floor
select.layers
select.min_gap
select.min_pairs
select.pairs
select.probes
select.ratio
select.report
select.rows
select.scorer
select.seed
select.sender_freeze
select.sender_rounds
select.span_decay
select.text_rows
select.text_tokens
select.unit
stage
teacher
tokenizer
train.accum
train.align_loss
train.align_scope
train.calibration_tokens
train.ce_weight
train.compute_dtype
train.eval_every
train.keep
train.kl_temperature
train.kl_weight
train.log_every
train.loss_chunk
train.on_nonfinite
train.profile
train.remat
train.save_every
train.steps
train.teacher_cache
train.tensorboard
"""


def build(section: str, **values) -> RunConfig:
    """RunConfig of plain values, as a config file would give them."""
    plain = to_plain(RunConfig())
    (plain if section == "config" else plain[section]).update(values)
    return RunConfig.from_dict(plain)


def leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_knobs_are_those_that_were_reviewed():
    assert sorted(leaves(to_config_dict(RunConfig()).to_dict())) == KNOBS.split()


def test_round_trips_through_json_values_and_config_dict():
    rope = RopeConfig(kind="llama3", factor=8.0, original_context=64)
    cfg = dataclasses.replace(
        RunConfig(), stage="pretrain", model=ModelConfig(**MODEL, rope=rope, eos_ids=(1, 2)),
        optim=C.OptimConfig(lr_groups=("la=2",)), data=C.DataConfig(files=("a", "b")),
    )  # fmt: skip
    assert RunConfig.from_dict(to_plain(cfg)) == cfg
    assert hash(RunConfig.from_dict(to_plain(cfg))) == hash(cfg)
    assert RunConfig.from_dict(to_config_dict(cfg)) == cfg
    mutable = to_config_dict(cfg)
    assert isinstance(mutable, ConfigDict) and isinstance(mutable.data.files, tuple)
    assert build("optim", peak_lr=1).optim.peak_lr == 1.0  # whole numbers are fine for floats


def test_a_run_begun_before_a_key_existed_had_its_default():
    cfg = build("config", stage="pretrain", model=MODEL, out="runs/x")
    keys = set(leaves(to_plain(cfg)))
    assert {"train.teacher_cache", "optim.clip_norm", "model.qk_norm", "model.rope.theta"} < keys
    needed = {"stage", *(f"model.{name}" for name in MODEL)}  # not at their defaults
    for key in keys - needed:
        check_resumable(cfg, without(to_plain(cfg), key))
    taught = build("config", stage="distill", train=dict(teacher_cache="caches/x"), out="runs/x")
    for now, key, message in [
        (cfg, "model.width", r"\(model\.width: 0 -> 8\)"),
        (taught, "train.teacher_cache", r"\(train\.teacher_cache: '' -> 'caches/x'\)"),
    ]:
        with pytest.raises(UserError, match=message):
            check_resumable(now, without(to_plain(now), key))
    gone = to_plain(cfg) | {"old": 3}
    with pytest.raises(UserError, match=r"\(old: 3 -> None\)"):
        check_resumable(cfg, gone)
    with pytest.raises(UserError, match="runs/x holds weights of no run"):
        check_resumable(cfg, None)


def without(tree: dict, key: str) -> dict:
    """The tree without the leaf `key`, a dotted path."""
    first, _, rest = key.partition(".")
    if rest:
        return tree | {first: without(tree[first], rest)}
    return {name: value for name, value in tree.items() if name != first}


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("optim", dict(peak_rl=1.0), r"config\.optim has unknown keys \['peak_rl'\].*peak_lr"),
        ("train", dict(steps=2.5), r"config\.train\.steps: expected int, got 2\.5"),
        ("train", dict(steps="2"), r"config\.train\.steps: expected int, got '2'"),
        ("train", dict(tensorboard=1), r"config\.train\.tensorboard: expected bool, got 1"),
        ("train", dict(accum=True), r"config\.train\.accum: expected int, got True"),
        ("data", dict(files="a"), r"config\.data\.files: expected tuple, got 'a'"),
        ("config", dict(stage="tune"), r"config\.stage='tune' is unknown; choose one of pretrain"),
        ("config", dict(stage="pretrain"), r"stage=pretrain needs config\.model"),
        ("hydra", dict(fa_pos="alibi"), r"hydra\.fa_pos='alibi' is unknown"),
        ("hydra", dict(qkv_split=False), r"needs la_kv='gqa', fa_kv='shared', got la_kv='mha'"),
        ("hydra", dict(chunk=48), r"power of two >= 16, got 48"),
        ("hydra", dict(fa_logit_base=1.0), r"fa_logit_base must exceed 1"),
        ("select", dict(alloc="best"), r"select\.alloc='best' is unknown"),
        ("select", dict(ratio=1.5), r"select\.ratio must lie in \[0, 1\]"),
        ("select", dict(pairs=4, min_pairs=6), r"pairs >= min_pairs >= 1"),
        ("select", dict(scorer="layerwise"), r"go together"),
        ("optim", dict(schedule="wsd"), r"optim\.schedule='wsd' is unknown"),
        ("optim", dict(peak_lr=0.0), r"peak_lr > 0"),
        ("optim", dict(lr_groups=["la"]), r"'la' is not of the form regex=multiplier"),
        ("data", dict(packing="none"), r"data\.packing='none' is unknown"),
        ("data", dict(seq_len=1), r"seq_len >= 2"),
        ("data", dict(holdout=1.0), r"data\.holdout"),
        ("data", dict(synthetic_share=0.5), r"needs data\.synthetic"),
        ("mesh", dict(data=-1, fsdp=-1), r"at most one -1"),
        ("mesh", dict(model=0), r"must be >= 1"),
        ("train", dict(remat="all"), r"stage\.remat='all' is unknown"),
        ("train", dict(compute_dtype="float16"), r"compute_dtype='float16' is unknown"),
        ("train", dict(keep=0), r"keep >= 1"),
        ("train", dict(accum=5), r"train\.accum=5 does not divide data\.rows=32"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(section, values, message):
    with pytest.raises(UserError, match=message) as caught:
        build(section, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(width=0), r"model\.width must be at least 1"),
        (dict(num_kv_heads=3), r"num_kv_heads=3 does not divide num_heads=4"),
        (dict(head_dim=5), r"head_dim must be even"),
        (dict(family="gpt2"), r"model\.family='gpt2' is unknown"),
        (dict(no_rope_layers=(2,)), r"names layers that do not exist"),
        (dict(rope=dict(kind="yarn")), r"rope\.kind=yarn needs original_context"),
        (dict(rope=dict(theta=0.0)), r"theta > 0"),
        (dict(rope=dict(kind="ntk")), r"rope\.kind='ntk' is unknown"),
        (dict(rope=dict(base=1.0)), r"model\.rope has unknown keys \['base'\]"),
    ],
)
def test_facts_of_a_model_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        from_plain(ModelConfig, MODEL | values, "model")


@pytest.mark.parametrize("name", presets.HYDRA_PRESETS)
def test_presets_name_existing_fields_and_valid_values(name):
    assert (
        presets.HYDRA_PRESETS.keys()
        == presets.STAGE_PRESETS.keys()
        == presets.SELECT_PRESETS.keys()
    )
    plain, changes = to_plain(RunConfig()), presets.preset_values(name)
    for section, values in changes.items():
        assert values.keys() <= plain[section].keys()
        for key, value in values.items():
            assert plain[section][key] != value, f"{section}.{key} repeats the default"
        plain[section] |= values
    RunConfig.from_dict(plain)


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="preset='x' is unknown"):
        presets.preset_values("x")


def config_files() -> list[tuple[str, str | None]]:
    cases = []
    for path in sorted((REPO / "configs").glob("*/*.py")):
        text = path.read_text()
        if "def get_config" not in text:
            continue
        name = f"configs.{path.parent.name}.{path.stem}"
        variants = [None]
        if 'smoke=""' in text:
            variants.append("smoke")
        if 'short=""' in text:
            variants.append("short")
        if 'arm="causal"' in text:
            variants += [f"arm={arm}" for arm in ("random", "fixed", "layerwise")]
        cases += [(name, variant) for variant in variants]
    return cases


@pytest.mark.parametrize("module, variant", config_files())
def test_every_config_file_and_variant_is_valid(module, variant):
    cfg = RunConfig.from_dict(importlib.import_module(module).get_config(variant))
    stage = module.rsplit(".", 1)[1]
    assert cfg.out.startswith("runs/")
    if stage in C.STAGES:
        assert cfg.stage == stage
    if variant and variant.startswith("arm="):
        assert f"/{variant[4:]}/" in cfg.out
    if variant == "smoke":
        assert "smoke" in cfg.out and cfg.train.steps <= 10
        assert "smoke" in cfg.teacher or cfg.stage == "pretrain"


def test_an_unknown_variant_or_arm_is_refused():
    align = importlib.import_module("configs.tiny.align")
    with pytest.raises(UserError, match=r"variant 'smok' is unknown; this file knows \['arm'"):
        align.get_config("smok")
    select = importlib.import_module("configs.tiny.select")
    with pytest.raises(UserError, match="arm 'best' is unknown"):
        select.get_config("arm=best")


def test_every_knob_has_a_reader():
    """A field is read as an attribute outside of its own validation."""
    read = set()
    sources = [REPO / "train.py", REPO / "convert_torch.py", *(REPO / "hydrajax").rglob("*.py")]
    for path in sources:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                node.body = []
        loads = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        read |= {n.attr for n in loads if isinstance(n.ctx, ast.Load)}
    sections = {RopeConfig, *(c for c in vars(C).values() if dataclasses.is_dataclass(c))}
    unread = {f"{c.__name__}.{f.name}" for c in sections for f in dataclasses.fields(c)
              if f.name not in read}  # fmt: skip
    # What a file was built from; its flags are already in the sections.
    assert unread == set()
