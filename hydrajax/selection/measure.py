"""Measure the selection itself: exactness, speed, faithfulness, stability, and its cost at 1.7B.

    python -m hydrajax.selection.measure --config=configs/smollm2_135m/select.py \
        --result=results/selection/smollm2_135m_h100.json

One H100: about two minutes for the parts of the teacher and five for `shapes`. A part writes its
figures as soon as it has them; parts whose figures the result file already holds are left out.

    selection  the whole command with scorer=patch: seconds, peak memory, Gini, stability
    shortcut   receivers against the frozen patch of the whole sequence, and against full forwards
    knockout   ablation in score order against random orders
    shapes     the same `patch` on random weights of Qwen3-1.7B's shapes, 4K context: cost alone
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags

from hydrajax.checkpoint import load_run, make_lineage
from hydrajax.command import run_command
from hydrajax.config import DataConfig, HydraConfig, RunConfig, SelectConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.manifest import write_atomic
from hydrajax.model import Model, bind, init_params
from hydrajax.model_config import ModelConfig, RopeConfig
from hydrajax.selection import knockout, patching, streams
from hydrajax.selection.__main__ import make_context, select
from hydrajax.selection.fusion import PairEffects
from hydrajax.selection.probes import Batch, Pair, Probe, batches
from hydrajax.selection.scorers import SCORERS, Context, score
from hydrajax.selection.statistics import layer_ginis, spearman, top_jaccard
from hydrajax.sharding import make_mesh
from hydrajax.typing import UserError

QWEN3_1P7B = ModelConfig(
    family="qwen3", vocab_size=151_936, width=2048, mlp_width=6144, num_layers=28, num_heads=16,
    num_kv_heads=8, head_dim=128, qk_norm=True, rope=RopeConfig(theta=1e6), max_context=40_960,
)  # fmt: skip
SHAPES = {"qwen3_1p7b": QWEN3_1P7B}
EXACT_HEADS = 64  # heads whose shortcut is compared with the full frozen patch
TIMED_HEADS = 27  # heads whose full forwards are timed; the rest is scaled
KNOCKOUT_PAIRS = 3  # of each probe
DRAWS = 20  # subsets of six pairs


@dataclass
class Result:
    """The result file, written again after each part."""

    path: Path
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, float]

    @classmethod
    def open(cls, path: Path, command: list[str], cfg: RunConfig) -> "Result":
        meta = make_lineage(command, None)
        del meta["parent"], meta["parent_hash"]
        meta |= {
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "seeds": {"select": cfg.select.seed, "data": cfg.data.seed},
        }
        if not path.is_file():
            return cls(path, meta, [], {})
        old = json.loads(path.read_text())
        if old["meta"]["device"] != meta["device"]:
            raise UserError(f"{path} was measured on {old['meta']['device']}; name a new file.")
        return cls(path, old["meta"], old["rows"], old["summary"])

    def add(self, part: str, figures: dict[str, float], **facts: Any) -> None:
        """Write the figures of a part, and what they rest on."""
        self.rows.append({"part": part, **facts, **figures})
        self.summary |= figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        body = {"meta": self.meta, "rows": self.rows, "summary": self.summary}
        write_atomic(self.path, (json.dumps(body, indent=1) + "\n").encode())
        print(f"{part}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)


@dataclass
class Subject:
    """The configured teacher with its pairs, as the selection itself sees them."""

    cfg: RunConfig

    @cached_property
    def context(self) -> Context:
        return make_context(self.cfg, load_run(self.cfg.teacher), make_mesh(self.cfg.mesh))

    @cached_property
    def heads(self) -> dict[str, Any]:
        """heads.json of the selection that this command ran."""
        path = Path(self.cfg.out) / "heads.json"
        if not path.is_file():
            raise UserError(f"No {path}: part knockout needs part selection before it.")
        return json.loads(path.read_text())


def measure_selection(subject: Subject, result: Result) -> None:
    """Run the command, and read from its effects how unequal and how stable the scores are."""
    cfg = subject.cfg
    path = select(replace(cfg, select=replace(cfg.select, report="scores")), result.meta["command"])
    facts, effects = subject.heads, PairEffects.load(path.parent / "effects.npz")
    full = effects.score(cfg.select.ie_floor)
    ginis = np.array(layer_ginis(full))
    figures = {
        "selection_seconds": facts["provenance"]["seconds"],
        "gini_mean": float(np.nanmean(ginis)),
        "share_above_0_01": float((full > 0.01).mean()),
        **six_pairs(effects, full, cfg.select),
    }
    notes = {
        "peak_gpu_bytes": peak_bytes(),
        "heads": int(full.size),
        "pairs": len(effects.probe),
        "layers_without_a_score": int(np.isnan(ginis).sum()),
        "kinds": sorted(effects.kinds),
        "paper": {"gini_mean": 0.622, "share_above_0_01": 0.065, "spearman_6_pairs": 0.921},
    }
    result.add("selection", figures, **notes)


def six_pairs(effects: PairEffects, full: np.ndarray, cfg: SelectConfig) -> dict[str, float]:
    """Agreement of scores from six random pairs with those from all, mean of several draws."""
    rng, found = np.random.default_rng(cfg.seed), []
    for _ in range(DRAWS):
        few = effects.take(rng.permutation(len(effects.probe))[:6]).score(cfg.ie_floor)
        found.append((spearman(few, full), top_jaccard(few, full, 20)))
    rho, jaccard = np.nanmean(found, axis=0)
    return {"spearman_6_pairs": float(rho), "top20_jaccard_6_pairs": float(jaccard)}


def measure_shortcut(subject: Subject, result: Result) -> None:
    """The shortcut against the patch of the whole sequence, and both against the clock."""
    context = subject.context
    pairs = [pair for probe in context.probes for pair in probe.pairs]
    parts = batches(pairs, context.cfg)
    model, (batch, rows) = context.model, parts[0]
    with jax.default_matmul_precision("float32"):
        shortcut = all_receivers(model, batch)[:rows]  # compiles
        began = time.perf_counter()
        for part, _ in parts:
            all_receivers(model, part)
        fast = time.perf_counter() - began
        shape = shortcut.shape[1:]
        rng = np.random.default_rng(context.cfg.seed)
        chosen = rng.permutation(shape[0] * shape[1])[:EXACT_HEADS]
        full = {h: full_patch(model, batch, *divmod(int(h), shape[1]))[:rows] for h in chosen}
        seconds = full_forward_seconds(model, [p for p, _ in parts], shape)
    want = np.stack(list(full.values()), axis=1)
    got = np.stack([shortcut[:, h // shape[1], h % shape[1]] for h in full], axis=1)
    figures = {
        "receiver_speedup": seconds / fast,
        "shortcut_max_rel_diff": float(np.abs(got - want).max() / np.abs(want).max()),
    }
    notes = {
        "shortcut_seconds": fast,
        "full_forward_seconds": seconds,
        "timed_heads": min(TIMED_HEADS, shape[0] * shape[1]),
        "largest_effect": float(np.abs(want).max()),
        "pairs": len(pairs),
        "tokens": context.cfg.context,
    }
    result.add("shortcut", figures, **notes)


def all_receivers(model: Model, batch: Batch) -> np.ndarray:
    """Receiver effects of all heads, on the host."""
    both = patching.read_both(model, batch)
    return jax.device_get(patching.receiver_effects(model, *both, batch))


def full_patch(model: Model, batch: Batch, layer: int, head: int) -> np.ndarray:
    """IE of one head by the whole sequence: its output under x' everywhere, attention frozen."""
    direction = patching.answer_direction(model, batch)
    x, seq = streams.begin(model, batch.clean, batch.segment_ids)
    y, _ = streams.begin(model, batch.corrupt, batch.segment_ids)
    patched = None
    for l, block in enumerate(model.layers):
        after, attn_out, o = streams.tapped(block, x, seq)
        after_y, _, other = streams.tapped(block, y, seq)
        if l == layer:
            heads = np.array([head])
            patched = streams.shifted(block, x, attn_out, (other - o)[:, :, heads], heads)
        elif l > layer:
            patched = streams.frozen(block, patched, attn_out)
        x, y = after, after_y
    m = [
        patching.metric(streams.final_norm(model.norm, streams.gather(z, batch.at)), direction)
        for z in (x, patched, y)
    ]
    return jax.device_get((m[0] - m[1]) / (m[0] - m[2]))


