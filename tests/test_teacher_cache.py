"""Teacher caches: what they hold is what the teacher says, and nothing else is accepted."""

import functools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from helpers import assert_close

from hydrajax.checkpoint import CheckpointStore, make_lineage, write_config
from hydrajax.config import HydraConfig, MeshConfig, ModelConfig, RunConfig
from hydrajax.data import top_k
from hydrajax.data.pipeline import loss_rows, make_pipeline
from hydrajax.data.taught import Taught, taught_rows
from hydrajax.data.top_k import Cache, Writer
from hydrajax.head_plan import HeadPlan
from hydrajax.layout import lay_out
from hydrajax.model import bind, init_params, load_model
from hydrajax.rehearse import memory
from hydrajax.sharding import make_mesh
from hydrajax.start import read_teacher
from hydrajax.teacher_cache import make, open_cache, rows_of
from hydrajax.tokenizer import load_tokenizer
from hydrajax.trainer import make_train_step, means
from hydrajax.typing import UserError

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
    cfg = replace(cfg, teacher=str(home / "teacher"), tokenizer="bytes", data=data,
                  mesh=MeshConfig(1, 2, 2, 2))  # fmt: skip
    for name, value in changes.items():
        section = "data" if hasattr(data, name) else "train"
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})})
    return cfg


def opened(cfg: RunConfig, vocab_size: int = MODEL.vocab_size) -> Cache:
    return open_cache(cfg, make_pipeline(cfg.data, TOKENIZER).identity, vocab_size)


