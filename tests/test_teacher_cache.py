"""Teacher caches: what they hold is what the teacher says, and nothing else is accepted."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_runs
from cache_home import (
    MODEL,
    PLAN,
    ROWS,
    STEPS,
    STUDENT,
    TEACHER,
    TOKENIZER,
    check_words,
    config,
    config_without_cache,
    make_home,
    opened,
    taught,
    write_teacher,
)

from hydrajax.data.pipeline import loss_rows, make_pipeline
from hydrajax.data.taught import Taught, taught_rows
from hydrajax.layout import lay_out
from hydrajax.rehearse import memory
from hydrajax.sharding import make_mesh
from hydrajax.start import read_teacher
from hydrajax.teacher_cache import rows_of
from hydrajax.trainer import make_train_step, means
from hydrajax.typing import UserError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_holds_what_the_teacher_says(home, temperature):
    cfg = config(home, kl_temperature=temperature)
    cache = opened(cfg)
    assert cache.rows("train") == rows_of(cfg) == STEPS * ROWS
    pipeline, plain = taught(cfg, cache), make_pipeline(cfg.data, TOKENIZER)
    for _ in range(STEPS):
        batch = next(pipeline)
        for name, want in next(plain).items():
            np.testing.assert_array_equal(batch[name], want)
        check_words(home, batch, cache, temperature)
    with pytest.raises(UserError, match="holds 24 train rows, not row 24"):
        next(pipeline)


def test_held_out_rows_are_there_and_padding_says_nothing(home):
    cfg = config(home)
    cache = opened(cfg)
    held = loss_rows(cfg, TOKENIZER, multiple=3)  # not what the cache was made with
    found = taught_rows(cache, held, 1.0)
    rows = np.concatenate([b["segment_ids"].any(axis=1) for b in found])
    assert cache.rows("holdout") == rows.sum() < len(rows)
    for batch in found:
        there = batch["segment_ids"].any(axis=1)
        check_words(home, {k: v[there] for k, v in batch.items()}, cache, 1.0)
        for name in ("teacher_ids", "teacher_log_p", "teacher_rest"):
            assert not batch[name][~there].any()


def test_batches_of_any_size_and_any_share_get_the_words_of_their_rows(home):
    """Rows are numbered along the stream, which knows neither batches nor processes."""
    cfg = config(home)
    cache = opened(cfg)
    want = [next(p) for p in [taught(cfg, cache)] for _ in range(4)]
    wide = taught(
        replace(cfg, data=replace(cfg.data, rows=8)), opened(config(home, rows=8, steps=3))
    )
    shares = [
        Taught(make_pipeline(cfg.data, TOKENIZER, process_index=i, process_count=2), cache, 1.0,
               process_index=i, process_count=2)
        for i in range(2)
    ]  # fmt: skip
    eight = next(wide)
    for name, rows in eight.items():
        np.testing.assert_array_equal(np.concatenate([b[name] for b in want[:2]]), rows)
    for batch in want:
        parts = [next(share) for share in shares]
        for name, rows in batch.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), rows)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_resumed_run_reads_on_where_it_stopped(home, at):
    cfg = config(home)
    first = taught(cfg, opened(cfg))
    for _ in range(at):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = taught(cfg, opened(cfg))
    again.set_state(state)
    for _ in range(at, STEPS):
        for (name, want), got in zip(next(first).items(), next(again).values(), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)
    assert again.get_state() == first.get_state()


def test_a_run_does_not_go_on_with_another_cache(home):
    """The folder is the same, what it holds is not: remade by another command."""
    cfg, other = config(home), config(home, "whole")
    pipeline = taught(cfg, opened(cfg))
    next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    now = taught(other, opened(other))
    with pytest.raises(UserError, match=r"whole is not the .*: top_k: expected 8, got 259\. Make"):
        now.set_state(state)
    cache = opened(cfg)
    of_it = cache.header.identity
    for name, message in [
        ("teacher (hash)", r"teacher \(hash\): expected '\w+', got 'x'; identity"),
        ("teacher's config (hash)", r": identity \(hash\): expected '\w+', got '\w+'\."),
    ]:
        cache.header = replace(cache.header, identity=of_it | {name: "x"})
        with pytest.raises(UserError, match=message):
            taught(cfg, cache).set_state(state)
    del state["teacher_cache"]  # as runs wrote it that did not say
    again = taught(cfg, opened(cfg))
    again.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(again), next(pipeline))


def check_curves(home):
    """All words of the teacher teach what it teaches itself."""
    cached = config(home, "whole", ce_weight=0.1)
    plain = config_without_cache(cached)
    curves = []
    for cfg in (plain, cached):
        made, state = tiny_runs.programs(cfg, MODEL, PLAN)
        layout = lay_out(cfg, make_mesh(cfg.mesh), STUDENT, lambda: TEACHER)
        assert (layout.teacher is None) == bool(cfg.train.teacher_cache)
        made = replace(made, teacher=layout.programs.teacher)
        params = {} if layout.teacher is None else read_teacher(cfg).params
        rows = make_pipeline(cfg.data, TOKENIZER)
        rows = Taught(rows, opened(cfg), 1.0) if cfg.train.teacher_cache else rows
        step, curve = jax.jit(make_train_step(made)), []
        for _ in range(STEPS):
            state, metrics = step(state, params, next(rows))
            curve.append(means([metrics])["kl"])
        curves.append(curve)
    np.testing.assert_allclose(*curves, rtol=1e-4)
    assert np.ptp(curves[0]) > 0.01 * curves[0][0]


def test_a_student_taught_by_all_cached_words_walks_the_curve_of_the_teachers_own(home):
    check_curves(home)


@pytest.mark.gpu
def test_on_a_gpu_too(tmp_path):
    with jax.default_matmul_precision("highest"):
        check_curves(make_home(tmp_path))


def test_a_step_is_laid_out_without_a_teacher_and_with_its_words(home):
    """On every mesh axis that splits rows or tokens; a rehearsal counts the words' bytes."""
    cfg = config(home, accum=2)
    mesh = make_mesh(cfg.mesh)
    with pytest.raises(AssertionError, match="asked for"):
        lay_out(config_without_cache(cfg), mesh, STUDENT, no_teacher)
    layout = lay_out(cfg, mesh, STUDENT, no_teacher)
    batch = next(taught(cfg, opened(cfg)))
    want = {name: (a.shape, a.dtype) for name, a in batch.items()}
    assert {name: (a.shape, a.dtype) for name, a in layout.batch().items()} == want
    count = memory.count(layout)
    assert count.teacher == 0
    assert count.rows == sum(a.nbytes for a in batch.values()) / 4  # data x fsdp x context
    with jax.set_mesh(mesh):
        state, _ = jax.eval_shape(
            make_train_step(layout.programs), layout.state(), {}, layout.batch()
        )
    assert state.params.keys() == layout.student.params.keys()


