"""Scorers: functions from a Context to Scores. A new one is a function here and a line in SCORERS.

Scores from pairs follow `fusion`: effects → κ → one capability, then fused with general ability.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import numpy as np

from hydrajax.config import DataConfig, ModelConfig, SelectConfig
from hydrajax.data import make_pipeline
from hydrajax.data.synthetic import check_task
from hydrajax.model import Model
from hydrajax.selection import ablation, attribution, budget, patching, paths
from hydrajax.selection.duo import learn_gates
from hydrajax.selection.fusion import PairEffects, fuse
from hydrajax.selection.probes import Probe, batches, collect
from hydrajax.selection.work import Work
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import Float, UserError

# Every head is tried as a sender on a few pairs (six rank heads well, HydraHead reports). Those
# that reach a share of ie_floor on some probe are tried on all, the best of them to bound the cost.
SCREEN_PAIRS = 6
SCREEN_FLOOR = 0.25
SCREEN_MOST = 0.25  # of all heads
NOISE = 0.1  # differences of effects below this share of ie_floor are ties


@dataclass(frozen=True)
class Scores:
    """What a scorer says of every head; larger is more worth keeping full attention."""

    score: Float[np.ndarray, "L N"]  # >= 0, what the budget ranks by
    raw_mean: Float[np.ndarray, "L N"]  # signed mean effect, the first tie-break
    consistency: Float[np.ndarray, "L N"]  # κ
    per_probe: dict[str, Float[np.ndarray, "L N"]] = field(default_factory=dict)
    parts: dict[str, Float[np.ndarray, "L N"]] = field(default_factory=dict)  # score by capability
    tie_breaks: tuple[Float[np.ndarray, "L N"], ...] = ()  # further keys, after raw_mean
    counts: dict[str, dict[str, int]] = field(default_factory=dict)  # pairs of each probe
    effects: PairEffects | None = None  # what the score is made of, where pairs were measured
    measured: bool = False  # False for controls, whose scores mean nothing but an order

    @property
    def strength(self) -> Float[np.ndarray, "L N"]:
        """The best of the capabilities, each in [0, 1]: what says whether a head is a tie."""
        return np.max([np.clip(p, 0, 1) for p in self.parts.values()] or [self.score], axis=0)

    @property
    def keys(self) -> tuple[Float[np.ndarray, "L N"], ...]:
        """Keys of the budget's ranking, in order."""
        return (self.score, self.raw_mean, *self.tie_breaks)