def taught(cfg: RunConfig, cache: Cache) -> Taught:
    return Taught(make_pipeline(cfg.data, TOKENIZER), cache, cfg.train.kl_temperature)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher, text, a cache of 8 words ("cache") and one of all words ("whole")."""
    folder = tmp_path_factory.mktemp("home")
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


def test_a_student_taught_by_all_cached_words_walks_the_curve_of_the_teachers_own(home):
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


@pytest.mark.parametrize("last", [1, 3, 6])
def test_a_cut_command_leaves_nothing_that_is_accepted_and_goes_on(home, last, monkeypatch):
    """Cut after so many files; then one is lost; in the end all is as if nothing had happened."""
    folder = f"cut{last}"
    cfg = config(home, folder)
    with monkeypatch.context() as patch:
        patch.setattr(top_k, "SHARD_BYTES", 1)
        write, written = top_k.write_atomic, []

        def cut(path, data):
            if path.suffix == ".npy":
                if len(written) == last:
                    path.with_name(f".{path.name}.x").write_bytes(data[: len(data) // 2])
                    raise KeyboardInterrupt
                written.append(path)
            write(path, data)

        patch.setattr(top_k, "write_atomic", cut)
        with pytest.raises(KeyboardInterrupt):
            make(cfg, ["test"], 8, (2.0,))
        with pytest.raises(UserError, match=f"too few rows: expected .* = {rows_of(cfg)}, got"):
            opened(cfg)
        written[-1].write_bytes(written[-1].read_bytes()[:-1])
        with pytest.raises(UserError, match=f"{written[-1].name} has .* bytes, expected"):
            opened(cfg)
        patch.setattr(top_k, "write_atomic", write)
        make(cfg, ["test"], 8, (2.0,))
    found = opened(cfg)
    assert len(found.shards) > 2
    assert {p.name for p in found.path.iterdir()} == {
        ".lock", "manifest.json", *(shard.name for shard in found.shards)
    }  # fmt: skip
    for split in ("train", "holdout"):
        assert sorted(found.keys(split)) == sorted(opened(config(home)).keys(split))
    both = taught(cfg, found), taught(cfg, opened(config(home)))
    for _ in range(STEPS):
        pair = [next(pipeline) for pipeline in both]
        for name, want in pair[1].items():
            np.testing.assert_array_equal(pair[0][name], want, err_msg=name)


@pytest.mark.parametrize("rows", [4, 8])
def test_a_file_that_is_lost_is_made_again_alone(home, rows, monkeypatch, capsys):
    """Of both splits, in the middle; the second command is cut between the two."""
    cfg = config(home, f"lost{rows}")
    lost = ["holdout-000000000.npy", "train-000000004.npy", "train-000000012.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(top_k, "SHARD_BYTES", 1)
        make(cfg, ["test"], 8, (2.0,))
    folder = opened(cfg).path
    assert len(opened(cfg).shards) > 6
    for name in lost:
        (folder / name).unlink()
    others = {p: p.stat().st_mtime_ns for p in folder.glob("*.npy")}
    capsys.readouterr()
    again = config(home, f"lost{rows}", rows=rows, steps=STEPS * ROWS // rows)

    def cut(path, data):
        if path.name == lost[2]:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        write = top_k.write_atomic
        patch.setattr(top_k, "write_atomic", cut)
        with pytest.raises(KeyboardInterrupt):
            make(again, ["test"], 8, (2.0,))
    said = capsys.readouterr().out
    assert "train-000000004.npy is missing or cut: train rows 4 to 7 have to be computed" in said
    assert all(f"{name} is missing or cut" in said for name in lost)
    assert said.index(lost[0]) < said.index("of which")
    with pytest.raises(UserError, match=r"too few rows: expected .* = 24, got 12"):
        opened(cfg)
    make(again, ["test"], 8, (2.0,))
    assert others == {p: p.stat().st_mtime_ns for p in others}
    found, want = opened(cfg), opened(config(home))
    assert {p.name for p in folder.glob("*.npy")} - {p.name for p in others} == set(lost)
    for split in ("train", "holdout"):
        assert list(found.keys(split)) == list(want.keys(split))
    both = taught(cfg, found), taught(cfg, want)
    for _ in range(STEPS):
        pair = [next(pipeline) for pipeline in both]
        for name, values in pair[1].items():
            np.testing.assert_array_equal(pair[0][name], values, err_msg=name)
    held = [taught_rows(cache, loss_rows(cfg, TOKENIZER), 1.0) for cache in (found, want)]
    jax.tree.map(np.testing.assert_array_equal, *held)


def test_one_command_at_a_time_writes_a_cache(home):
    cfg = config(home, "held")
    make(cfg, ["test"], 8)
    before = {p: p.read_bytes() for p in (home / "held").iterdir()}
    header, under_way = opened(cfg).header, home / "held/.train-000000000.npy.x"
    with Writer(home / "held", header, {}):
        under_way.write_bytes(b"of the first command")
        with pytest.raises(UserError, match=r"written by another command, which holds .*\.lock"):
            make(cfg, ["test"], 8)
        assert under_way.is_file()
    with Writer(home / "new", header, {}):  # also where nothing is there yet
        (home / "new/manifest.json").unlink()
        with pytest.raises(UserError, match="written by another command"):
            make(config(home, "new"), ["test"], 8)
    make(cfg, ["test"], 8)
    del before[home / "held/manifest.json"]  # says who went on with it
    assert before == {p: p.read_bytes() for p in before}


def test_a_longer_run_makes_a_cache_longer(home):
    cfg = config(home, "longer", steps=1, rows=6)
    make(cfg, ["test"], 8)
    before = (home / "longer/train-000000000.npy").read_bytes()
    longer = config(home, "longer", steps=3, rows=4)  # another batch size: rows 6 and 7 are new
    make(longer, ["test"], 8)
    assert (home / "longer/train-000000000.npy").read_bytes() == before
    assert [s.first for s in opened(longer).shards if s.split == "train"] == [0, 6]
    for batch in (next(p) for p in [taught(longer, opened(longer))] for _ in range(3)):
        check_words(home, batch, opened(longer), 1.0)
    with pytest.raises(UserError, match="was begun with top_k=8, expected 9"):
        make(longer, ["test"], 9)
    with pytest.raises(UserError, match=r"data\.seed: expected 1, got 0"):
        make(replace(longer, data=replace(longer.data, seed=1)), ["test"], 8)


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


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda cfg: make(cfg, [], 300), r"--top_k must lie in \[1, 259\].* got 300"),
        (lambda cfg: make(cfg, [], 8, (-1.0,)), "temperatures must be positive, got -1.0"),
        (lambda cfg: make(config_without_cache(cfg), []), "teacher_cache is empty"),
        (lambda cfg: make(foreign(cfg), []), "holds other files"),
        (
            lambda cfg: make(expecting(cfg, num_layers=2), [], 8),
            "teacher is not of config.model: num_layers: expected 2, got 1",
        ),
        (lambda cfg: make(replace(cfg, train=replace(cfg.train, steps=10**12)), [], 8), "are free"),
    ],
    ids=["top_k", "temperatures", "empty", "foreign", "model", "disk"],
)
def test_the_command_refuses_by_name(home, call, message):
    with pytest.raises(UserError, match=message):
        call(config(home, "refused"))
    assert not list((home / "teacher").glob(".*"))


def expecting(cfg: RunConfig, **facts) -> RunConfig:
    return replace(cfg, model=replace(MODEL, **facts))


def config_without_cache(cfg: RunConfig) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, teacher_cache=""))


def foreign(cfg: RunConfig) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, teacher_cache=cfg.teacher))
