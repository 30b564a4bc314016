"""A teacher, its student and one train step, small enough to compile in seconds."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from hydrajax.config import (
    DataConfig,
    HydraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
)
from hydrajax.head_plan import HeadPlan
from hydrajax.model import abstract_model, split_params
from hydrajax.optim import make_optimizer, schedule
from hydrajax.trainer import Programs, TrainState, make_train_step

CFG = ModelConfig(
    vocab_size=32, width=16, mlp_width=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4
)
PLAN = HeadPlan(((0, 3),), 4, 2)
CFG2, PLAN2 = replace(CFG, num_layers=2), HeadPlan(((0, 3), (1,)), 4, 2)
HYDRA = HydraConfig(chunk=16)


def draw(hydra: HydraConfig, plan: HeadPlan, cfg: ModelConfig = CFG, seed: int = 0, **kwargs):
    """Graph and random parameters, none of them at its initial value."""
    model = abstract_model(cfg, hydra, plan, dtype=jnp.float32, **kwargs)
    graphdef, shapes = split_params(model)
    rng = np.random.default_rng(seed)
    value = lambda a: 0.2 * rng.standard_normal(a.shape) + (a.ndim == 1)  # noqa: E731
    return graphdef, {path: jnp.asarray(value(a), jnp.float32) for path, a in shapes.items()}


@functools.cache
def teacher(cfg: ModelConfig = CFG):
    full = HeadPlan.all_full(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    return draw(HydraConfig.teacher(), full, cfg, seed=1)


def run_config(stage: str, optim: dict | None = None, **train) -> RunConfig:
    rates = dict(peak_lr=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1)
    return RunConfig(
        stage=stage,
        train=StageConfig(**dict(remat="none", compute_dtype="float32", steps=10) | train),
        optim=OptimConfig(**rates | (optim or {})),
        data=DataConfig(rows=4, seq_len=16),
        model=CFG if stage == "pretrain" else None,
    )


def programs(
    cfg: RunConfig, model: ModelConfig = CFG, plan: HeadPlan = PLAN, hydra: HydraConfig = HYDRA
) -> tuple[Programs, TrainState]:
    """Programs of a run and its first state."""
    graphdef, params = draw(hydra, plan, model)
    tx, rate = make_optimizer(cfg.optim, cfg.train.steps), schedule(cfg.optim, cfg.train.steps)
    made = Programs(graphdef, teacher(model)[0], cfg, tx, rate)
    return made, TrainState(
        jnp.zeros((), jnp.int32), params, jax.jit(tx.init)(made.trainable(params))
    )


@functools.cache
def compiled(cfg: RunConfig, model: ModelConfig = CFG, plan: HeadPlan = PLAN):
    """(programs, first state, compiled train step), shared by the tests: compiling is the cost."""
    made, state = programs(cfg, model, plan)
    return made, state, jax.jit(make_train_step(made))


def batch(rows: int = 4, length: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    """Rows of one or two documents with padding at the end."""
    rng = np.random.default_rng(seed)
    ids = {k: np.zeros((rows, length), np.int32) for k in ("segment_ids", "positions")}
    for row in range(rows):
        ends = [length // 2 - row % 3, length - row % 4] if row % 2 else [length - row % 4]
        for segment, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            ids["segment_ids"][row, a:b], ids["positions"][row, a:b] = segment, np.arange(b - a)
    tokens = rng.integers(0, CFG.vocab_size, (rows, length), dtype=np.int32)
    mask = np.ones((rows, length), np.float32)
    return {k: jnp.asarray(v) for k, v in {"tokens": tokens, "loss_mask": mask, **ids}.items()}
