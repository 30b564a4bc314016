"""What all run files share: the full config, the folders of a road, the variants after the colon.

`--config=configs/tiny/align.py:smoke,arm=random` passes "smoke,arm=random" to `get_config`.
"""

from ml_collections import ConfigDict

from hydrajax.config import ModelConfig, RunConfig, to_config_dict, to_plain
from hydrajax.presets import preset_values
from hydrajax.typing import UserError


def base(preset: str = "default") -> ConfigDict:
    """Every field of RunConfig with its default, changed by a preset."""
    config = to_config_dict(RunConfig(stage="align"))
    for section, values in preset_values(preset).items():
        config[section].update(values)
    return config


def stage(family: str, teacher: str, name: str, options: dict[str, str]) -> ConfigDict:
    """A stage of one arm of a road: preset, teacher and folder, before the family's own facts."""
    config = base(options["preset"])
    config.stage, config.teacher = name, teacher
    config.out = run_dir(family, options["arm"], name)
    return config


def variants(argument: str | None, **known: str) -> dict[str, str]:
    """Options after the colon; `known` are names with their defaults, "" for switches."""
    out = dict(known)
    for item in filter(None, (argument or "").split(",")):
        name, _, value = item.partition("=")
        if name not in known:
            raise UserError(f"config variant {name!r} is unknown; this file knows {sorted(known)}.")
        out[name] = value or "on"
    return out


def run_dir(family: str, *parts: str) -> str:
    """Folder of one step of a road: runs/<family>/<arm>/<stage>."""
    return "/".join(("runs", family, *filter(None, parts)))


def set_arm(config: ConfigDict, arm: str) -> None:
    """How an arm chooses its heads; all arms keep the same budget."""
    if arm == "layerwise":
        config.select.scorer = config.select.alloc = "layerwise"
    elif arm in ("random", "fixed"):
        config.select.scorer = arm
        if config.select.alloc == "layerwise":  # preset halo
            config.select.alloc = "global_c"
    elif arm != "causal":
        raise UserError(f"arm {arm!r} is unknown; choose causal, random, fixed or layerwise.")


def smoke(config: ConfigDict) -> ConfigDict:
    """The same run in seconds: few steps, short rows, a random teacher, folders of its own.

    The teacher is made by `train.py --config=configs/<family>/teacher.py`; heads are drawn, since
    a random teacher answers no probe.
    """
    for name in ("out", "parent", "heads"):
        config[name] = config[name].replace("runs/", "runs/smoke/", 1)
    config.teacher = config.out.rsplit("/", 2)[0] + "/teacher"
    config.select.scorer, config.select.alloc = "random", "global_c"
    config.train.steps, config.train.log_every = 4, 1
    config.train.calibration_tokens, config.data.workers = 1024, 0
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.data.files, config.data.synthetic, config.data.synthetic_share = ("sample",), "", 0.0
    config.data.rows, config.data.seq_len = 4, 64
    config.eval.tasks, config.eval.lengths, config.eval.depths = ("needle_single_2",), (256,), 2
    config.eval.prompts, config.eval.rows, config.eval.agreement_rows = 1, 2, 2
    config.eval.ppl_lengths, config.eval.ppl_tokens = (64,), 512
    config.eval.runs = tuple(run.replace("runs/", "runs/smoke/", 1) for run in config.eval.runs)
    return config


def smoke_teacher(family: str, model: ModelConfig) -> ConfigDict:
    """Pretraining of a random teacher of a family's shape, for `:smoke` runs alone."""
    config = base()
    config.stage, config.model, config.tokenizer = "pretrain", to_plain(model), "bytes"
    config.out = run_dir(family, "teacher")
    config = smoke(config)
    config.out = run_dir("smoke", family, "teacher")
    config.teacher = ""
    return config
