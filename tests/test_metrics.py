"""Rates leave out what is not training, FLOPs follow the shapes, records survive kills."""

import json
import sys

import pytest

from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.flops import count, mfu, peak_flops, train_flops_per_token
from hydrajax.head_plan import HeadPlan
from hydrajax.metrics import Chrono, MetricWriter, format_line, sparkline
from hydrajax.model import abstract_model, split_params

MODEL = ModelConfig(vocab_size=96, width=32, mlp_width=64, num_layers=3, num_heads=4,
                    num_kv_heads=2, head_dim=16, tied_embeddings=False)  # fmt: skip
FULL = HeadPlan.all_full(3, 4, 2)
PLAN = HeadPlan(((0, 1, 3), (2,), ()), 4, 2)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_chrono_leaves_out_the_first_step_and_pauses():
    clock = Clock()
    chrono = Chrono(clock)
    clock.now += 100  # compiles
    chrono.tick(50)
    assert chrono.rates()["tokens_per_s"] == 0
    for _ in range(4):
        with chrono.waiting():
            clock.now += 0.5
        clock.now += 1.5
        chrono.tick(50)
        with chrono.paused():
            clock.now += 7
    assert chrono.rates() == {"tokens_per_s": 25, "step_s": 2, "data_wait": 0.25}
    clock.now += 1
    chrono.tick(50)
    assert chrono.rates() == {"tokens_per_s": 50, "step_s": 1, "data_wait": 0}


@pytest.mark.parametrize(("plan", "hydra"), [(FULL, HydraConfig.teacher()), (PLAN, HydraConfig())])
def test_counts_are_those_of_the_model(plan, hydra):
    _, params = split_params(abstract_model(MODEL, hydra, plan, dtype="float32"))
    counts = count(MODEL, plan, gated=plan != FULL)

    def weights(*ends):
        return sum(p.size for path, p in params.items() if path.endswith(ends))

    assert counts.inputs == weights("w_q", "w_k", "w_v", "w_z", "w_a", "w_b")
    assert counts.outputs == weights("attn.w_o")
    assert counts.mlps == weights("w_gate", "w_up", "w_down")
    assert counts.unembed == weights("unembed.w")
    assert (counts.fa_heads, counts.la_heads) == (plan.num_fa, 12 - plan.num_fa)


def test_flops_of_the_stages():
    weights = count(MODEL, FULL, gated=False).weights
    dense = train_flops_per_token(MODEL, FULL, 512, "pretrain")
    assert dense == 6 * weights + 12 * 512 * 16 * 12 / 2  # 12 T H a head, causal half
    forward = (6 * weights + 6 * 512 * 16 * 12) / 3
    student = train_flops_per_token(MODEL, PLAN, 512, "extend")
    assert train_flops_per_token(MODEL, PLAN, 512, "distill") == pytest.approx(student + forward)
    assert train_flops_per_token(MODEL, PLAN, 512, "distill", cached=True) == student
    hybrid = count(MODEL, PLAN, gated=True)
    # Align has no MLPs and no logits, and no gradient with respect to the block inputs.
    saved = 2 * hybrid.inputs + 6 * hybrid.mlps + 8 * hybrid.unembed
    aligned = train_flops_per_token(MODEL, PLAN, 512, "align")
    assert aligned == pytest.approx(student + forward - saved)
    # An LA head costs the same at any length: the published 163,840 and 393,216 at H = 128.
    one = ModelConfig(vocab_size=1, width=1, mlp_width=1, num_layers=1, num_heads=1,
                      num_kv_heads=1, head_dim=128)  # fmt: skip
    wide = count(one, HeadPlan(((),), 1, 1), gated=True)
    for length in (64, 4096):
        assert wide.mixing(length, backward=False) == 163_840
        assert wide.mixing(length, backward=True) == 393_216


def test_peaks_and_mfu():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5p") == 459e12
    assert peak_flops("TPU v5") == 459e12 and peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("cpu") is None and mfu(1e5, 1e9, "cpu") is None
    assert mfu(1e5, 1e9, "TPU v4") == pytest.approx(1e14 / 275e12)


def test_console_line():
    values = {"train/loss": 1.8342, "train/kl": 1.424, "train/ce": 0.41, "train/grad_norm": 0.83,
              "train/lr": 2.9e-4, "perf/tokens_per_s": 48_231.0, "perf/step_s": 1.0,
              "perf/mfu": 0.412, "train/nonfinite": 0.0}  # fmt: skip
    assert format_line("distill", 1200, 20_000, values) == (
        "distill  1200/20000  6.0%  loss 1.834 (kl 1.42 ce 0.41)  |g| 0.83  lr 2.9e-04  "
        "48.2k tok/s  MFU 41%  ETA 5h13"
    )
    assert format_line("align", 5, 10, {"train/loss": 2.0, "train/nonfinite": 2.0}) == (
        "align  5/10  50.0%  loss 2  NOT FINITE in 2 steps"
    )
    assert format_line("align", 10, 10, {"eval/loss": 0.5}) == "align  10/10  100.0%  eval loss 0.5"


def test_sparkline():
    assert sparkline([0, 1, 4, 8], 8) == "·▁▄█"


def writer(folder, start_step=0, **kwargs):
    return MetricWriter(folder, start_step=start_step, total_steps=10, stage="align", **kwargs)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_appends_no_duplicates(tmp_path):
    first = writer(tmp_path)
    for step in range(1, 7):
        first.log(step, {"train/loss": float(step)})
    first.log(4, {"eval/loss": 1.0})
    first.close()
    second = writer(tmp_path, start_step=4)
    second.log(4, {"eval/loss": 1.0})  # asked for again after the restart
    second.log(5, {"train/loss": 5.5})
    second.log(5, {"eval/loss": 0.9})
    second.close()
    got = [(r["step"], *sorted(set(r) - {"step"})) for r in records(tmp_path)]
    assert got == [*((s, "train/loss") for s in range(1, 5)), (4, "eval/loss"),
                   (5, "train/loss"), (5, "eval/loss")]  # fmt: skip
    assert records(tmp_path)[-2]["train/loss"] == 5.5


def test_a_line_cut_by_a_kill_is_repaired(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    resumed = writer(tmp_path, start_step=2)
    resumed.log(3, {"a": float("nan"), "b": 3.0})
    resumed.close()
    assert records(tmp_path) == [{"step": 1, "a": 1}, {"step": 3, "a": None, "b": 3.0}]


@pytest.mark.parametrize("broken", ["missing", "raises"])
def test_a_broken_tensorboard_stops_nothing(tmp_path, monkeypatch, caplog, broken):
    class Raises:
        class SummaryWriter:
            def __init__(self, *args, **kwargs):
                pass

            def add_scalar(self, *args):
                raise RuntimeError("disk on fire")

    monkeypatch.setitem(sys.modules, "tensorboardX", Raises if broken == "raises" else None)
    metrics = writer(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        metrics.log(step, {"train/loss": 1.0})
    metrics.close()
    assert len(records(tmp_path)) == 3
    assert len(caplog.records) == 1  # one warning, not one a step
    assert ("pip install tensorboardX" if broken == "missing" else "on fire") in caplog.text


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboardX")
    metrics = writer(tmp_path, tensorboard=True)
    metrics.log(1, {"train/loss": 1.0})
    metrics.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_an_unwritable_record_stops_nothing(tmp_path, caplog, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    metrics = writer(tmp_path)
    metrics.log(1, {"train/loss": 1.0})
    metrics.close()
    assert "without a writer" in caplog.text and "loss 1" in capsys.readouterr().out
