"""What can be imported (folder, hub id, GGUF file), opened as facts and tensors not yet read."""

import dataclasses
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hydrajax.config import HydraConfig, ModelConfig, from_plain
from hydrajax.head_plan import HeadPlan
from hydrajax.hf import gguf
from hydrajax.hf.config import read_config
from hydrajax.hf.files import DTYPES, Entry, member, open_weights, read_json, sha256, some
from hydrajax.hf.rules import Rule, rules
from hydrajax.tokenizer import FILES, check_vocabulary, load_tokenizer
from hydrajax.typing import Params, UserError

STUDENT = "hydrahead"  # model_type of exported hybrids; only hydrajax reads them
HEAD = "lm_head.weight"
DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}
# Shapes of a student's parameters, from whoever may build models.
Shapes = Callable[[ModelConfig, HydraConfig, HeadPlan], dict[str, tuple[int, ...]]]


@dataclass
class Source:
    """Facts of a source, its tensors by outside name, and what the user should hear about it."""

    path: Path
    values: dict  # its config.json
    cfg: ModelConfig
    entries: dict[str, Entry]
    rules: tuple[Rule, ...]
    hydra: HydraConfig = field(default_factory=HydraConfig.teacher)
    plan: HeadPlan | None = None  # None: all heads full
    texts: dict[str, bytes] = field(default_factory=dict)  # tokenizer and generation files
    notes: list[str] = field(default_factory=list)
    dtype: str | None = None  # to store in; None: each tensor as it is

    @property
    def head_plan(self) -> HeadPlan:
        cfg = self.cfg
        return self.plan or HeadPlan.all_full(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)

    def checksums(self) -> dict[str, str]:
        """sha256 of every file that was read."""
        files = {entry.file for entry in self.entries.values()}
        if self.path.is_dir():
            names = ("config.json", *self.texts)
            files |= {self.path / name for name in names}
        return {path.name: sha256(path) for path in sorted(files)}


def open_source(text: str, *, allow_pickle: bool, shapes: Shapes) -> Source:
    """Open a folder, a .gguf file or a hub id; raises UserError on anything out of order."""
    path = Path(text)
    if path.is_file():
        return _open_gguf(path)
    if not path.is_dir():
        path = _download(text, allow_pickle)
    values = read_json(member(path, "config.json"))
    texts = {name: member(path, name).read_bytes() for name in FILES if (path / name).exists()}
    if values.get("model_type") == STUDENT:
        source = _open_student(path, values, shapes)
        source.entries, source.texts = open_weights(path, allow_pickle=False), texts
        return source
    cfg, absent = read_config(values, str(path / "config.json"))
    entries = open_weights(path, allow_pickle=allow_pickle)
    source = Source(path, values, cfg, entries, (), texts=texts)
    if absent:
        source.notes.append(f"absent in config.json, {cfg.family}'s default: {', '.join(absent)}")
    if "auto_map" in values or any(path.glob("*.py")):
        source.notes.append("auto_map and .py files are ignored: code in a folder is never run")
    return _finish(source)


def _open_gguf(path: Path) -> Source:
    values, entries, texts, dtype = gguf.open_gguf(path)
    cfg, absent = read_config(values, str(path))
    notes = [f"not in the file, {cfg.family}'s defaults: {', '.join(absent)}"] if absent else []
    notes.append(f"tensors are dequantised and stored as {dtype} unless --dtype says otherwise")
    return _finish(Source(path, values, cfg, entries, (), texts=texts, notes=notes, dtype=dtype))