def full_forward_seconds(model: Model, parts: list[Batch], shape: tuple[int, int]) -> float:
    """What one full forward per head costs: timed for some heads, scaled to all."""

    def forward(batch: Batch) -> None:
        x, seq = streams.begin(model, batch.clean, batch.segment_ids)
        for block in model.layers:
            x = streams.plain(block, x, seq)
        x.block_until_ready()

    forward(parts[0])  # compiles
    total = shape[0] * shape[1]
    timed = min(TIMED_HEADS, total)
    began = time.perf_counter()
    for _ in range(timed):
        for part in parts:
            forward(part)
    return (time.perf_counter() - began) * total / timed


def measure_knockout(subject: Subject, result: Result) -> None:
    """Ablate in the order of the `patch` score, in random orders and in depth-matched ones."""
    context, heads = subject.context, subject.heads
    effects = PairEffects.load(Path(subject.cfg.out) / "effects.npz")
    score = effects.score(context.cfg.ie_floor)
    curve = knockout.measure(context, score, KNOCKOUT_PAIRS, matched=True)
    figures = {
        "knockout_auc_causal": float(curve.auc[0]),
        "knockout_auc_random_low": curve.band()[0],
        "knockout_auc_matched_low": curve.band(knockout.MATCHED)[0],
    }
    notes = curve.to_json() | {
        "auc_matched_band": curve.band(knockout.MATCHED),
        "scorer": heads["provenance"]["scorer"],
    }
    result.add("knockout", figures, **notes)


