"""Teacher parameters + head plan → student parameters, and a report of where each came from.

Everything outside attention, W_O, the queries and the used KV heads are copied; K and V of LA
heads are cloned from KV head n // G; decay, write strength, gates and gamma are initialised as
HydraConfig says (`fla`; `taylor` after Taylor-Calibrate, 2606.16429; `blend` after Priming,
2605.08301). Calibration reads a few batches through the teacher.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.head_plan import HeadPlan, LayerPlan
from hydrajax.model import Model, bind, init_params
from hydrajax.typing import Array, Params, UserError

SILU_ONE = 1.2784645  # silu(1.2784645) = 1
NEAR_ONE_STD = 1e-4
GATE_RMS_FLOOR = 0.05
DECAY_RANGE = (1e-3, 5.0)
MIN_LOOK_BACK = 0.5


@dataclass(frozen=True)
class Report:
    """Parameter counts by origin."""

    copied: int
    cloned: int
    new: int

    def __str__(self) -> str:
        total = self.copied + self.cloned + self.new
        parts = [f"{getattr(self, k):,} {k}" for k in ("copied", "cloned", "new")]
        return f"{total:,} parameters: {', '.join(parts)}"


@dataclass(frozen=True)
class Teacher:
    """A bound-able teacher: static graph and its parameters."""

    graphdef: nnx.GraphDef
    params: Params
    cfg: ModelConfig


def transplant(
    teacher: Teacher,
    hydra: HydraConfig,
    plan: HeadPlan,
    batches: list[dict[str, np.ndarray]],
    seed: int,
) -> tuple[Params, Report]:
    """Student parameters (fp32). `batches` are calibration rows; `taylor`, `calibrated` and `ols`
    read them, and UserError says so when they are missing."""
    needs_data = hydra.gamma_init in ("calibrated", "ols") or hydra.gdn_init == "taylor"
    if needs_data and plan.num_fa < plan.num_layers * plan.num_heads and not batches:
        raise UserError(
            "transplant: gdn_init=taylor and gamma_init=calibrated|ols need calibration rows."
        )
    graphdef, params = init_params(teacher.cfg, hydra, plan, seed, dtype=jnp.float32)
    counts = {"copied": 0, "cloned": 0, "new": 0}
    for path in params:
        origin, value = _from_teacher(path, teacher.params, plan, hydra)
        if value is not None:
            params[path] = jnp.asarray(value, jnp.float32)
        counts[origin] += params[path].size

    rng = np.random.default_rng(seed)
    for l in range(plan.num_layers):
        params |= _fresh(f"layers.{l}.attn", params, teacher, hydra, plan.layer(l), rng)
    if hydra.gdn_init == "taylor" and batches:
        params |= _taylor(teacher, hydra, plan, batches[0])
    params |= _gamma(teacher, graphdef, params, hydra, plan, batches)
    return params, Report(**counts)


def _from_teacher(path: str, teacher: Params, plan: HeadPlan, hydra: HydraConfig):
    """(origin, value) of one student path; value None where the teacher has nothing to give."""
    if path in teacher and ".attn.fa." not in path:
        return "copied", teacher[path]
    parts = path.split(".")
    if ".attn." not in path or parts[3] not in ("fa", "la", "kv"):
        return "new", None
    source = ".".join([*parts[:3], "fa", parts[4]])
    if source not in teacher:
        return "new", None
    layer, value, branch, name = plan.layer(int(parts[1])), teacher[source], parts[3], parts[4]
    if name in ("q_norm", "k_norm"):
        return ("copied" if branch == "fa" else "cloned"), value
    heads_axis = value.ndim - 2
    if name in ("w_q", "b_q"):
        return "copied", np.take(value, layer.fa if branch == "fa" else layer.la, axis=heads_axis)
    kv, origin = _kv_heads(branch, layer, hydra)
    return origin, np.take(value, kv, axis=heads_axis)


def _kv_heads(branch: str, layer: LayerPlan, hydra: HydraConfig) -> tuple[list[int], str]:
    """Teacher KV heads that a branch's K and V are made of."""
    if branch == "kv":
        return list(range(layer.num_kv_heads)), "copied"
    if branch == "fa":
        if hydra.fa_kv == "expanded":
            return [n // layer.group for n in layer.fa], "cloned"
        return list(layer.kv_fa), "copied"
    if hydra.la_kv == "mha":
        return [n // layer.group for n in layer.la], "cloned"
    return list(layer.kv_la), "cloned"


def _fresh(
    prefix: str, params: Params, teacher: Teacher, hydra: HydraConfig, layer: LayerPlan, rng
) -> Params:
    """Gates, decay, write strength and convolution of one layer, before any calibration."""
    out: Params = {}
    for branch, heads in (("fa", layer.fa), ("la", layer.la)):
        if f"{prefix}.{branch}.w_z" in params:
            kind = "silu" if branch == "la" and hydra.la_gate == "silu" else "sigmoid"
            shape = params[f"{prefix}.{branch}.w_z"].shape
            out |= _gate(f"{prefix}.{branch}", shape, teacher, hydra.gate_init, heads, kind, rng)
    if not layer.la:
        return out
    la, heads, width = f"{prefix}.la", len(layer.la), teacher.cfg.width
    std = 2**-2.5 * math.sqrt(2 / (width + heads))  # Xavier with gain 2^-2.5, as fla does
    a = rng.uniform(1e-4, 16, heads)
    dt = np.maximum(np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), heads)), 1e-4)
    out |= {
        f"{la}.a_log": np.log(a),
        f"{la}.dt_bias": inverse_softplus(dt),
        f"{la}.beta_bias": np.zeros(heads),
        f"{la}.w_a": std * rng.standard_normal((width, heads)),
        f"{la}.w_b": std * rng.standard_normal((width, heads)),
    }
    if hydra.la_short_conv == "identity":
        for name in ("conv_q", "conv_k", "conv_v"):
            taps = np.zeros(params[f"{la}.{name}"].shape)
            taps[-1] = 1.0
            out[f"{la}.{name}"] = taps
    return {path: jnp.asarray(v, jnp.float32) for path, v in out.items()}


