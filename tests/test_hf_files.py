"""Weight files and target folders."""

import json
import os
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hydrajax.hf.files import open_weights
from hydrajax.hf.target import Output, new_folder, write_weights
from hydrajax.typing import UserError
from tests.hf_folder import DTYPES, TINY, save, tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard_bytes", [10**9, 5000], ids=["whole", "sharded"])
def test_weights_survive_writing_and_reading(tmp_path, dtype, shard_bytes):
    weights = tensors(TINY, dtype)
    files = save(tmp_path, weights, shard_bytes)
    entries = open_weights(tmp_path, allow_pickle=False)
    assert (len(files) > 1) == (shard_bytes == 5000)
    assert entries.keys() == weights.keys()
    for name, want in weights.items():
        got = entries[name].read()
        assert (entries[name].dtype, entries[name].shape) == (dtype, want.shape)
        np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))
    assert all((tmp_path / f).stat().st_mode & 0o777 == 0o644 for f in files)
    assert all((tmp_path / f).stat().st_size <= 5000 + 12_500 for f in files if shard_bytes == 5000)


def test_file_equals_the_librarys(tmp_path):
    weights = {**tensors(TINY, "float32"), **{f"half.{i}": np.ones((2, i), np.float16)
                                             for i in range(4)}}  # fmt: skip
    save(tmp_path, weights)
    save_file(weights, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert load_file(tmp_path / "model.safetensors")["half.0"].shape == (2, 0)


def test_index_names_every_tensor(tmp_path):
    save(tmp_path, tensors(TINY), 5000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(TINY).keys()
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors(TINY).values())


def test_one_tensor_is_made_at_a_time(tmp_path):
    alive = []

    def make(i):
        assert not alive, "the last tensor is still held"
        array = np.full(4, i, np.float32)
        alive.append(1)
        weakref.finalize(array, alive.clear)
        return array

    write_weights(tmp_path, [Output(f"t{i}", (4,), np.dtype(np.float32), lambda i=i: make(i))
                             for i in range(3)])  # fmt: skip


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_folder(target, overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["config.json"]
    assert target.stat().st_mode & 0o777 == 0o755
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "b", overwrite=False):
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_overwrite_is_asked_for_and_careful(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("x")
    for overwrite, message in ((False, "exists already"), (True, r"no config\.json")):
        with pytest.raises(UserError, match=message), new_folder(target, overwrite=overwrite):
            pytest.fail("entered")
    (target / "config.json").write_text("old")
    with pytest.raises(KeyError), new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise KeyError
    assert (target / "config.json").read_text() == "old"
    with new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["config.json"]


def test_old_folder_returns_when_the_last_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename, calls = os.rename, []

    def failing(source, destination, **kwargs):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(source, destination, **kwargs)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match="No space left"), new_folder(target, overwrite=True):
        pass
    assert (target / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
