"""Statistics, fusion and knock-out by their definitions; the measuring command on a circuit."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from induction import RELAY, WRITER, circuit
from test_selection_cli import SELECT, save
from test_selection_scorers import CFG, DATA, keep_probes

from hydrajax.config import MeshConfig, RunConfig
from hydrajax.model import bind
from hydrajax.selection import knockout, measure
from hydrajax.selection.__main__ import select
from hydrajax.selection.fusion import PairEffects, fuse, minmax, rank
from hydrajax.selection.scorers import Context
from hydrajax.selection.statistics import gini, spearman, top_jaccard
from hydrajax.tokenizer import load_tokenizer
from hydrajax.typing import UserError


@pytest.fixture(scope="module")
def context():
    shape, _, graphdef, params = circuit(relay=True)
    model = bind(graphdef, jax.tree.map(jnp.asarray, params))
    return Context(CFG, shape, DATA, lambda: model, lambda: load_tokenizer("bytes"), log=len)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model, plan, _, params = circuit(relay=True)
    return save(tmp_path_factory.mktemp("teacher"), model, plan, params)


def test_gini():
    assert gini(np.ones(7)) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 1.0])) == pytest.approx(3 / 4)
    x = np.random.default_rng(0).exponential(size=50)
    by_pairs = np.abs(x[:, None] - x).sum() / (2 * len(x) ** 2 * x.mean())
    assert gini(x) == pytest.approx(by_pairs)
    assert np.isnan(gini(np.zeros(3)))


def test_spearman_and_jaccard():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 5, size=(4, 6)).astype(float)  # with ties
    ranks = lambda x: np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x.ravel()])  # noqa: E731
    b = a + rng.normal(size=a.shape)
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
    assert spearman(a, a) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert np.isnan(spearman(a, np.zeros_like(a)))
    assert top_jaccard(np.array([3, 2, 1, 0]), np.array([0, 3, 2, 1]), 2) == pytest.approx(1 / 3)


def test_fusion():
    score = np.array([[0.0, 0.0, 1.0], [2.0, 50.0, 0.0]])
    assert np.allclose(rank(score), np.array([[0, 0, 3], [4, 5, 0]]) / 5)
    assert np.allclose(minmax(score), score / 50) and not minmax(np.ones((2, 2))).any()
    other = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.allclose(fuse([score, other], "minmax"), (score / 50 + other) / 2)
    # One structural head leaves min-max nothing for the others; ranks keep them apart.
    assert fuse([score], "minmax")[1, 0] < 0.05 < fuse([score], "rank")[1, 0]


def test_scores_of_pairs_follow_the_definition(tmp_path):
    """Two probes, two kinds of effect, three heads."""
    direct = np.array([[[0.4, 0.0, -1.0]], [[0.2, 0.0, -1.0]], [[0.0, 0.0, 3.0]]])
    sent = np.array([[[0.0, 0.1, 0.0]], [[0.0, 0.3, 0.0]], [[0.0, 0.2, 0.0]]])
    effects = PairEffects({"receivers": direct, "senders_1": sent}, np.array([0, 0, 1]))
    assert np.allclose(effects.raw_mean(), [[0.15, 0.2, 1.0]])
    assert np.allclose(effects.consistency(0.01), [[0.5, 1.0, 0.5]])
    assert np.allclose(effects.score(0.01), [[0.075, 0.2, 0.5]])
    assert np.allclose(effects.take(np.array([0, 1])).score(0.01), [[0.3, 0.2, 0.0]])
    (tmp_path / "effects.npz").write_bytes(effects.to_bytes())
    again = PairEffects.load(tmp_path / "effects.npz")
    assert np.array_equal(again.score(0.01), effects.score(0.01))


def test_area_under_a_curve():
    counts = np.array([0, 1, 4])
    assert knockout.area(counts, np.ones(3)) == pytest.approx(1)
    assert knockout.area(counts, np.array([1, 0, 0])) == pytest.approx(1 / 8)
    assert knockout.points(270, 0.25)[[0, 1, -1]].tolist() == [0, 1, 67]


def test_knockout_of_the_circuit(context):
    """Recall ends with the first head of the true order, and at random with the share of it."""
    score = np.zeros((2, 3))
    score[WRITER], score[RELAY] = 1.0, 0.5
    made = keep_probes(replace(context, cfg=replace(CFG, ratio=0.5)), context)
    curve = knockout.measure(made, score, per_probe=4)
    assert curve.counts.tolist() == [0, 1, 2, 3] and curve.right.shape == (21, 4, 4)
    assert curve.right[0].mean(-1).tolist() == [1, 0, 0, 0]
    assert (curve.right[:, 0] == 1).all()
    low, high = curve.band()
    assert curve.auc[0] == low < curve.auc[1:].mean() < high  # half of the heads are critical
    keep = knockout.masks(knockout.orders(score, 0), curve.counts, score.shape)
    assert (~keep[0, 1]).sum() == 1 and not keep[0, 1][WRITER]
    needed = keep[:, :, 0, 0] & keep[:, :, 0, 1] & keep[:, :, 1, 2]
    assert np.array_equal(curve.right.mean(-1) > 0.5, needed)


def test_depth_matched_orders_ablate_the_same_layers():
    score = np.random.default_rng(0).uniform(size=(4, 6))
    found = knockout.orders(score, 0, matched=True)
    layers = found // 6
    assert all(sorted(order) == list(range(24)) for order in found)
    assert (layers[knockout.MATCHED] == layers[0]).all() and len(found[knockout.MATCHED]) == 20
    assert not (layers[knockout.RANDOM] == layers[0]).all(1).any()
    assert len(np.unique(found[knockout.MATCHED], axis=0)) == 20
    assert np.array_equal(knockout.orders(score, 0), found[:21])


def test_scores_do_not_depend_on_the_mesh(teacher, tmp_path):
    cfg = replace(SELECT, general="ppl", text_rows=8, text_tokens=32)
    found = []
    for mesh in (MeshConfig(data=8), MeshConfig(data=2, fsdp=2, model=2)):
        out = tmp_path / str(mesh.data)
        run = RunConfig(teacher=teacher, out=str(out), mesh=mesh, select=cfg, data=DATA)
        found.append(json.loads(select(run, ["test"]).read_text()))
    for name in ("scores", "raw_mean"):
        assert_close(name, found[0][name], found[1][name], 1e-4)
    assert found[0]["plan"] == found[1]["plan"]


def test_the_measuring_command(teacher, tmp_path, monkeypatch):
    select_cfg = replace(SELECT, scorer="patch", alloc="global_c", ratio=0.5, sender_rounds=1)
    cfg = RunConfig(teacher=teacher, out=str(tmp_path / "out"), select=select_cfg, data=DATA)
    result = measure.Result.open(tmp_path / "figures.json", ["test"], cfg)
    subject = measure.Subject(cfg)
    measure.measure_selection(subject, result)
    measure.measure_shortcut(subject, result)
    measure.measure_knockout(subject, result)
    shape = replace(
        measure.QWEN3_1P7B, vocab_size=32, width=16, mlp_width=16, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8,
    )  # fmt: skip
    small = replace(select_cfg, sender_rounds=0, context=24, rows=2)
    measure.measure_shapes(shape, small, result, "qwen3_1p7b")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [row["part"] for row in written["rows"]] == [
        "selection", "shortcut", "knockout", "shapes"
    ]  # fmt: skip
    got = written["summary"]
    assert set(got) == {
        "selection_seconds", "gini_mean", "share_above_0_01", "spearman_6_pairs",
        "top20_jaccard_6_pairs", "receiver_speedup", "shortcut_max_rel_diff",
        "knockout_auc_causal", "knockout_auc_random_low", "knockout_auc_matched_low",
        "qwen3_1p7b_selection_seconds",
    }  # fmt: skip
    assert got["share_above_0_01"] == pytest.approx(2 / 6)
    assert got["shortcut_max_rel_diff"] < 1e-4
    assert got["knockout_auc_causal"] <= got["knockout_auc_random_low"]
    again = measure.Result.open(tmp_path / "figures.json", ["test"], cfg)
    assert again.summary == got
    monkeypatch.setitem(again.meta, "device", "another")
    again.add("selection", {})
    with pytest.raises(UserError, match="was measured on another; name a new file"):
        measure.Result.open(tmp_path / "figures.json", ["test"], cfg)