def no_teacher():
    raise AssertionError("the teacher is asked for")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(seed=7), "data.seed: expected 7, got 0"),
        (dict(seq_len=64), "data.seq_len: expected 64, got 32"),
        (dict(packing="best_fit"), "data.packing: expected 'best_fit', got 'split'"),
        (dict(synthetic_share=0.5), "data.synthetic_share: expected 0.5, got 0.25"),
        (dict(files=("sample",)), r"data.files \(hash\): expected '"),
        (dict(compute_dtype="bfloat16"), "train.compute_dtype: expected 'bfloat16', got 'float32'"),
        (dict(kl_temperature=3.0), r"serves train.kl_temperature in \(1.0, 2.0\), got 3.0"),
        (dict(steps=7), "too few rows: expected train.steps=7 x data.rows=4 = 28, got 24"),
        (dict(rows=8), "too few rows: expected train.steps=6 x data.rows=8 = 48, got 24"),
        (dict(teacher_cache="nowhere"), "nowhere is not a teacher cache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_cache_of_something_else_is_refused_by_name(home, changes, message):
    with pytest.raises(UserError, match=message):
        opened(config(home, **changes))


def test_what_changes_no_row_is_accepted(home):
    opened(config(home, steps=3, rows=8, workers=2, answer_only=True, accum=4, kl_temperature=2.0))


def test_another_vocabulary_is_refused(home):
    with pytest.raises(UserError, match="is of 259 words, the student has 300"):
        opened(config(home), vocab_size=300)


def test_another_teacher_is_refused_and_a_copy_of_the_same_is_not(home, tmp_path):
    cfg = config(home)
    again = write_teacher(tmp_path / "again", seed=1)
    opened(replace(cfg, teacher=again))  # written anew: other files, the same weights
    other = write_teacher(tmp_path / "other", seed=2)
    with pytest.raises(UserError, match=r"teacher \(hash\): expected '\w+', got '"):
        opened(replace(cfg, teacher=other))
    body = json.loads((tmp_path / "again/config.json").read_text())
    body["model"]["rope"]["theta"] *= 2
    (tmp_path / "again/config.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"teacher's config \(hash\): expected"):
        opened(replace(cfg, teacher=again))
    with pytest.raises(UserError, match="stage distill needs config"):
        opened(replace(cfg, teacher=""))


def test_the_teachers_weights_are_not_read(home, tmp_path):
    """Any byte of them may be wrong: nobody looks."""
    folder = tmp_path / "teacher"
    shutil.copytree(home / "teacher", folder)
    for path in (folder / "checkpoints/0/params").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    cfg = replace(config(home), teacher=str(folder))
    with pytest.raises(UserError, match="No checkpoint"):
        read_teacher(cfg)
    opened(cfg)


@pytest.mark.parametrize("stage", ["pretrain", "align", "extend"])
def test_a_stage_without_a_kl_refuses_a_cache(stage):
    with pytest.raises(UserError, match=f"teacher_cache serves a KL.*stage={stage}"):
        tiny_runs.run_config(stage, teacher_cache="x")
    assert tiny_runs.run_config("extend", teacher_cache="x", kl_weight=0.1).train.teacher_cache


def test_a_damaged_row_is_named_when_it_is_read(home, tmp_path):
    shutil.copytree(home / "cache", tmp_path / "cache")
    file = tmp_path / "cache/train-000000000.npy"
    body = bytearray(file.read_bytes())
    body[-1] ^= 1  # the last row's
    file.write_bytes(body)
    cfg = config(home)
    cfg = replace(cfg, train=replace(cfg.train, teacher_cache=str(tmp_path / "cache")))
    pipeline = taught(cfg, opened(cfg))
    for _ in range(STEPS - 1):
        next(pipeline)
    with pytest.raises(UserError, match=r"train-000000000\.npy: row 23 is damaged"):
        next(pipeline)


def test_rows_of_other_tokens_are_refused_though_all_names_agree(home):
    """A library that shuffles otherwise, say: the hash of each row's tokens tells."""
    cfg = config(home)
    other = make_pipeline(replace(cfg.data, seed=5), TOKENIZER)
    with pytest.raises(UserError, match="train row 0 has other tokens"):
        next(Taught(other, opened(cfg), 1.0))
    held = loss_rows(replace(cfg, data=replace(cfg.data, seed=5)), TOKENIZER)
    with pytest.raises(UserError, match="lacks a held-out row"):
        taught_rows(opened(cfg), held, 1.0)
