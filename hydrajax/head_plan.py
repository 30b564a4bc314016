"""HeadPlan: which query heads of each layer keep softmax attention; static, hashable, JSON.

A plan stores query-head ids; the KV heads that stay cached are derived. With G = N / K query
heads per KV head, FA head n reads KV head n // G.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hydrajax.typing import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerPlan:
    """One layer's split; every field is a static tuple, so a layer can be built from it alone."""

    fa: tuple[int, ...]
    num_heads: int
    num_kv_heads: int

    @property
    def group(self) -> int:
        """G, query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def la(self) -> tuple[int, ...]:
        """LA query heads: the others, sorted."""
        return tuple(n for n in range(self.num_heads) if n not in set(self.fa))

    @cached_property
    def kv_fa(self) -> tuple[int, ...]:
        """KV heads that some FA head reads, sorted: the only ones cached."""
        return tuple(sorted({n // self.group for n in self.fa}))

    @cached_property
    def kv_la(self) -> tuple[int, ...]:
        """KV heads of the teacher that LA heads come from, sorted."""
        return tuple(sorted({n // self.group for n in self.la}))

    @cached_property
    def fa_to_kv(self) -> tuple[int, ...]:
        """For each FA head its position in `kv_fa`."""
        return tuple(self.kv_fa.index(n // self.group) for n in self.fa)

    @cached_property
    def la_to_kv(self) -> tuple[int, ...]:
        """For each LA head its position in `kv_la`."""
        return tuple(self.kv_la.index(n // self.group) for n in self.la)

    @cached_property
    def restore(self) -> tuple[int, ...]:
        """Where head n sits in "FA first, LA after": gathering with it restores the order."""
        order = self.fa + self.la
        return tuple(order.index(n) for n in range(self.num_heads))


@dataclass(frozen=True)
class HeadPlan:
    """FA query heads per layer. Raises `UserError` on ids out of range, unsorted or repeated."""

    fa: tuple[tuple[int, ...], ...]
    num_heads: int
    num_kv_heads: int

    def __post_init__(self):
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"head plan: num_kv_heads={self.num_kv_heads} must divide "
                f"num_heads={self.num_heads}."
            )
        for l, heads in enumerate(self.fa):
            if list(heads) != sorted(set(heads)):
                raise UserError(
                    f"head plan: layer {l} must list sorted, distinct heads, got {heads}."
                )
            if heads and not (heads[0] >= 0 and heads[-1] < self.num_heads):
                raise UserError(
                    f"head plan: layer {l} names heads outside 0..{self.num_heads - 1}: {heads}."
                )

    @classmethod
    def all_full(cls, num_layers: int, num_heads: int, num_kv_heads: int) -> "HeadPlan":
        """Every head full attention: the teacher."""
        return cls((tuple(range(num_heads)),) * num_layers, num_heads, num_kv_heads)

    @classmethod
    def layerwise(
        cls, full_layers, num_layers: int, num_heads: int, num_kv_heads: int
    ) -> "HeadPlan":
        """All heads of `full_layers` full, none elsewhere: the layer-wise hybrids of the field."""
        bad = sorted(set(full_layers) - set(range(num_layers)))
        if bad:
            raise UserError(f"head plan: layers {bad} do not exist; the model has {num_layers}.")
        every = tuple(range(num_heads))
        return cls(
            tuple(every if l in set(full_layers) else () for l in range(num_layers)),
            num_heads,
            num_kv_heads,
        )

    @property
    def num_layers(self) -> int:
        return len(self.fa)

    @property
    def num_fa(self) -> int:
        """FA query heads in all layers."""
        return sum(map(len, self.fa))

    @property
    def num_kv_kept(self) -> int:
        """KV heads that stay cached, in all layers."""
        return sum(len(self.layer(l).kv_fa) for l in range(self.num_layers))

    def layer(self, l: int) -> LayerPlan:
        return LayerPlan(self.fa[l], self.num_heads, self.num_kv_heads)

    def fits(self, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
        """Raise `UserError` unless the plan was made for a model of this shape."""
        want, got = (
            (num_layers, num_heads, num_kv_heads),
            (len(self.fa), self.num_heads, self.num_kv_heads),
        )
        if want != got:
            raise UserError(
                f"head plan is for (layers, heads, kv_heads)={got}, the model has {want}; "
                "run the selection on this teacher."
            )

    def to_json(self) -> dict:
        return {"format_version": FORMAT_VERSION, "fa": [list(h) for h in self.fa],
                "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads}  # fmt: skip

    @classmethod
    def from_json(cls, data: dict) -> "HeadPlan":
        missing = [
            k for k in ("format_version", "fa", "num_heads", "num_kv_heads") if k not in data
        ]
        if missing:
            raise UserError(f"head plan: missing fields {missing}.")
        if data["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"head plan: format_version {data['format_version']} is not {FORMAT_VERSION}; "
                "write it again with this version's `python -m hydrajax.selection`."
            )
        return cls(tuple(tuple(h) for h in data["fa"]), data["num_heads"], data["num_kv_heads"])


def load_plan(path: str | Path) -> HeadPlan:
    """Plan of a `heads.json`; the file's other fields (scores, provenance) are not needed here."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"No head plan at {path}; run `python -m hydrajax.selection`, or set config.heads."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return HeadPlan.from_json(data["plan"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a heads.json: {e!r}.") from e


def cache_bytes(
    plan: HeadPlan, head_dim: int, tokens: int, *, conv: bool = False, expanded_kv: bool = False
) -> int:
    """Decode memory of one sequence in bytes: bf16 KV of kept heads plus fp32 GDN states.

    2 · Σ_l |kv_fa| · H · 2 B · T  +  Σ_l R_l · (H·E·4 B + [conv] 3·3·H·2 B), with E = H.
    """
    total = 0
    for l in range(plan.num_layers):
        layer = plan.layer(l)
        kv = len(layer.fa) if expanded_kv else len(layer.kv_fa)
        total += 2 * kv * head_dim * 2 * tokens
        total += len(layer.la) * (head_dim * head_dim * 4 + (9 * head_dim * 2 if conv else 0))
    return total


def ratios(plan: HeadPlan, head_dim: int, *, conv: bool = False, expanded_kv: bool = False) -> dict:
    """The three shares that must be read together: FA query heads, kept KV heads, cache bytes."""
    full = HeadPlan.all_full(plan.num_layers, plan.num_heads, plan.num_kv_heads)
    share = {
        name: cache_bytes(plan, head_dim, t, conv=conv, expanded_kv=expanded_kv)
        / cache_bytes(full, head_dim, t)
        for name, t in (("4k", 4096), ("128k", 131_072), ("512k", 524_288))
    }
    return {
        "fa_query_heads": plan.num_fa / (plan.num_layers * plan.num_heads),
        "kept_kv_heads": plan.num_kv_kept / (plan.num_layers * plan.num_kv_heads),
        "cache_bytes": share,
    }