def measure_shapes(shape: ModelConfig, cfg: SelectConfig, result: Result, name: str) -> None:
    """Seconds of a whole `patch` selection on random weights, compilation included.

    Random weights answer nothing: pairs are random tokens, judged and kept whatever the verdict,
    and `ie_floor` is set so that as many heads are receivers as the paper calls critical (6.5 %).
    Effects mean nothing here; only the time does.
    """
    plan = HeadPlan.all_full(shape.num_layers, shape.num_heads, shape.num_kv_heads)
    hydra = HydraConfig.teacher()
    graphdef, params = init_params(shape, hydra, plan, cfg.seed, dtype=jnp.float32)
    model = bind(graphdef, jax.block_until_ready(params))
    began = time.perf_counter()
    with jax.default_matmul_precision("float32"):
        context = random_context(model, shape, cfg)
        direct = SCORERS["patch_recv"](context).raw_mean
        floor = max(float(np.quantile(direct, 1 - 0.065)), 1e-9)
        context.cfg = replace(cfg, ie_floor=floor)
        score(context)
    figures = {f"{name}_selection_seconds": time.perf_counter() - began}
    notes = {
        "weights": "random",
        "pairs_kept_whatever_the_verdict": True,
        "ie_floor": floor,
        "pairs": sum(len(probe.pairs) for probe in context.probes),
        "tokens": cfg.context,
        "text_tokens": cfg.text_rows * cfg.text_tokens,
        "peak_gpu_bytes": peak_bytes(),
    }
    result.add("shapes", figures, **notes)


def random_context(model: Model, shape: ModelConfig, cfg: SelectConfig) -> Context:
    """A context whose pairs and text are random tokens; every pair is judged, none is refused."""
    context = Context(cfg, shape, DataConfig(), lambda: model, lambda: None)
    rng = np.random.default_rng(cfg.seed)
    probes = [Probe(task) for task in cfg.probes]
    for probe in probes:
        for _ in range(cfg.pairs):
            probe.pairs.append(random_pair(rng, shape.vocab_size, cfg.context))
        for batch, _ in batches(probe.pairs, cfg):
            patching.judge(model, batch)
    context.probes = probes
    size = (min(cfg.rows, cfg.text_rows), cfg.text_tokens)
    ones, places = np.ones(size, np.int32), np.broadcast_to(np.arange(size[1]), size)
    context.text = [
        {
            "tokens": rng.integers(shape.vocab_size, size=size, dtype=np.int32),
            "segment_ids": ones,
            "positions": places.astype(np.int32),
            "loss_mask": ones.astype(np.float32),
        }
        for _ in range(-(-cfg.text_rows // size[0]))
    ]
    return context


def random_pair(rng: np.random.Generator, vocab: int, tokens: int, span: int = 7) -> Pair:
    """Random tokens; x and x' differ in a span somewhere."""
    clean = rng.integers(vocab, size=tokens - 1)
    corrupt, start = clean.copy(), int(rng.integers(tokens - 2 * span))
    corrupt[start : start + span] = rng.integers(vocab, size=span)
    answer, other = rng.integers(vocab, size=(2, span))
    return Pair(*(tuple(map(int, ids)) for ids in (clean, corrupt, answer, other)), start)


def peak_bytes() -> int | None:
    """Most device memory ever used by this process; None where the platform does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"leftover arguments {argv[1:]}; options are --config.select.seed=1.")
    cfg = RunConfig.from_dict(flags.FLAGS.config)
    if cfg.select.scorer != "patch":
        raise UserError(f"select.scorer={cfg.select.scorer}: this command measures patch.")
    result = Result.open(
        Path(flags.FLAGS.result), ["python", "-m", "hydrajax.selection.measure", *sys.argv[1:]], cfg
    )
    subject, name = Subject(cfg), flags.FLAGS.shape
    qwen = replace(cfg.select, context=flags.FLAGS.shape_context, rows=2)
    parts: dict[str, tuple[str, Callable[[], None]]] = {
        "selection": ("selection_seconds", lambda: measure_selection(subject, result)),
        "shortcut": ("receiver_speedup", lambda: measure_shortcut(subject, result)),
        "knockout": ("knockout_auc_causal", lambda: measure_knockout(subject, result)),
        "shapes": (
            f"{name}_selection_seconds",
            lambda: measure_shapes(SHAPES[name], qwen, result, name),
        ),
    }
    for part in flags.FLAGS.parts:
        figure, measure = parts[part]
        if figure not in result.summary:
            measure()


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("result", None, "file to write", required=True)
    flags.DEFINE_multi_enum(
        "parts",
        ["selection", "shortcut", "knockout", "shapes"],
        ["selection", "shortcut", "knockout", "shapes"],
        "parts to measure, in this order",
    )
    flags.DEFINE_enum("shape", "qwen3_1p7b", list(SHAPES), "shapes of part `shapes`")
    flags.DEFINE_integer("shape_context", 4096, "tokens of its probes")
    flags.mark_flag_as_required("config")
    run_command(main)
