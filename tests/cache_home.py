"""A tiny teacher, its text and its caches, and what tests of them share."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import tiny_runs
from helpers import assert_close

from hydrajax.checkpoint import CheckpointStore, make_lineage, write_config
from hydrajax.config import HydraConfig, MeshConfig, ModelConfig, RunConfig
from hydrajax.data.pipeline import make_pipeline
from hydrajax.data.taught import Taught
from hydrajax.data.top_k import Cache
from hydrajax.head_plan import HeadPlan
from hydrajax.model import bind, init_params, load_model
from hydrajax.start import read_teacher
from hydrajax.teacher_cache import make, open_cache
from hydrajax.tokenizer import load_tokenizer

MODEL = ModelConfig(
    vocab_size=259, width=16, mlp_width=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4
)
FULL, PLAN = HeadPlan.all_full(1, 4, 2), HeadPlan(((0, 3),), 4, 2)
TOKENIZER = load_tokenizer("bytes")
STUDENT = SimpleNamespace(model=MODEL, hydra=tiny_runs.HYDRA, plan=PLAN)
TEACHER = SimpleNamespace(model=MODEL, hydra=HydraConfig.teacher(), plan=FULL)
SEQ_LEN, ROWS, STEPS = 32, 4, 6


def write_teacher(folder, seed: int):
    _, params = init_params(MODEL, HydraConfig.teacher(), FULL, seed)
    rng = np.random.default_rng(seed)  # far from uniform, so that best words differ
    params = {path: np.asarray(p) + rng.normal(0, 0.3, p.shape).astype("f4")
              for path, p in params.items()}  # fmt: skip
    write_config(folder, model=MODEL, hydra=HydraConfig.teacher(), plan=FULL,
                 lineage=make_lineage(["test"], None))  # fmt: skip
    store = CheckpointStore(folder)
    store.save(0, params=params)
    store.close()
    return str(folder)


def config(home, folder: str = "cache", **changes) -> RunConfig:
    """A distillation on sample text and recall prompts; changes are of train or data."""
    cfg = tiny_runs.run_config("distill", steps=STEPS, teacher_cache=str(home / folder))
    data = replace(cfg.data, rows=ROWS, seq_len=SEQ_LEN, files=(str(home / "text.txt"),),
                   synthetic="recall", synthetic_share=0.25, holdout=0.2)  # fmt: skip
    mesh = MeshConfig(1, 2, 2, 2) if jax.device_count() == 8 else MeshConfig()  # a GPU of its own
    cfg = replace(cfg, teacher=str(home / "teacher"), tokenizer="bytes", data=data, mesh=mesh)
    for name, value in changes.items():
        section = "data" if hasattr(data, name) else "train"
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def config_without_cache(cfg: RunConfig) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, teacher_cache=""))


def opened(cfg: RunConfig, vocab_size: int = MODEL.vocab_size) -> Cache:
    return open_cache(cfg, make_pipeline(cfg.data, TOKENIZER).identity, vocab_size)


def taught(cfg: RunConfig, cache: Cache) -> Taught:
    return Taught(make_pipeline(cfg.data, TOKENIZER), cache, cfg.train.kl_temperature)


def make_home(folder):
    """A teacher, text, a cache of 8 words ("cache") and one of all words ("whole")."""
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(20, 90), np.uint8)) for _ in range(40)]
    (folder / "text.txt").write_bytes(b"\x1e".join(words))
    write_teacher(folder / "teacher", seed=1)
    make(config(folder), ["test"], 8, (2.0,))
    make(config(folder, "whole"), ["test"], MODEL.vocab_size)
    return folder


@functools.cache
def teachers_logits(home):
    graphdef, params = load_model(read_teacher(config(home)), dtype=jnp.float32)
    params = jax.tree.map(jnp.asarray, params)
    return jax.jit(lambda tokens, **ids: bind(graphdef, params)(tokens, **ids))


def log_p_of(home, batch) -> np.ndarray:
    inputs = {k: batch[k] for k in ("tokens", "segment_ids", "positions")}
    logits = np.asarray(teachers_logits(home)(**inputs)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check_words(home, batch, cache: Cache, temperature: float) -> None:
    """Against the teacher's own logits, in float64."""
    log_p = log_p_of(home, batch)
    k = cache.header.top_k
    want = -np.sort(-log_p, axis=-1)
    assert_close("log p", want[..., :k], batch["teacher_log_p"], 1e-5)
    found = np.take_along_axis(log_p, batch["teacher_ids"].astype(int), axis=-1)
    assert_close("log p of ids", want[..., :k], found, 1e-5)
    rest = np.log(np.exp(want[..., k:] / temperature).sum(-1))
    assert_close("rest", rest, batch["teacher_rest"], 1e-5)
