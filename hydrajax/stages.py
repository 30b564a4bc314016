"""The stages as data: what each one trains, what it minimises, whether it needs the teacher.

align    mean_l MSE(y_l, y_l^teacher) on the teacher's own block inputs, all layers at once
distill  KL(teacher || student) + ce_weight CE          extend  CE + kl_weight KL
         with train.teacher_cache the KL is `losses.cached_kl`, and no teacher is there
pretrain CE, to make the small teacher of configs/tiny; no stage of the method
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrajax.config import StageConfig
from hydrajax.losses import (
    alignment,
    branch_stats,
    cached_kl,
    chunked_ce,
    chunked_kl,
    next_tokens,
)
from hydrajax.model import BLOCK_INPUT, REMAT, Model
from hydrajax.typing import Array

Batch = dict[str, Array]
Sums = dict[str, tuple[Array, Array]]  # metric -> (sum, count)


@dataclass(frozen=True)
class Stage:
    """`loss(student, teacher, batch, cfg) -> (sum, count, metrics)`, minimised as sum / count."""

    loss: Callable[[Model, Model | None, Batch, StageConfig], tuple[Array, Array, Sums]]
    trains: Callable[[str, StageConfig], bool]
    needs_teacher: Callable[[StageConfig], bool]


def align(student: Model, teacher: Model, batch: Batch, cfg: StageConfig):
    """Teacher-forced: each hybrid block sees what the teacher's block saw."""
    _, taps = teacher.hidden(**_inputs(batch), taps=("attn_in", "attn_out"))
    taps = jax.lax.stop_gradient(taps)
    weights = (batch["segment_ids"] > 0).astype(jnp.float32)
    seq = student.sequence(
        batch["tokens"].shape, batch["segment_ids"], batch["positions"], training=True
    )
    count, loss, metrics = jnp.sum(weights), 0.0, {}
    for l, block in enumerate(student.layers):

        def attend(x, attn=block.attn):
            branches = attn.branches(checkpoint_name(x, BLOCK_INPUT), seq)
            return attn.mix(x, *branches)[0], branch_stats(branches, weights)

        if cfg.remat != "none":
            attend = jax.checkpoint(attend, policy=REMAT[cfg.remat])
        with jax.named_scope(f"layer_{l}"):
            y, stats = attend(taps.attn_in[l])
            sums = alignment(y, taps.attn_out[l], weights)
        relative = sums["error"] / jnp.maximum(sums["power"], 1e-12)
        # rel_mse divides by the batch's power, so a sum over tokens is restored by the count.
        loss += sums["error"] if cfg.align_loss == "mse" else relative * count
        metrics[f"align/layer_{l:02d}/rel_mse"] = (sums["error"], sums["power"])
        metrics[f"align/layer_{l:02d}/cosine"] = (sums["cosine"], count)
        metrics |= {f"align/layer_{l:02d}/{name}": (total, count) for name, total in stats.items()}
    loss = loss / len(student.layers)
    return loss, count, {"loss": (loss, count)} | metrics


def distill(student: Model, teacher: Model | None, batch: Batch, cfg: StageConfig):
    return _next_token(student, teacher, batch, cfg, ce=cfg.ce_weight, kl=1.0)


def extend(student: Model, teacher: Model | None, batch: Batch, cfg: StageConfig):
    return _next_token(student, teacher, batch, cfg, ce=1.0, kl=cfg.kl_weight)


def pretrain(student: Model, teacher: Model | None, batch: Batch, cfg: StageConfig):
    return _next_token(student, teacher, batch, cfg, ce=1.0, kl=0.0)


def _next_token(student: Model, teacher: Model | None, batch: Batch, cfg: StageConfig, ce, kl):
    """ce CE + kl KL; a term with weight 0 is not computed."""
    targets, weights = next_tokens(batch)
    x, _ = student.hidden(**_inputs(batch), training=True)
    loss, count, metrics = 0.0, jnp.sum(weights), {}
    if kl:
        how = weights, cfg.loss_chunk, cfg.kl_temperature
        if cfg.teacher_cache:
            kept = batch["teacher_ids"], batch["teacher_log_p"], batch["teacher_rest"]
            kl_sum, _ = cached_kl(student, x, kept, *how)
        else:
            xt, _ = teacher.hidden(**_inputs(batch))
            kl_sum, _ = chunked_kl(student, teacher, (x, xt), *how)
        metrics["kl"] = (kl_sum, count)
        loss += kl * kl_sum
    if ce:
        ce_sum, _ = chunked_ce(student, x, targets, weights, cfg.loss_chunk)
        metrics["ce"] = (ce_sum, count)
        loss += ce * ce_sum
    return loss, count, {"loss": (loss, count)} | metrics


def _inputs(batch: Batch) -> dict[str, Array]:
    return {k: batch[k] for k in ("tokens", "segment_ids", "positions")}


def _everything(path: str, cfg: StageConfig) -> bool:
    return True


def _hybrid_blocks(path: str, cfg: StageConfig) -> bool:
    """`la_only` is HALO's align: FA heads and W_O stay the teacher's."""
    if cfg.align_scope == "la_only":
        return ".attn.la." in path or ".attn.fusion." in path
    return ".attn." in path


STAGES: dict[str, Stage] = {
    "pretrain": Stage(pretrain, _everything, lambda cfg: False),
    "align": Stage(align, _hybrid_blocks, lambda cfg: True),
    "distill": Stage(distill, _everything, lambda cfg: not cfg.teacher_cache),
    "extend": Stage(extend, _everything, lambda cfg: cfg.kl_weight > 0 and not cfg.teacher_cache),
}