def _open_student(path: Path, values: dict, shapes: Shapes) -> Source:
    where = str(path / "config.json")
    if values.get("format_version") != 1:
        got = values.get("format_version")
        raise UserError(f"{where}: format_version {got!r} is not 1; export the student again.")
    for key in ("model", "hydra", "plan"):
        if not isinstance(values.get(key), dict):
            raise UserError(f"{where}: {key}: expected an object, got {values.get(key)!r}.")
    try:
        cfg = from_plain(ModelConfig, values["model"], "model")
        hydra = from_plain(HydraConfig, values["hydra"], "hydra")
        plan = HeadPlan.from_json(values["plan"])
        plan.fits(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except (TypeError, ValueError) as e:
        raise UserError(f"{where}: plan: not a head plan ({e}).") from e
    table = tuple(Rule.same(p, shape) for p, shape in shapes(cfg, hydra, plan).items())
    return Source(path, values, cfg, {}, table, hydra, plan)


def _finish(source: Source) -> Source:
    """Settle whether embeddings are tied, drop buffers, and lay out the key table."""
    cfg, entries = source.cfg, source.entries
    buffers = [name for name in entries if name.endswith("rotary_emb.inv_freq")]
    for name in buffers:
        del entries[name]
    if buffers:
        source.notes.append(f"{len(buffers)} rotary_emb.inv_freq buffers ignored: rope is computed")
    embed = entries.get("model.embed_tokens.weight")
    if cfg.tied_embeddings and HEAD in entries and embed is not None:
        head = entries[HEAD]
        if head.shape == embed.shape and _equal(head, embed):
            del entries[HEAD]
        else:
            source.notes.append(
                f"WARNING: tie_word_embeddings is true but {HEAD} differs from the embedding; "
                "imported untied, as transformers does"
            )
            source.cfg = dataclasses.replace(cfg, tied_embeddings=False)
    elif not cfg.tied_embeddings and HEAD not in entries:
        raise UserError(
            f"{source.path}: {HEAD} is missing and tie_word_embeddings is false; "
            "set it to true in config.json if the model is tied."
        )
    source.rules = rules(source.cfg)
    return source


def _equal(a: Entry, b: Entry) -> bool:
    return a.dtype == b.dtype and np.array_equal(a.read(), b.read())


def read_params(source: Source, dtype: str | None) -> tuple[Params, dict[str, str]]:
    """Our parameters, each checked and stored in `dtype`, and checksums in the outside layout."""
    entries, wanted = source.entries, {rule.hf: rule for rule in source.rules}
    if missing := sorted(wanted.keys() - entries.keys()):
        raise UserError(f"{source.path}: {len(missing)} missing tensors: {some(missing)}.")
    if extra := sorted(entries.keys() - wanted.keys()):
        raise UserError(
            f"{source.path}: {len(extra)} tensors that a {source.cfg.family} model of this "
            f"config.json does not have: {some(extra)}."
        )
    params: Params = {}
    checksums: dict[str, str] = {}
    for rule in source.rules:
        array = _read(entries[rule.hf], rule, dtype or source.dtype)
        checksums[rule.hf] = digest(array)
        params[rule.path] = rule.to_ours(array)
    return params, checksums


def digest(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _read(entry: Entry, rule: Rule, dtype: str | None) -> np.ndarray:
    where = f"{entry.file}: {rule.hf}"
    if tuple(entry.shape) != rule.hf_shape:
        raise UserError(f"{where}: expected shape {rule.hf_shape}, got {tuple(entry.shape)}.")
    if entry.dtype not in DTYPE_NAMES:
        raise UserError(f"{where}: dtype {entry.dtype} is not float32, float16 or bfloat16.")
    array = entry.read()
    if not np.isfinite(array).all():
        raise UserError(f"{where}: {int((~np.isfinite(array)).sum())} values are NaN or infinite.")
    return cast(array, dtype, where)


def cast(array: np.ndarray, dtype: str | None, where: str) -> np.ndarray:
    """`array` in a dtype by name (None: its own); error if a value does not fit."""
    if dtype is None or array.dtype.name == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(DTYPE_NAMES[dtype])
    if not np.isfinite(out).all():
        raise UserError(
            f"{where}: its largest value {np.abs(array).max():.4g} does not fit {dtype}; "
            "use --dtype float32 or bfloat16."
        )
    return out


def tokenizer_note(folder: Path, cfg: ModelConfig) -> str:
    """One line about the folder's tokenizer; error if it has ids without an embedding."""
    if not (folder / FILES[0]).exists():
        return f"no {FILES[0]} in the source: commands that need text want --config.tokenizer"
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, cfg.vocab_size, f"{FILES[0]} of the source")
    return f"tokenizer {tokenizer.vocab_size} of {cfg.vocab_size} embedding rows"


def _download(name: str, allow_pickle: bool) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or name.endswith((".gguf", ".safetensors")):
        raise UserError(f"--source {name}: no such folder or file, and not a hub id (org/name).")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *FILES]
    patterns += ["pytorch_model*.bin", "pytorch_model.bin.index.json"] if allow_pickle else []
    try:
        import huggingface_hub

        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # httpx, hub and file errors; their texts may carry request headers
        raise UserError(
            f"--source {name}: no such folder here, and the hub did not give it "
            f"({type(e).__name__}). Check the name and the network, or download the folder "
            "elsewhere and pass its path."
        ) from e
