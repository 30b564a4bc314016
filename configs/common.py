"""What all run files share: the full config, the folders of a road, the variants after the colon.

`--config=configs/tiny/align.py:smoke,arm=random` passes "smoke,arm=random" to `get_config`.
"""

from ml_collections import ConfigDict

from hydrajax.config import RunConfig, preset_values, to_config_dict
from hydrajax.typing import UserError


def base(preset: str = "default") -> ConfigDict:
    """Every field of RunConfig with its default, changed by a preset."""
    config = to_config_dict(RunConfig(stage="align"))
    config.preset = preset
    for section, values in preset_values(preset).items():
        config[section].update(values)
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
    elif arm != "causal":
        raise UserError(f"arm {arm!r} is unknown; choose causal, random, fixed or layerwise.")


def smoke(config: ConfigDict) -> ConfigDict:
    """The same run in seconds: a few steps on a few rows, in a folder of its own."""
    config.out = config.out.replace("runs/", "runs/smoke/", 1)
    for name in ("parent", "heads"):
        config[name] = config[name].replace("runs/", "runs/smoke/", 1)
    config.train.steps, config.train.log_every, config.data.rows = 4, 1, 4
    return config
