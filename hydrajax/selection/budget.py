"""Budget: ranked heads become a HeadPlan of an exact size; ties are never broken by index.

    units  n = floor(ratio · L · U + 1/2), U = N query heads or K KV groups of a layer
    order  score → further keys (raw mean effect, ...) → the layer with the fewest units chosen
           so far → a seeded permutation

Every allocation is a schedule of caps: "until so many units are chosen in all, no layer may hold
more than cap". The greedy choice below knows nothing else about them.
"""

import math
from collections.abc import Sequence

import numpy as np

from hydrajax.config import ModelConfig, SelectConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.typing import Float, Int, UserError


def make_plan(
    keys: Sequence[Float[np.ndarray, "L N"]], cfg: SelectConfig, model: ModelConfig
) -> HeadPlan:
    """Choose the FA heads; `keys` rank heads from the first key on, larger is better."""
    if cfg.alloc == "layerwise":
        shape = model.num_layers, model.num_heads, model.num_kv_heads
        return HeadPlan.layerwise(full_layers(cfg, model.num_layers), *shape)
    rank_LU = unit_ranks(keys, cfg, model)
    chosen_LU = _choose(rank_LU, _caps(cfg, rank_LU.shape), np.random.default_rng(cfg.seed))
    chosen_LN = np.repeat(chosen_LU, heads_per_unit(cfg, model), axis=1)
    fa = tuple(tuple(np.flatnonzero(row).tolist()) for row in chosen_LN)
    return HeadPlan(fa, model.num_heads, model.num_kv_heads)


def check(cfg: SelectConfig, model: ModelConfig) -> None:
    """Raise the `UserError` that `make_plan` would raise, before anything is measured."""
    make_plan([np.zeros((model.num_layers, model.num_heads))], cfg, model)


def heads_per_unit(cfg: SelectConfig, model: ModelConfig) -> int:
    """Query heads that are chosen together: 1, or the G heads of a KV group."""
    return 1 if cfg.unit == "q_head" else model.num_heads // model.num_kv_heads


def budget_units(cfg: SelectConfig, model: ModelConfig) -> int:
    """Units that stay full attention in all layers, rounded half up."""
    units = model.num_layers * (model.num_heads // heads_per_unit(cfg, model))
    return round_half_up(cfg.ratio * units)


def full_layers(cfg: SelectConfig, num_layers: int) -> tuple[int, ...]:
    """Full layers of a layer-wise plan: those named, else floor(ratio · L + 1/2) spread evenly."""
    return cfg.layers or evenly_spaced(round_half_up(cfg.ratio * num_layers), num_layers)


def evenly_spaced(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices, each in the middle of its stretch: (1, 4, 7) for 3 of 9."""
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def tie_share(
    score_LN: Float[np.ndarray, "L N"], plan: HeadPlan, cfg: SelectConfig, model: ModelConfig
) -> float:
    """Share of the chosen units whose score lies below the floor, where the tie-break decides."""
    chosen_LN = np.zeros(score_LN.shape, bool)
    for l, heads in enumerate(plan.fa):
        chosen_LN[l, list(heads)] = True
    by_unit = (model.num_layers, -1, heads_per_unit(cfg, model))
    chosen_LU = chosen_LN.reshape(by_unit).any(-1)
    weak_LU = score_LN.reshape(by_unit).max(-1) < cfg.ie_floor
    return float((chosen_LU & weak_LU).sum() / max(chosen_LU.sum(), 1))


def round_half_up(x: float) -> int:
    # The small term keeps decimal halves halves: 0.145 · 100 is 14.499999999999998 in binary.
    return math.floor(x + 0.5 + 1e-9)


def unit_ranks(
    keys: Sequence[Float[np.ndarray, "L N"]], cfg: SelectConfig, model: ModelConfig
) -> Int[np.ndarray, "L U"]:
    """Dense rank of each unit, 0 best, equal for ties; a KV group ranks as its best head."""
    flat = np.stack([np.ravel(key) for key in keys], axis=-1)
    if not np.isfinite(flat).all():
        raise UserError("Head scores are not finite; check that the teacher's weights are.")
    _, rank = np.unique(-flat, axis=0, return_inverse=True)  # rows sorted: first key first
    return rank.reshape(model.num_layers, -1, heads_per_unit(cfg, model)).min(-1)


def _caps(cfg: SelectConfig, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Schedule (units chosen in all, cap of a layer) of an allocation."""
    layers, units = shape
    total = round_half_up(cfg.ratio * layers * units)
    if cfg.alloc == "global":
        return [(total, units)]
    if cfg.alloc == "per_layer":
        each = total // layers
        return [(each * layers, each), (total, each + 1)]
    if total < layers:
        least = math.ceil((layers - 0.5) / (layers * units) * 1e4) / 1e4
        raise UserError(
            f"select.ratio={cfg.ratio:g} gives {total} {cfg.unit} units for {layers} layers, but "
            f"select.alloc=global_c keeps one in each: use a ratio >= {least:g} or alloc=global."
        )
    return [(layers, 1), (total, units)]


def _choose(
    rank_LU: Int[np.ndarray, "L U"], caps: list[tuple[int, int]], rng: np.random.Generator
) -> np.ndarray:
    """Greedy choice under a schedule of caps, one unit at a time since ties watch the counts."""
    size = rank_LU.size
    lot_LU = rng.permutation(size).reshape(rank_LU.shape)
    chosen_LU = np.zeros(rank_LU.shape, bool)
    for total, cap in caps:
        while chosen_LU.sum() < total:
            count_L1 = chosen_LU.sum(1, keepdims=True)
            # One integer per unit orders the triple (rank, layer's count, lot).
            order_LU = (rank_LU * size + count_L1) * size + lot_LU
            barred_LU = chosen_LU | (count_L1 >= cap)
            chosen_LU.flat[np.where(barred_LU, np.iinfo(np.int64).max, order_LU).argmin()] = True
    return chosen_LU
