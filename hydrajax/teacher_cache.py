"""Compute a teacher's best words for every row of a run once, and distil from them many times.

    python -m hydrajax.teacher_cache --config=configs/smollm2_135m/distill.py \
        --config.train.teacher_cache=caches/smollm2_135m [--top_k=64] [--temperatures=1,2]

Walks over the rows that `train.py` with the same flags would see, held-out ones first, and writes
what `losses.cached_kl` reads. Run the same command again to go on after a cut, or with more
train.steps to make the cache longer. One process, all devices of its host, placed by config.mesh.
"""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from hydrajax.checkpoint import Run, files_hash, hash_params, make_lineage, params_hash
from hydrajax.command import run_command
from hydrajax.config import RunConfig, to_plain
from hydrajax.data.pipeline import HOLDOUT_ROWS, Batch, Pipeline, loss_rows, make_pipeline
from hydrajax.data.top_k import Cache, Header, Writer, row_key
from hydrajax.layout import Design, fill, place_teacher
from hydrajax.losses import best_words
from hydrajax.model import bind
from hydrajax.run_folder import read_config
from hydrajax.sharding import check_batch, make_mesh, place_batch
from hydrajax.start import check_expected, read_teacher, teacher_folder
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError

TOP_K = 64
TALK_S = 10.0  # between lines about the progress
# What changes neither the tokens of a row nor their order: batches are cut from one stream.
FREE = ("data.rows", "data.workers", "data.answer_only", "split")


def open_cache(cfg: RunConfig, data: dict[str, Any], vocab_size: int) -> Cache:
    """The cache that config.train.teacher_cache names; UserError unless it is of this run.

    `data` is the identity of the run's pipeline. The teacher's weights are read only where its
    folder is not the very one that the cache was made from.
    """
    cache, folder = Cache(cfg.train.teacher_cache), teacher_folder(cfg)
    header = cache.header
    same = files_hash(folder) == cache.made_by["teacher_files"]
    weights = header.identity["teacher (hash)"] if same else params_hash(folder)
    header.refuse_unless(cache.path, identity(cfg, data, read_config(folder), weights))
    if vocab_size != header.vocab_size:
        raise UserError(
            f"{cache.path} is of {header.vocab_size} words, the student has {vocab_size}."
        )
    if cfg.train.kl_temperature not in header.temperatures:
        raise UserError(
            f"{cache.path} serves train.kl_temperature in {header.temperatures}, got "
            f"{cfg.train.kl_temperature}; make another with --temperatures."
        )
    rows, got = rows_of(cfg), cache.rows("train")
    if got < rows:
        raise UserError(
            f"{cache.path} has too few rows: expected train.steps={cfg.train.steps} x data.rows="
            f"{cfg.data.rows} = {rows}, got {got}. Run python -m hydrajax.teacher_cache with this "
            "config: it goes on where it stopped."
        )
    return cache


def identity(cfg: RunConfig, data: dict[str, Any], teacher: Design, weights: str) -> dict[str, Any]:
    """All that decides the rows, their order and what the teacher says of them."""
    design = {k: to_plain(getattr(teacher, k)) for k in ("model", "hydra")}
    text = json.dumps(design | {"plan": teacher.plan.to_json()}, sort_keys=True)
    return {k: v for k, v in data.items() if k not in FREE} | {
        "teacher (hash)": weights,
        "teacher's config (hash)": hashlib.sha256(text.encode()).hexdigest(),
        "train.compute_dtype": cfg.train.compute_dtype,
    }


def rows_of(cfg: RunConfig) -> int:
    """Rows that a run reads from beginning to end."""
    return cfg.train.steps * cfg.data.rows


def make(
    cfg: RunConfig,
    command: list[str],
    top_k: int = TOP_K,
    temperatures: tuple[float, ...] = (),
) -> Path:
    """Write the cache that config.train.teacher_cache names, or what it lacks; returns its path."""
    if not cfg.train.teacher_cache:
        raise UserError("train.teacher_cache is empty; name the folder to write.")
    if jax.process_count() > 1:
        raise UserError("A teacher cache is made in one process; start it on one host.")
    mesh, micro = make_mesh(cfg.mesh), cfg.data.rows // cfg.train.accum
    check_batch(mesh, cfg.data.rows, cfg.data.seq_len, cfg.train.accum)
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.teacher)
    pipeline = make_pipeline(replace(cfg.data, rows=micro), tokenizer)
    run = read_teacher(cfg)
    check_expected(cfg.model, run.info.model, cfg.teacher)
    header = _header(cfg, pipeline.identity, run, top_k, temperatures)
    with Writer(cfg.train.teacher_cache, header, _made_by(cfg, command)) as writer:
        _tell(writer, rows_of(cfg))
        ask = _program(cfg, mesh, run, header)
        del run  # its copy on the host
        with jax.set_mesh(mesh):
            there = Cache(writer.path)
            held = loss_rows(cfg, tokenizer, multiple=mesh.shape["data"] * mesh.shape["fsdp"])
            _write(writer, "holdout", _lacking(held, there), ask)
            left = _left(pipeline, there, rows_of(cfg), micro)
            _write(writer, "train", left, ask, total=rows_of(cfg))
    pipeline.close()
    return writer.path


def _header(
    cfg: RunConfig, data: dict[str, Any], run: Run, top_k: int, temperatures: tuple[float, ...]
) -> Header:
    """What the cache will hold; UserError if the command asks for what cannot be."""
    vocab_size = run.info.model.vocab_size
    if not 1 <= top_k <= vocab_size:
        raise UserError(f"--top_k must lie in [1, {vocab_size}], the vocabulary, got {top_k}.")
    served = tuple(sorted({*temperatures, cfg.train.kl_temperature}))
    if served[0] <= 0:
        raise UserError(f"temperatures must be positive, got {served[0]}.")
    facts = identity(cfg, data, run.info, hash_params(run.params))
    return Header(facts, top_k, vocab_size, served)


