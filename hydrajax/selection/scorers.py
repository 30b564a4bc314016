"""Scorers: functions from a Context to Scores. A new one is a function here and a line in SCORERS.

κ_n = share of probes whose mean effect of head n exceeds ie_floor
s_n = clip(mean over probes, 0, 1) · κ_n          (HydraHead, 2606.20097, Eq. 11-12)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from flax import nnx

from hydrajax.config import ModelConfig, SelectConfig
from hydrajax.data.synthetic import check_task
from hydrajax.selection import budget, patching
from hydrajax.selection.probes import Probe, collect
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import Float, Params, UserError


@dataclass(frozen=True)
class Scores:
    """What a scorer says of every head; larger is more worth keeping full attention."""

    score: Float[np.ndarray, "L N"]  # in [0, 1], what the budget ranks by
    raw_mean: Float[np.ndarray, "L N"]  # signed mean effect, the first tie-break
    consistency: Float[np.ndarray, "L N"]  # κ
    per_probe: dict[str, Float[np.ndarray, "L N"]] = field(default_factory=dict)
    tie_breaks: tuple[Float[np.ndarray, "L N"], ...] = ()  # further keys, after raw_mean
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # pairs of each probe
    measured: bool = False  # False for controls, whose scores mean nothing but an order

    @property
    def keys(self) -> tuple[Float[np.ndarray, "L N"], ...]:
        """Keys of the budget's ranking, in order."""
        return (self.score, self.raw_mean, *self.tie_breaks)


@dataclass
class Context:
    """What scorers may use; weights and probes are loaded when one first asks for them."""

    cfg: SelectConfig
    model: ModelConfig
    load_teacher: Callable[[], tuple[nnx.GraphDef, Params]]
    load_tokenizer: Callable[[], Tokenizer]
    log: Callable[[str], None] = print

    @cached_property
    def teacher(self) -> tuple[nnx.GraphDef, Params]:
        return self.load_teacher()

    @cached_property
    def probes(self) -> list[Probe]:
        """Accepted pairs of every probe."""
        if not self.cfg.probes:
            raise UserError(f"select.probes is empty, scorer {self.cfg.scorer} needs at least one.")
        if self.cfg.context > self.model.max_context:
            raise UserError(
                f"select.context={self.cfg.context} exceeds the teacher's max_context="
                f"{self.model.max_context}; choose a shorter one."
            )
        for task in self.cfg.probes:
            check_task(task)
        tokenizer, judge = self.load_tokenizer(), partial(patching.judge, *self.teacher)
        probes = []
        for task in self.cfg.probes:
            probes.append(collect(task, self.cfg, tokenizer, judge))
            self.log(f"probe {task}: {_words(probes[-1].counts())}")
        return probes


def patch_recv(context: Context) -> Scores:
    """Receivers: heads whose clean output at the answer carries it."""
    effects = {}
    for probe in context.probes:
        pair_effects = patching.receivers(*context.teacher, probe.pairs, context.cfg)
        effects[probe.task] = pair_effects.mean(0)
    counts = {probe.task: probe.counts() for probe in context.probes}
    return combine(effects, context.cfg.ie_floor, counts)


def random(context: Context) -> Scores:
    """Control: every head an own place in a seeded order."""
    size = context.model.num_layers * context.model.num_heads
    return _control(context, np.random.default_rng(context.cfg.seed).permutation(size) / size)


def fixed(context: Context) -> Scores:
    """Control: the same evenly spaced heads in every layer, a remainder in random layers."""
    layers, group = context.model.num_layers, budget.heads_per_unit(context.cfg, context.model)
    units = context.model.num_heads // group
    order = _spread_order(budget.budget_units(context.cfg, context.model) // layers, units)
    score_U = np.empty(units)
    score_U[order] = np.linspace(1, 0, units, endpoint=False)
    return _control(context, np.tile(np.repeat(score_U, group), layers))


def layerwise(context: Context) -> Scores:
    """Control: all heads of the full layers; `budget` takes the layers from the config."""
    full = budget.full_layers(context.cfg, context.model.num_layers)
    in_full = np.isin(np.arange(context.model.num_layers), full)
    return _control(context, np.repeat(in_full, context.model.num_heads).astype(float))


SCORERS: dict[str, Callable[[Context], Scores]] = {
    "patch_recv": patch_recv,
    "random": random,
    "fixed": fixed,
    "layerwise": layerwise,
}


def combine(
    effects: dict[str, Float[np.ndarray, "L N"]], floor: float, counts: dict[str, dict[str, int]]
) -> Scores:
    """Scores of one capability from the mean effects of its probes."""
    effects_QLN = np.stack(list(effects.values())).astype(np.float64)
    raw_mean, consistency = effects_QLN.mean(0), (effects_QLN > floor).mean(0)
    score = np.clip(raw_mean, 0, 1) * consistency
    return Scores(score, raw_mean, consistency, effects, counts=counts, measured=True)


def _control(context: Context, score: Float[np.ndarray, "LN"]) -> Scores:
    score_LN = score.reshape(context.model.num_layers, context.model.num_heads)
    return Scores(score_LN, np.zeros_like(score_LN), np.zeros_like(score_LN))


def _spread_order(first: int, units: int) -> list[int]:
    """Units in order of preference: `first` evenly spaced ones, then always the loneliest."""
    order = list(budget.evenly_spaced(first or 1, units))
    while len(order) < units:
        rest = [u for u in range(units) if u not in order]
        order.append(max(rest, key=lambda u: min(abs(u - v) for v in order)))
    return order


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