def _gate(prefix: str, shape, teacher: Teacher, init: str, heads, kind: str, rng) -> Params:
    """Output gate W_z, b_z of one branch."""
    bias = np.zeros(shape[1:])
    if init == "near_one":
        w = NEAR_ONE_STD * rng.standard_normal(shape)
        bias += 1.0 if kind == "sigmoid" else SILU_ONE
    elif init == "random":
        w = 0.02 * rng.standard_normal(shape)
    elif len(shape) == 2:
        raise UserError(
            "hydra.gate_init=blend needs an elementwise gate; fa_gate=headwise has none."
        )
    else:
        attn = prefix.rsplit(".", 1)[0]
        w_o, w_v = teacher.params[f"{attn}.w_o"], teacher.params[f"{attn}.fa.w_v"]
        group = teacher.cfg.num_heads // teacher.cfg.num_kv_heads
        ids = np.array(heads)
        w = 0.5 * (np.moveaxis(np.asarray(w_o)[ids], 2, 0) + np.asarray(w_v)[:, ids // group])
    return {
        f"{prefix}.w_z": jnp.asarray(w, jnp.float32),
        f"{prefix}.b_z": jnp.asarray(bias, jnp.float32),
    }


def inverse_softplus(y: np.ndarray) -> np.ndarray:
    """x with log(1 + e^x) = y, y > 0."""
    return y + np.log(-np.expm1(-y))


def _taylor(
    teacher: Teacher, hydra: HydraConfig, plan: HeadPlan, batch: dict[str, np.ndarray]
) -> Params:
    """Decay from each head's mean look-back distance, write strength from its entropy.

    A head that looks back d tokens on average gets a half-life of d: g = -ln 2 / d. A head with
    flat attention writes weakly (beta 0.3), a peaked one strongly (0.7). 4 x 256 tokens.
    """
    rows = {k: jnp.asarray(v[:4, :256]) for k, v in batch.items()}
    distance, entropy = jax.jit(
        lambda params, rows: _attention_shape(bind(teacher.graphdef, params), rows)
    )(teacher.params, rows)
    distance, entropy, out = np.asarray(distance), np.asarray(entropy), {}
    for l in range(plan.num_layers):
        la = np.array(plan.layer(l).la, int)
        if not len(la):
            continue
        decay = np.clip(math.log(2) / np.maximum(distance[l, la], MIN_LOOK_BACK), *DECAY_RANGE)
        beta = 0.3 + 0.4 * (1 - entropy[l, la])
        beta = beta / 2 if hydra.neg_eigval else beta  # the layer doubles its sigmoid then
        prefix = f"layers.{l}.attn.la"
        out |= {
            f"{prefix}.a_log": np.zeros(len(la)),
            f"{prefix}.w_a": np.zeros((teacher.cfg.width, len(la))),
            f"{prefix}.dt_bias": inverse_softplus(decay),
            f"{prefix}.beta_bias": np.log(beta) - np.log1p(-beta),
        }
    return {path: jnp.asarray(v, jnp.float32) for path, v in out.items()}


def _attention_shape(teacher: Model, rows: dict[str, Array]) -> tuple[Array, Array]:
    """Mean look-back distance in tokens and entropy / ln(context) of every head, [L, N] each."""
    inputs = {k: rows[k] for k in ("tokens", "segment_ids", "positions")}
    _, taps = teacher.hidden(**inputs, taps=("attn_in",))
    seq = teacher.sequence(rows["tokens"].shape, rows["segment_ids"], rows["positions"])
    segments, length = rows["segment_ids"], rows["tokens"].shape[1]
    back = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    mask = (back >= 0) & (segments[:, :, None] == segments[:, None, :])
    scored = ((segments > 0) & (seq.positions > 0)).astype(jnp.float32)  # one key has no choice
    context = jnp.log(jnp.maximum(seq.positions + 1, 2))

    def shape(attn, x):
        q, k, _ = attn.fa.qkv(x, seq, None)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(mask[:, None], logits * q.shape[-1] ** -0.5, -1e30))
        distance = jnp.einsum("bnts,ts->bnt", p, back.astype(jnp.float32))
        entropy = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-30)), axis=-1) / context[:, None]
        mean = lambda a: jnp.einsum("bnt,bt->n", a, scored) / jnp.sum(scored)  # noqa: E731
        return mean(distance), mean(entropy)

    shapes = [shape(b.attn, x) for b, x in zip(teacher.layers, taps.attn_in, strict=True)]
    return jnp.stack([d for d, _ in shapes]), jnp.stack([e for _, e in shapes])