@dataclass
class Context:
    """What scorers may use; weights, probes and text are loaded when one first asks for them."""

    cfg: SelectConfig
    shape: ModelConfig
    data: DataConfig
    load_model: Callable[[], Model]
    load_tokenizer: Callable[[], Tokenizer]
    work: Work = field(default_factory=Work)
    log: Callable[[str], None] = print

    @cached_property
    def model(self) -> Model:
        return self.load_model()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.load_tokenizer()

    @cached_property
    def probes(self) -> list[Probe]:
        """Accepted pairs of every probe."""
        if not self.cfg.probes:
            raise UserError(f"select.probes is empty, scorer {self.cfg.scorer} needs at least one.")
        if self.cfg.context > self.shape.max_context:
            raise UserError(
                f"select.context={self.cfg.context} exceeds the teacher's max_context="
                f"{self.shape.max_context}; choose a shorter one."
            )
        for task in self.cfg.probes:
            check_task(task)
        probes, judge = [], partial(patching.judge, self.model)
        for task in self.cfg.probes:
            probes.append(collect(task, self.cfg, self.tokenizer, judge))
            self.log(f"probe {task}: {_words(probes[-1].counts())}")
        return probes

    @cached_property
    def text(self) -> list[ablation.Rows]:
        """Plain text of the training split: `text_rows` rows in batches of `rows`."""
        share = 0.0 if self.data.files else 1.0
        if not (self.data.files or self.data.synthetic):
            raise UserError(
                "select.general=ppl reads plain text: set data.files, or select.general=none."
            )
        rows = min(self.cfg.rows, self.cfg.text_rows)
        data = replace(self.data, rows=rows, seq_len=self.cfg.text_tokens, workers=0,
                       synthetic_share=share)  # fmt: skip
        pipeline = make_pipeline(data, self.tokenizer, split="train")
        text = [next(pipeline) for _ in range(-(-self.cfg.text_rows // rows))]
        pipeline.close()
        return text

    def on_pairs(self, name: str, effects: Callable, pairs: list | None = None) -> np.ndarray:
        """`effects(batch)` [B, L, N] over all pairs of all probes, one after the other: [Q, L, N].

        With `pairs` over these alone."""
        pairs = [p for probe in self.probes for p in probe.pairs] if pairs is None else pairs
        parts = batches(pairs, self.cfg)
        measured = self.work.each(name, parts, lambda part: effects(part[0])[: part[1]])
        return np.concatenate(measured).astype(np.float64)


def patch(context: Context) -> Scores:
    """Receivers and senders: heads that carry the answer, directly or through others."""
    direct, floor = _receivers(context), context.cfg.ie_floor
    receivers = direct.mean(0) >= floor
    carriers, kinds = np.zeros_like(receivers), {"receivers": direct}
    for name in [f"senders_{i + 1}" for i in range(context.cfg.sender_rounds)]:
        roles = paths.Roles(np.ones_like(receivers), receivers, carriers)
        kinds[name] = _senders(context, name, roles)
        found = (kinds[name].mean(0) >= floor) & ~receivers & ~carriers
        if not found.any():
            break
        carriers = carriers | found
    return _combine(context, **kinds)


def patch_recv(context: Context) -> Scores:
    """Receivers: heads whose clean output at the answer carries it."""
    return _combine(context, receivers=_receivers(context))


def atp(context: Context) -> Scores:
    """Attribution patching, both kinds of effect at once and to first order."""
    return _combine(context, atp=np.abs(_attributions(context)))


def ablate(context: Context) -> Scores:
    """Drop of the answer's metric when a head gives its mean, or nothing (2602.11374)."""
    model, shape = context.model, context.shape
    pairs = [pair for probe in context.probes for pair in probe.pairs]
    values = np.zeros((shape.num_layers, shape.num_heads, shape.head_dim), np.float32)
    with jax.default_matmul_precision("tensorfloat32"):
        if context.cfg.ablation == "mean":
            values = ablation.prompt_means(model, [b for b, _ in batches(pairs, context.cfg)])
        drops = context.on_pairs("ablate", lambda batch: ablation.drops(model, batch, values))
    return _combine(context, ablate=drops)


def retrieval(context: Context) -> Scores:
    """Retrieval heads (2404.15574): whose strongest attention falls on the token being copied."""
    shares = context.on_pairs("retrieval", partial(patching.copies, context.model))
    return _combine(context, retrieval=shares)


def duo(context: Context) -> Scores:
    """Learned gates of KV heads: the share of full attention that an answer needs."""
    pairs = [pair for probe in context.probes for pair in probe.pairs]
    parts = [batch for batch, _ in batches(pairs, context.cfg)]
    learn = partial(learn_gates, context.model, parts)
    (gates_LK,) = context.work.each("gates", [context.cfg.duo_steps], learn)
    group = context.shape.num_heads // context.shape.num_kv_heads
    score = np.repeat(gates_LK.astype(np.float64), group, axis=1)
    counts = {probe.task: probe.counts() for probe in context.probes}
    return Scores(score, score, (score > 0).astype(float), counts=counts, measured=True)


def ppl(context: Context) -> Scores:
    """General ability: rise of the loss on plain text, in nats a token, by mean ablation."""
    rise = _loss_rise(context)
    score = np.maximum(rise, 0.0)
    return Scores(score, rise, (rise > 0).astype(float), {"ppl": rise}, measured=True)


def random(context: Context) -> Scores:
    """Control: every head an own place in a seeded order."""
    size = context.shape.num_layers * context.shape.num_heads
    return _control(context, np.random.default_rng(context.cfg.seed).permutation(size) / size)


def fixed(context: Context) -> Scores:
    """Control: the same evenly spaced heads in every layer, a remainder in random layers."""
    layers, group = context.shape.num_layers, budget.heads_per_unit(context.cfg, context.shape)
    units = context.shape.num_heads // group
    order = _spread_order(budget.budget_units(context.cfg, context.shape) // layers, units)
    score_U = np.empty(units)
    score_U[order] = np.linspace(1, 0, units, endpoint=False)
    return _control(context, np.tile(np.repeat(score_U, group), layers))


def layerwise(context: Context) -> Scores:
    """Control: all heads of the full layers; `budget` takes the layers from the config."""
    full = budget.full_layers(context.cfg, context.shape.num_layers)
    in_full = np.isin(np.arange(context.shape.num_layers), full)
    return _control(context, np.repeat(in_full, context.shape.num_heads).astype(float))


SCORERS: dict[str, Callable[[Context], Scores]] = {
    "patch": patch,
    "patch_recv": patch_recv,
    "atp": atp,
    "ablate": ablate,
    "retrieval": retrieval,
    "duo": duo,
    "ppl": ppl,
    "random": random,
    "fixed": fixed,
    "layerwise": layerwise,
}


def score(context: Context) -> Scores:
    """The configured scorer, fused with general ability where that is asked for."""
    cfg = context.cfg
    found = SCORERS[cfg.scorer](context)
    if not found.measured or cfg.scorer == "ppl" or cfg.general == "none":
        return found
    rise = ppl(context).raw_mean
    parts = {"retrieval": found.score, "general": np.maximum(rise, 0.0)}
    resolution = NOISE * cfg.ie_floor
    estimate = np.abs(_attributions(context)).mean(0)
    return replace(
        found,
        score=fuse(list(parts.values()), cfg.fuse_norm),
        raw_mean=np.round(found.raw_mean / resolution) * resolution,
        tie_breaks=(np.round(estimate / resolution) * resolution, rise),
        parts=parts,
    )


def _receivers(context: Context) -> Float[np.ndarray, "Q L N"]:
    model = context.model
    return context.on_pairs(
        "receivers",
        lambda batch: patching.receiver_effects(model, *patching.read_both(model, batch), batch),
    )


def _attributions(context: Context) -> Float[np.ndarray, "Q L N"]:
    return context.on_pairs("atp", partial(attribution.attributions, context.model))


def _senders(context: Context, name: str, roles: paths.Roles) -> Float[np.ndarray, "Q L N"]:
    """Effects of all heads as senders; those that do nothing on a few pairs are left at that."""
    places = [(i, p) for i, probe in enumerate(context.probes) for p in range(len(probe.pairs))]
    probe_Q, place_Q = np.array(places).T
    effects_QLN = np.zeros((len(places), *roles.senders.shape))
    if roles.last < 1:
        return effects_QLN
    pairs = [context.probes[i].pairs[p] for i, p in places]
    first_Q = place_Q < max(1, SCREEN_PAIRS // len(context.probes))
    pick = lambda chosen_Q: [pair for pair, yes in zip(pairs, chosen_Q, strict=True) if yes]  # noqa: E731
    effects_QLN[first_Q] = _send(context, f"{name}_screen", roles, pick(first_Q))
    few_ILN = np.stack([
        effects_QLN[first_Q & (probe_Q == i)].mean(0) for i in range(len(context.probes))
    ])  # fmt: skip
    alive = _survivors(np.abs(few_ILN).max(0), SCREEN_FLOOR * context.cfg.ie_floor)
    context.log(
        f"{name}: {roles.receivers.sum()} receivers, {roles.carriers.sum()} carriers, "
        f"{alive.sum()} of {alive.size} heads past the screen"
    )
    if not first_Q.all():
        rest = _send(context, name, replace(roles, senders=alive), pick(~first_Q))
        effects_QLN[~first_Q] = np.where(alive, rest, few_ILN[probe_Q[~first_Q]])
    return effects_QLN


def _survivors(effect_LN: np.ndarray, floor: float) -> np.ndarray:
    """Heads that reach the floor, at most SCREEN_MOST of all."""
    most = max(1, int(SCREEN_MOST * effect_LN.size))
    return (effect_LN >= floor) & (effect_LN >= np.sort(effect_LN, axis=None)[-most])


def _send(context: Context, name: str, roles: paths.Roles, pairs: list) -> np.ndarray:
    # Residuals of whole sequences: TF32 keeps three digits of an effect and is ten times faster.
    with jax.default_matmul_precision("tensorfloat32"):
        freeze = context.cfg.sender_freeze
        return context.on_pairs(
            name, lambda batch: paths.sender_effects(context.model, batch, roles, freeze), pairs
        )


def _loss_rise(context: Context) -> Float[np.ndarray, "L N"]:
    model, text = context.model, context.text
    with jax.default_matmul_precision("tensorfloat32"):
        sums = context.work.each("head means", text, partial(ablation.head_sums, model))
        tokens = sum(int((batch["segment_ids"] > 0).sum()) for batch in text)
        means = (sum(sums) / tokens).astype(np.float32)
        rises = context.work.each(
            "ppl", text, lambda batch: ablation.loss_rise(model, batch, means)
        )
    return np.asarray(sum(rises), np.float64) / sum(map(ablation.scored_tokens, text))


def _combine(context: Context, **kinds: Float[np.ndarray, "Q L N"]) -> Scores:
    """Scores of one capability from the effects on every pair."""
    probes, floor = context.probes, context.cfg.ie_floor
    of_pair = np.repeat(np.arange(len(probes)), [len(probe.pairs) for probe in probes])
    effects = PairEffects(kinds, of_pair)
    return Scores(
        effects.score(floor),
        effects.raw_mean(),
        effects.consistency(floor),
        {p.task: e for p, e in zip(probes, effects.by_probe(), strict=True)},
        counts={probe.task: probe.counts() for probe in probes},
        effects=effects,
        measured=True,
    )


def _control(context: Context, score: Float[np.ndarray, "LN"]) -> Scores:
    score_LN = score.reshape(context.shape.num_layers, context.shape.num_heads)
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
