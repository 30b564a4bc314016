"""Probes: counterfactual pairs as token arrays, read where the answer is predicted.

    x   prompt with the true answer a+ in its context, then a+ (teacher-forced) less its last token
    x'  the same prompt with another answer a- in its place, then the same forced tokens
        (answer_prefix=own: a- instead)

Both have equal length, and the last |a| positions are the ones that predict the answer. A pair
counts only if the teacher says a+ on x and the clean-corrupt gap of the metric is large enough.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import jax
import numpy as np

from hydrajax.config import SelectConfig
from hydrajax.data.synthetic import counterfactual, encode_example, make_example
from hydrajax.tokenizer import Tokenizer
from hydrajax.typing import Bool, Float, Int, UserError

CANDIDATES = 4  # candidates tried per wanted pair before a probe gives up


@dataclass(frozen=True)
class Pair:
    """One counterfactual pair; token ids include the forced answer less its last token."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: tuple[int, ...]  # a+
    distractor: tuple[int, ...]  # a-
    start: int  # where the answer stands in the prompt


@dataclass(frozen=True)
class Batch:
    """Pairs as arrays: right-padded rows and, per row, readouts padded with weight 0."""

    clean: Int[np.ndarray, "B T"]
    corrupt: Int[np.ndarray, "B T"]
    segment_ids: Int[np.ndarray, "B T"]  # 0 = padding
    at: Int[np.ndarray, "B P"]  # positions that predict the answer
    answer: Int[np.ndarray, "B P"]
    distractor: Int[np.ndarray, "B P"]
    source: Int[np.ndarray, "B P"]  # where each answer token stands in the prompt
    weight: Float[np.ndarray, "B P"]  # lambda^j, rows sum to 1


jax.tree_util.register_dataclass(Batch, [f.name for f in fields(Batch)], [])


@dataclass
class Probe:
    """Accepted pairs of one task, and what became of the other candidates."""

    task: str
    pairs: list[Pair] = field(default_factory=list)
    wrong: int = 0  # the teacher's argmax on x misses an answer token
    small_gap: int = 0  # m(x) - m(x') < min_gap

    def counts(self) -> dict[str, int]:
        return {"accepted": len(self.pairs), "wrong": self.wrong, "small_gap": self.small_gap}


# Judges a batch with the teacher: the gap m(x) - m(x') and "argmax is a+ everywhere", per row.
Judge = Callable[[Batch], tuple[Float[np.ndarray, "B"], Bool[np.ndarray, "B"]]]


def make_pair(task: str, cfg: SelectConfig, tokenizer: Tokenizer, rng: np.random.Generator) -> Pair:
    """Draw one candidate that fits into `cfg.context` tokens."""
    example = make_example(task, rng, tokens=cfg.context, tokenizer=tokenizer)
    clean = encode_example(example, tokenizer)
    corrupt = encode_example(counterfactual(example, rng, tokenizer), tokenizer)
    forced = clean.answer if cfg.answer_prefix == "clean" else corrupt.answer
    return Pair(
        clean=(*clean.prompt, *clean.answer[:-1]),
        corrupt=(*corrupt.prompt, *forced[:-1]),
        answer=tuple(clean.answer),
        distractor=tuple(corrupt.answer),
        start=clean.span[0],
    )


def make_batch(pairs: Sequence[Pair], cfg: SelectConfig) -> Batch:
    """Stack at most `cfg.rows` pairs; missing rows repeat the first, so that shapes stay few."""
    pairs = [*pairs, *[pairs[0]] * (cfg.rows - len(pairs))]
    longest = max(len(pair.answer) for pair in pairs)
    width = 1 << (longest - 1).bit_length()
    weight = np.zeros((len(pairs), width), np.float32)
    at, segments = np.zeros((len(pairs), width), np.int32), np.zeros((len(pairs), cfg.context), int)
    for b, pair in enumerate(pairs):
        span, length = len(pair.answer), len(pair.clean)
        decayed = cfg.span_decay ** np.arange(span)
        weight[b, :span] = decayed / decayed.sum()
        at[b, :span] = np.arange(length - span, length)
        segments[b, :length] = 1
    return Batch(
        clean=_padded([p.clean for p in pairs], cfg.context),
        corrupt=_padded([p.corrupt for p in pairs], cfg.context),
        segment_ids=segments.astype(np.int32),
        at=at,
        answer=_padded([p.answer for p in pairs], width),
        distractor=_padded([p.distractor for p in pairs], width),
        source=_padded([range(p.start, p.start + len(p.answer)) for p in pairs], width),
        weight=weight,
    )


def batches(pairs: Sequence[Pair], cfg: SelectConfig) -> list[tuple[Batch, int]]:
    """Batches of `cfg.rows` rows, each with the number of rows that count."""
    parts = [pairs[i : i + cfg.rows] for i in range(0, len(pairs), cfg.rows)]
    return [(make_batch(part, cfg), len(part)) for part in parts]


def collect(task: str, cfg: SelectConfig, tokenizer: Tokenizer, judge: Judge) -> Probe:
    """Draw candidates until `cfg.pairs` are accepted; `UserError` when too few can be had."""
    rng = np.random.default_rng([cfg.seed, zlib.crc32(task.encode())])
    probe, left = Probe(task), CANDIDATES * cfg.pairs
    while left and len(probe.pairs) < cfg.pairs:
        count = min(cfg.rows, left)
        left -= count
        pairs = [make_pair(task, cfg, tokenizer, rng) for _ in range(count)]
        gap_B, right_B = judge(make_batch(pairs, cfg))
        for pair, gap, right in zip(pairs, gap_B, right_B, strict=False):
            if len(probe.pairs) == cfg.pairs:
                break
            if not right:
                probe.wrong += 1
            elif not gap >= cfg.min_gap:  # a NaN is refused too
                probe.small_gap += 1
            else:
                probe.pairs.append(pair)
    if len(probe.pairs) < cfg.min_pairs:
        raise UserError(_too_few(probe, cfg))
    return probe


def _too_few(probe: Probe, cfg: SelectConfig) -> str:
    tried = sum(probe.counts().values())
    return (
        f"select.probes: {probe.task} left {len(probe.pairs)} of {tried} candidate pairs, "
        f"select.min_pairs={cfg.min_pairs} are needed ({probe.wrong} answered wrongly by the "
        f"teacher, {probe.small_gap} with a gap below select.min_gap={cfg.min_gap:g}). Shorten "
        f"select.context={cfg.context}, choose an easier probe, or train the teacher on recall."
    )


def _padded(rows: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B W"]:
    out = np.zeros((len(rows), width), np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = list(ids)
    return out