def _gamma(teacher: Teacher, graphdef, params: Params, hydra: HydraConfig, plan: HeadPlan, batches):
    """gamma_n so that each head speaks as loudly to W_O as the teacher's did.

    With u = what the fusion gives at gamma = 1: `calibrated` RMS(O_teacher) / RMS(u) (divisor
    floored at 0.05), `ols` <O_teacher, u> / |u|^2.
    """
    paths = {l: f"layers.{l}.attn.fusion.gamma" for l in range(plan.num_layers)}
    paths = {l: path for l, path in paths.items() if path in params}
    measured = hydra.gamma_init in ("calibrated", "ols")
    if not paths or hydra.gamma_init == "one" or (measured and not batches):
        return {}
    heads = {
        l: plan.layer(l).la if hydra.fusion == "la_only_norm" else range(plan.num_heads)
        for l in paths
    }
    if hydra.gamma_init == "zero_la":
        return {
            path: jnp.asarray(
                [0.0 if n in plan.layer(l).la else 1.0 for n in heads[l]], jnp.float32
            )
            for l, path in paths.items()
        }
    sums_of = jax.jit(
        lambda t, s, rows: _head_power(bind(teacher.graphdef, t), bind(graphdef, s), rows)
    )
    sums = np.zeros((3, plan.num_layers, plan.num_heads))
    for batch in batches:
        sums += np.asarray(
            sums_of(teacher.params, params, {k: jnp.asarray(v) for k, v in batch.items()})
        )
    (target, own, cross), elements = (
        sums[:3],
        sum(int((b["segment_ids"] > 0).sum()) for b in batches),
    )
    own_rms = np.sqrt(own / (elements * teacher.cfg.head_dim))
    target_rms = np.sqrt(target / (elements * teacher.cfg.head_dim))
    if hydra.gamma_init == "ols":
        gamma = cross / np.maximum(own, 1e-12)
    else:
        gamma = target_rms / np.maximum(own_rms, GATE_RMS_FLOOR)
    return {
        path: jnp.asarray(gamma[l, np.array(list(heads[l]), int)], jnp.float32)
        for l, path in paths.items()
    }


def _head_power(teacher: Model, student: Model, rows: dict[str, Array]) -> Array:
    """Sums over tokens and dims of O_teacher^2, u^2 and O_teacher u: [3, L, N]."""
    inputs = {k: rows[k] for k in ("tokens", "segment_ids", "positions")}
    _, taps = teacher.hidden(**inputs, taps=("attn_in", "head_out"))
    seq = student.sequence(
        rows["tokens"].shape, rows["segment_ids"], rows["positions"], training=True
    )
    weights = (rows["segment_ids"] > 0).astype(jnp.float32)
    out = []
    for block, x, target in zip(student.layers, taps.attn_in, taps.head_out, strict=True):
        u = block.attn(x.astype(jnp.float32), seq)[1]
        target = target.astype(jnp.float32)
        pairs = (target * target, u * u, target * u)
        out.append(jnp.stack([jnp.einsum("btnh,bt->n", p, weights) for p in pairs]))
    return jnp.stack(out, axis=1)
