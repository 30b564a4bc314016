"""`config.json` of a run folder: what the model is, how it was trained, and where it came from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydrajax.config import HydraConfig, ModelConfig, RunConfig, from_plain, to_plain
from hydrajax.head_plan import HeadPlan
from hydrajax.manifest import write_atomic
from hydrajax.typing import UserError

FORMAT_VERSION = 1
FIELDS = ("format_version", "model", "hydra", "plan", "run", "lineage")


@dataclass(frozen=True)
class RunInfo:
    """A run without its arrays; `run` stays a plain dict, so that old runs remain readable."""

    path: Path
    model: ModelConfig
    hydra: HydraConfig
    plan: HeadPlan
    run: dict[str, Any] | None
    lineage: dict[str, Any]


def write_config(
    folder: str | Path,
    *,
    model: ModelConfig,
    hydra: HydraConfig,
    plan: HeadPlan,
    lineage: dict[str, Any],
    run: RunConfig | dict[str, Any] | None = None,
) -> None:
    """Write config.json atomically, making the folder if need be."""
    plan.fits(model.num_layers, model.num_heads, model.num_kv_heads)
    body = {
        "format_version": FORMAT_VERSION,
        "model": to_plain(model),
        "hydra": to_plain(hydra),
        "plan": plan.to_json(),
        "run": to_plain(run) if isinstance(run, RunConfig) else run,
        "lineage": lineage,
    }
    path = Path(folder) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(body, indent=2) + "\n").encode())
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}); choose another folder.") from e


def read_config(folder: str | Path) -> RunInfo:
    """Read and validate config.json; UserError names the file and the field."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"No run in {folder}: config.json not found (found: {listing(folder)}).")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is not JSON: {e}.") from e
    if not isinstance(body, dict) or "model_type" in body:
        raise UserError(
            f"{path} is not of a hydrajax run, but perhaps of Hugging Face; "
            f"run `python convert_torch.py import --source {folder} --out ...` first."
        )
    missing = [name for name in FIELDS if name not in body]
    if missing:
        raise UserError(f"{path}: missing fields {missing}; write the run again.")
    if body["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version {body['format_version']!r}, this version reads "
            f"{FORMAT_VERSION}; use the hydrajax version that wrote it."
        )
    model = _section(path, "model", lambda: from_plain(ModelConfig, body["model"], "model"))
    hydra = _section(path, "hydra", lambda: from_plain(HydraConfig, body["hydra"], "hydra"))
    plan = _section(path, "plan", lambda: HeadPlan.from_json(body["plan"]))
    _section(path, "plan", lambda: plan.fits(model.num_layers, model.num_heads, model.num_kv_heads))
    return RunInfo(folder, model, hydra, plan, body["run"], body["lineage"])


def listing(folder: Path, most: int = 8) -> str:
    """What lies in a folder, for messages about what does not."""
    if not folder.is_dir():
        return "no such folder"
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return ", ".join(names[:most]) + ", ..." * (len(names) > most) if names else "nothing"


def _section(path: Path, name: str, build: Any) -> Any:
    try:
        return build()
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except (TypeError, AttributeError, KeyError) as e:
        raise UserError(f"{path}: field {name!r} is malformed: {e!r}.") from e
