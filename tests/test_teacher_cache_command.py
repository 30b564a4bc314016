"""The command that makes a teacher cache: cut, gone on with, refused, one at a time."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from cache_home import (
    MODEL,
    ROWS,
    STEPS,
    TOKENIZER,
    check_words,
    config,
    config_without_cache,
    make_home,
    opened,
    taught,
)

from hydrajax.config import RunConfig
from hydrajax.data import top_k
from hydrajax.data.pipeline import loss_rows
from hydrajax.data.taught import taught_rows
from hydrajax.data.top_k import Writer
from hydrajax.teacher_cache import make, rows_of
from hydrajax.typing import UserError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


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


def test_a_command_killed_in_its_first_commit_is_repeated(home):
    (home / "first").mkdir()
    cut = home / "first/.manifest.json.x1y2"
    cut.write_bytes(b"{")
    make(config(home, "first"), ["test"], 8)
    assert opened(config(home, "first")).rows("train") == rows_of(config(home))
    assert not cut.exists()


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


def foreign(cfg: RunConfig) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, teacher_cache=cfg.teacher))
