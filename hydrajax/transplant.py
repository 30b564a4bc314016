"""Teacher parameters + head plan → student parameters, and a report of where each came from.

Everything outside attention, W_O, the queries and the used KV heads are copied; K and V of LA
heads are cloned from KV head n // G; decay, write strength, gates and gamma are initialised as
HydraConfig says (`fla`; `taylor` after Taylor-Calibrate, 2606.16429; `blend` after Priming,
2605.08301). What needs data is measured by `calibration`.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrajax.calibration import inverse_softplus, loudness, recurrence, scaled_heads
from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.head_plan import HeadPlan, LayerPlan
from hydrajax.model import Model, bind, init_params
from hydrajax.typing import Params, UserError

SILU_ONE = 1.2784645  # silu(1.2784645) = 1
NEAR_ONE_STD = 1e-4


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

    def model(self) -> Model:
        return bind(self.graphdef, self.params)


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
        params |= recurrence(teacher.model(), hydra, plan, batches[0])
    params |= _gamma(teacher, bind(graphdef, params), batches)
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


def _gamma(teacher: Teacher, student: Model, batches: list[dict[str, np.ndarray]]) -> Params:
    """The fusion's gamma as `hydra.gamma_init` says; `one` is what it was made with."""
    rule, heads = student.hydra.gamma_init, scaled_heads(student)
    if rule == "zero_la":
        la = {l: student.plan.layer(l).la for l in heads}
        return {
            f"layers.{l}.attn.fusion.gamma": jnp.asarray([float(n not in la[l]) for n in own])
            for l, own in heads.items()
        }
    if rule == "one" or not heads or not batches:
        return {}
    return loudness(teacher.model(), student, batches, rule)
