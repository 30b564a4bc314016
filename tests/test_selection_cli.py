"""The command, from a teacher folder to heads.json, on a hand-built induction circuit."""

import json
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from induction import CODE, circuit

from hydrajax.checkpoint import CheckpointStore, make_lineage, params_hash, write_config
from hydrajax.config import HydraConfig, RunConfig, SelectConfig
from hydrajax.head_plan import HeadPlan, load_plan, ratios
from hydrajax.model import bind
from hydrajax.selection.__main__ import select
from hydrajax.tokenizer import load_tokenizer, save_tokenizer
from hydrajax.typing import UserError

SELECT = SelectConfig(probes=("recall",), context=64, pairs=8, alloc="global", ratio=1 / 6, rows=8,
                      scorer="patch_recv", general="none", report="scores")  # fmt: skip
CONFIG = """
from configs import common

def get_config(argument=None):
    config = common.base()
    config.select.probes = ("recall",)
    config.select.context = 64
    config.select.alloc = "global"
    config.select.ratio = 1 / 6
    config.select.scorer = "patch_recv"
    config.select.general = "none"
    return config
"""


def save(folder, model, plan, params, hydra=None):
    hydra = hydra or HydraConfig.teacher()
    write_config(folder, model=model, hydra=hydra, plan=plan, lineage=make_lineage([], None))
    save_tokenizer(load_tokenizer("bytes"), folder)
    store = CheckpointStore(folder)
    store.save(0, params=params)
    store.close()
    return str(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    model, plan, _, params = circuit()
    return save(tmp_path_factory.mktemp("teacher"), model, plan, params)


def run(teacher, out, **flags):
    cfg = RunConfig(teacher=teacher, out=str(out), select=replace(SELECT, **flags))
    return json.loads(select(cfg, ["test"]).read_text())


def test_the_circuit_answers():
    _, _, graphdef, params = circuit()
    tokens = jnp.array([load_tokenizer("bytes").encode("a7k3m9|m9k3a")])
    assert chr(int(bind(graphdef, params)(tokens)[0, -1].argmax())) == "7"


def test_command_finds_the_head_that_writes_the_answer(teacher, tmp_path):
    """Through the shell, as a user would."""
    (tmp_path / "select.py").write_text(CONFIG)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "hydrajax.selection", f"--config={tmp_path / 'select.py'}",
               f"--config.teacher={teacher}", f"--config.out={out}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "heads.json").read_text())
    want = np.zeros((2, 3))
    want[1, 2] = 1
    for name in ("scores", "raw_mean", "consistency"):
        assert np.allclose(record[name], want, atol=1e-3), name
    assert np.allclose(record["per_probe"]["recall"], want, atol=1e-3)
    assert load_plan(out / "heads.json").fa == ((), (2,))
    facts = record["provenance"]
    assert facts["pairs"] == {"recall": {"accepted": 8, "wrong": 0, "small_gap": 0}}
    assert facts["tie_share"] == 0 and facts["teacher_hash"] == params_hash(teacher)
    assert facts["command"][:3] == ["python", "-m", "hydrajax.selection"]
    assert facts["commit"] is None or facts["commit"]
    assert (out / "heads.png").read_bytes()[:4] == b"\x89PNG"
    assert not (out / "parts").exists()
    told = json.loads((out / "report.json").read_text())
    shown = (out / "index.html").read_text()
    for name in ("heads", "layers", "knockout", "stability", "agreement"):
        assert f"{name}.png" in shown and (out / f"{name}.png").is_file()
    assert told["gini"] == [None, pytest.approx(2 / 3, abs=1e-3)]  # layer 0 has no score
    assert np.allclose(np.diag(told["similarity"]), 1, atol=1e-5)
    assert told["knockout"]["by_score"] == [1, 0]  # recall ends with the one head that knows
    assert told["stability"]["halves"] == {"spearman": pytest.approx(1), "jaccard": 1}
    names = told["agreement"]["scorers"]
    assert told["agreement"]["jaccard"][names.index("patch_recv")][names.index("retrieval")] == 1
    for words in (
        "1 of 6 heads",
        "0:3",
        "1:2",
        "FA query heads 16.7%",
        "L1H2 1.000",
        "train.py",
        "index.html",
    ):
        assert words in done.stdout


def test_ties_past_the_circuit_are_reported(teacher, tmp_path, capsys):
    record = run(teacher, tmp_path, alloc="global_c", ratio=0.5)
    plan = HeadPlan.from_json(record["plan"])
    assert plan.num_fa == 3 and 2 in plan.fa[1] and plan.fa[0]
    assert record["provenance"]["tie_share"] == pytest.approx(2 / 3)
    assert record["ratios"] == ratios(plan, CODE)
    assert "66.7% of the budget" in capsys.readouterr().out


@pytest.mark.parametrize("scorer", ["random", "fixed", "layerwise"])
def test_controls_need_no_probes(teacher, tmp_path, scorer):
    alloc = "layerwise" if scorer == "layerwise" else "global"
    record = run(teacher, tmp_path, scorer=scorer, alloc=alloc, ratio=0.5, probes=())
    facts = record["provenance"]
    assert facts["scorer"] == scorer and facts["pairs"] == {} and facts["tie_share"] is None
    assert HeadPlan.from_json(record["plan"]).num_fa == 3
    assert (tmp_path / "heads.png").is_file()


def test_a_teacher_that_cannot_answer(tmp_path):
    model, plan, _, params = circuit()
    params["layers.1.attn.w_o"][:] = 0
    deaf = save(tmp_path / "deaf", model, plan, params)
    with pytest.raises(UserError, match=r"recall left 0 of 32 .*32 answered wrongly.*train the"):
        run(deaf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_work(teacher, tmp_path):
    for flags, reason in (
        ({"probes": ()}, "select.probes is empty"),
        ({"probes": ("recal",)}, "'recal' is unknown"),
        ({"context": 4096}, "exceeds the teacher's max_context=64"),
        ({"alloc": "global_c"}, "use a ratio >= 0.25"),
    ):
        with pytest.raises(UserError, match=reason):
            run(teacher, tmp_path, **flags)
    with pytest.raises(UserError, match=r"config\.out is empty"):
        run(teacher, "")
    with pytest.raises(UserError, match="No run in"):
        run(str(tmp_path / "nowhere"), tmp_path)


def test_a_student_is_no_teacher(tmp_path):
    model, _, _, params = circuit()
    student = HeadPlan(((0,), (2,)), 3, 3)
    folder = save(tmp_path / "student", model, student, params)
    with pytest.raises(UserError, match="is a student"):
        run(folder, tmp_path / "out")


def test_command_reports_errors_in_one_line(tmp_path):
    (tmp_path / "select.py").write_text(CONFIG)
    command = [sys.executable, "-m", "hydrajax.selection", f"--config={tmp_path / 'select.py'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: config.teacher is empty; set --config.teacher=FOLDER.\n"
