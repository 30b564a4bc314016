"""Tuned numbers of segments: where they come from, what overrides them, what a broken file says."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import GatedDeltaConfig, gated_delta_rule, tune
from pallas_kernels.gated_delta_rule import tuned
from pallas_kernels.gated_delta_rule.mosaic_gpu_segments import MODEL, choose_segments

H100 = "NVIDIA H100 80GB HBM3"
PLACE = 16, 512, 128
NEWEST = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason=f"needs jax >= 0.11, found {jax.__version__}"
)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A file of one entry for H100s, in a folder of its own."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    path = tuned.path_of(H100, tmp_path)
    path.write_text(
        json.dumps({"segments": {tuned.key(*PLACE): {"forward": 3, "backward": 5}}, "measured": {}})
    )
    return path


def on(kind: str):
    device = AbstractDevice(kind, 132, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


def test_the_device_and_the_shape_decide_and_the_caller_before_them(table):
    config = GatedDeltaConfig()
    with on(H100):
        assert [choose_segments(of, config, *PLACE) for of in tuned.PASSES] == [3, 5]
        for place in ((16, 256, 128), (8, 512, 128), (16, 512, 64)):
            want = [MODEL[of](*place) for of in tuned.PASSES]
            assert [choose_segments(of, config, *place) for of in tuned.PASSES] == want
        asked = GatedDeltaConfig(segments=(1, 7))
        assert [choose_segments(of, asked, *PLACE) for of in tuned.PASSES] == [1, 7]
    with on("NVIDIA H200"):
        want = [MODEL[of](*PLACE) for of in tuned.PASSES]
        assert [choose_segments(of, config, *PLACE) for of in tuned.PASSES] == want


def test_segments_are_of_one_length_and_not_more_than_chunks():
    config = GatedDeltaConfig(segments=(5, 100))
    assert choose_segments("forward", config, 1, 6, 128) == 3  # of 2 chunks
    assert choose_segments("backward", config, 1, 6, 128) == 6


@NEWEST
def test_a_traced_call_has_the_tuned_number_of_maps(table):
    x = jax.ShapeDtypeStruct((1, 512 * 64, 16, 128), jnp.bfloat16)
    g = jax.ShapeDtypeStruct(x.shape[:3], jnp.float32)
    with on(H100):
        traced = jax.jit(lambda *x: gated_delta_rule(*x)[0]).trace(x, x, x, g, g)
    assert "f32[3,1,16,128,128]" in str(traced.jaxpr)  # 2 N - 3 maps of 3 segments


@pytest.mark.parametrize("wrong", [(0, 1), (2,), (1, 2, 3), [1, 2], (1.5, 2)])
def test_a_config_names_what_it_expects(wrong):
    with pytest.raises(
        ValueError, match=r"config.segments: expected a tuple of two numbers from 1, got"
    ):
        GatedDeltaConfig(segments=wrong)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "expected a file of pallas_kernels.tune, got JSONDecodeError"),
        ("[]", "expected a file of pallas_kernels.tune, got TypeError"),
        ('{"segments": {"x": {"forward": 2}}, "measured": {}}', "got KeyError"),
        ('{"segments": {"x": {"forward": 0, "backward": 2}}, "measured": {}}', r"numbers .* \[0\]"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: .*{words}"):
        tuned.read(path)


def test_what_is_shipped_can_be_read_and_says_where_it_comes_from():
    for path in tuned.FOLDER.glob("*.json"):
        found = tuned.read(path)
        assert found["segments"].keys() == found["measured"].keys()
        for name, entry in found["segments"].items():
            row = found["measured"][name]
            assert tuned.path_of(row["run"]["device"].partition(" x ")[2], tuned.FOLDER) == path
            for of, n in entry.items():
                times = {int(m): ms for m, ms in row["ms"][of].items()}
                assert n == tune.best(times, row["model"][of])


def test_a_choice_needs_a_gain_and_candidates_hold_the_models():
    assert tune.best({1: 5.0, 2: 4.0, 4: 3.99}, 2) == 2
    assert tune.best({1: 5.0, 2: 4.0, 4: 3.0}, 2) == 4
    assert tune.candidates(16, 512, 128, 8) == [1, 2, 4, 7, 8]
    assert tune.candidates(128, 64, 128, 1) == [1]
    assert tune.candidates(1, 6, 64, 5) == [1, 2, 3, 6]


def test_tuning_refuses_what_is_not_hopper(tmp_path):
    with pytest.raises(SystemExit, match=r"mosaic_gpu: (runs on Hopper|needs jax)"):
        tune.main(["--shapes", "1x512x1", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_tuning_keeps_other_entries_and_writes_each_shape(table, monkeypatch):
    monkeypatch.setattr(tune.hopper, "check_device", lambda kind: None)
    monkeypatch.setattr(tune.hopper, "check_version", lambda: None)
    monkeypatch.setattr(tuned, "path_of", lambda kind, folder: table)
    counts = iter([{"forward": 2, "backward": 2}])

    def measure(dims, repeats, seconds):
        return {"best": next(counts), "model": {}, "ms": {}}

    monkeypatch.setattr(tune, "tune", measure)
    with pytest.raises(StopIteration):  # of the second shape
        tune.main(["--shapes", "1x32768x4,1x65536x4"])
    found = json.loads(table.read_text())
    assert found["segments"][tuned.key(*PLACE)] == {"forward": 3, "backward": 5}
    assert found["segments"][tuned.key(4, 512, 128)] == {"forward": 2, "backward": 2}
    assert found["measured"][tuned.key(4, 512, 128)]["dims"] == [1, 32768, 4, 128]
    with pytest.raises(SystemExit, match="the time was up before"):
        tune.main(["--shapes", "1x32768x4", "--limit", "1"])