def _made_by(cfg: RunConfig, command: list[str]) -> dict[str, Any]:
    made_by = make_lineage(command, None) | {"teacher": cfg.teacher}
    made_by["teacher_files"] = files_hash(cfg.teacher)
    del made_by["parent"], made_by["parent_hash"]  # the teacher, under its own name
    return made_by


def _program(cfg: RunConfig, mesh: Mesh, run: Run, header: Header) -> Callable[[Batch], tuple]:
    """The teacher on the devices: rows -> `losses.best_words`."""
    placed = place_teacher(cfg, mesh, run.info)
    params = fill(placed, run)

    @jax.jit
    def words(params, batch):
        teacher = bind(placed.graphdef, params)
        x, _ = teacher.hidden(**{k: batch[k] for k in ("tokens", "segment_ids", "positions")})
        return best_words(teacher, x, header.top_k, header.temperatures, cfg.train.loss_chunk)

    return lambda batch: words(params, place_batch(mesh, batch))


def _tell(writer: Writer, rows: int) -> None:
    """Say what was lost and what the cache will take; UserError if the disk has less."""
    for shard in writer.lost:
        print(
            f"{writer.path / shard.name} is missing or cut: {shard.split} rows {shard.first:,} to "
            f"{shard.first + shard.rows - 1:,} have to be computed again, the other files stay",
            flush=True,
        )
    header, size = writer.header, writer.header.record.itemsize
    whole = (rows + HOLDOUT_ROWS) * size
    done = (writer.rows("train", rows) + writer.rows("holdout")) * size
    free = shutil.disk_usage(writer.path).free
    print(
        f"{writer.path}: {rows:,} rows and {HOLDOUT_ROWS} held out, of "
        f"{header.identity['data.seq_len']} tokens, {header.top_k} of {header.vocab_size:,} words "
        f"each: {_bytes(whole)}, of which {_bytes(done)} are there ({_bytes(free)} free)",
        flush=True,
    )
    if whole - done > free:
        raise UserError(
            f"{writer.path}: {_bytes(whole - done)} are needed, {_bytes(free)} are free; take a "
            "smaller --top_k, fewer train.steps or another disk."
        )


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _lacking(held: list[Batch], cache: Cache) -> Iterator[tuple[Batch, np.ndarray]]:
    """Held-out batches with rows that a cache lacks, and which; rows of padding are none."""
    known = {key for _, key in cache.keys("holdout")}
    for batch in held:
        lacks = np.array([row_key(batch, i) not in known for i in range(len(batch["tokens"]))])
        lacks &= batch["segment_ids"].any(axis=1)
        if lacks.any():
            yield batch, lacks


def _left(
    pipeline: Pipeline, cache: Cache, rows: int, micro: int
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches up to `rows` that a cache lacks, and which of their rows; those it has must agree."""
    keys = cache.keys("train")
    row, key = next(keys, (None, None))
    for first in range(0, rows, micro):
        batch, lacks = next(pipeline), np.ones(micro, bool)
        for i in range(micro):
            if first + i != row:
                continue
            if row_key(batch, i) != key:
                raise UserError(
                    f"{cache.path}: row {first + i} was of other tokens when it was written, "
                    "although its config is the same. Remove the folder and start again."
                )
            lacks[i] = False
            row, key = next(keys, (None, None))
        if lacks.any():
            yield batch, lacks


def _write(writer: Writer, split: str, batches: Iterator, ask, total: int = 0) -> None:
    """The rows that are wanted of each batch; the device is at the next one meanwhile."""
    before, began, told = writer.rows(split, total), time.monotonic(), time.monotonic()
    done, asked = before, None
    for batch, wanted in batches:
        asked, ready = (batch, wanted, ask(batch)), asked
        done += _add(writer, split, ready)
        if total and time.monotonic() - told > TALK_S:
            told = time.monotonic()
            rate = (done - before) / (told - began)
            print(f"{split} {done:,} of {total:,} rows, {rate:,.1f} rows/s", flush=True)
    _add(writer, split, asked)
    writer.flush(split)


def _add(writer: Writer, split: str, ready: tuple | None) -> int:
    if ready is None:
        return 0
    batch, wanted, words = ready
    words = tuple(a[wanted] for a in jax.device_get(words))
    writer.add(split, {k: v[wanted] for k, v in batch.items()}, words)
    return int(wanted.sum())


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise UserError(f"leftover arguments {argv[1:]}; options are --config.train.steps=100.")
    cfg = RunConfig.from_dict(flags.FLAGS.config)
    try:
        temperatures = tuple(float(t) for t in flags.FLAGS.temperatures)
    except ValueError as e:
        raise UserError(f"--temperatures must be numbers such as 1,2: {e}.") from e
    command = ["python", "-m", "hydrajax.teacher_cache", *sys.argv[1:]]
    path = make(cfg, command, flags.FLAGS.top_k, temperatures)
    print(f"wrote {path}\nnext: train.py with the same config and flags, "
          f"--config.train.teacher_cache={path}")  # fmt: skip


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.mark_flag_as_required("config")
    flags.DEFINE_integer("top_k", TOP_K, "words to keep of each token")
    flags.DEFINE_list("temperatures", [], "of the KL, beside train.kl_temperature")
    run_command(main)
