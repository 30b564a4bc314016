"""The road's runner: commands of a variant, resumption of a chain, what a shared GPU counts."""

import json
import sys

import pytest

from experiments import curves
from experiments.jobs import Job, run_chains
from experiments.road import COMMANDS, Variant, chain, gpu_seconds, main


def commands(variant: Variant, names=COMMANDS, **options) -> dict[str, str]:
    options = {"with_teacher": True} | options
    return {job.name: str(job) for job in chain("tiny", variant, names, **options)}


def test_a_name_alone_is_an_arm_of_the_family():
    lines = commands(Variant.parse("random", ""))
    assert list(lines) == list(COMMANDS)
    assert "configs/tiny/select.py:arm=random" in lines["select"]
    assert "configs/tiny/distill.py:arm=random" in lines["distill"]
    assert "--config.eval.runs=('random=runs/tiny/random/extend',)" in lines["eval"]
    assert "--config.teacher=" not in lines["eval"]


def test_a_variant_changes_the_commands_that_it_names_and_no_others():
    text = "fast: preset=safe distill.optim.peak_lr=1e-3 select.select.general=none"
    variant = Variant.parse(text, "distill.train.steps=5")
    lines = commands(variant, ("select", "align", "distill", "eval"), with_teacher=False)
    assert "select.py:arm=causal,preset=safe" in lines["select"]
    assert lines["select"].endswith(
        "--config.out=runs/tiny/fast/select --config.select.general=none"
    )
    assert lines["align"].endswith("align.py:arm=fast,preset=safe")
    assert lines["distill"].endswith("--config.train.steps=5 --config.optim.peak_lr=1e-3")
    assert "fast=runs/tiny/fast/distill" in lines["eval"] and "--config.teacher=" in lines["eval"]


@pytest.mark.parametrize("wrong", ["distil.train.steps=5", "distill=5", "fast"])
def test_an_unknown_key_is_named(wrong):
    with pytest.raises(SystemExit, match=f"'{wrong}': expected"):
        Variant.parse(f"a: {wrong}", "")


@pytest.mark.parametrize(
    "commands, words",
    [("select,distil,eval", "unknown ['distil']"), ("select,eval", "one of"), ("align", "eval")],
)
def test_commands_that_lead_nowhere_are_refused(commands, words, monkeypatch, capsys, tmp_path):
    arguments = ["road", "causal", f"--commands={commands}", f"--results={tmp_path / 'x.json'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert words in capsys.readouterr().err


def test_a_failed_chain_names_its_log_and_goes_on_where_it_stopped(tmp_path):
    mark, gate = tmp_path / "mark", tmp_path / "gate"
    first = Job("first", (sys.executable, "-c", f"open({str(mark)!r}, 'a').write('x')"))
    second = Job("second", (sys.executable, "-c", f"open({str(gate)!r})"))
    with pytest.raises(
        RuntimeError, match=r"a: second ended with exit code 1, see .*a_second\.log"
    ):
        run_chains({"a": [first, second]}, (), tmp_path / "logs")
    gate.touch()
    done = run_chains({"a": [first, second]}, (), tmp_path / "logs")
    assert [d.name for d in done] == ["first", "second"] and mark.read_text() == "x"
    assert len((tmp_path / "logs/jobs.jsonl").read_text().splitlines()) == 2


def test_chains_on_one_gpu_share_its_time():
    ran = [("0", "a", 5.0), ("0", "a", 4.0), ("0", "b", 7.0), ("1", "c", 2.0), ("", "d", 9.0)]
    rows = [{"what": "command", "gpu": g, "arm": a, "seconds": s} for g, a, s in ran]
    assert gpu_seconds([*rows, {"what": "eval"}]) == 11.0


def curve(folder, losses, rates):
    folder.mkdir()
    lines = [
        {"step": 10 * (i + 1), "train/loss": loss, "perf/tokens_per_s": rate}
        for i, (loss, rate) in enumerate(zip(losses, rates, strict=True))
    ]
    lines.append({"step": 10 * len(losses), "eval/loss": losses[-1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return curves.row(folder.name, "train", 1.0, folder)


def test_curves_are_told_apart_and_timed_without_the_first_interval(tmp_path):
    base = curve(tmp_path / "xla", [2.0, 1.0], [1.0, 100.0])
    same = curve(tmp_path / "again", [2.0, 1.0], [1.0, 100.0])
    other = curve(tmp_path / "fast", [2.0, 1.1], [1.0, 250.0])
    found = curves.summary([other, base, same])
    assert found["fast_max_rel_diff"] == pytest.approx(0.1)
    assert found["fast_rms_rel_diff"] == pytest.approx(0.1 / 2**0.5)
    assert found["again_max_rel_diff"] == 0
    assert found["fast_speedup"] == 2.5 and base["eval/loss"] == 1.0
    assert not any(name.startswith("xla_max") for name in found)


def test_curves_of_other_steps_are_refused(tmp_path):
    long = curve(tmp_path / "long", [2.0, 1.0], [1.0, 1.0])
    short = curve(tmp_path / "short", [2.0], [1.0])
    with pytest.raises(ValueError, match="other steps"):
        curves.summary([long, short, short])
    lost = curve(tmp_path / "lost", [2.0, float("nan")], [1.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        curves.summary([lost, long, long])


def test_a_curve_is_a_command_of_train(tmp_path):
    line = str(curves.job("a: hydra.chunk=128", ["--config=x.py"], tmp_path))
    assert line.endswith(
        f"train.py --config=x.py --config.hydra.chunk=128 --config.out={tmp_path}/a"
    )
    with pytest.raises(SystemExit, match="expected 'name: key=value"):
        curves.job("a: chunk", [], tmp_path)
    with pytest.raises(SystemExit, match=r"got 'xla kernels\.gated_delta_rule=xla'"):
        curves.job("xla kernels.gated_delta_rule=xla", [], tmp_path)
