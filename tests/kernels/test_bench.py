"""The measuring command on a CPU: rows, summary, its arithmetic, failures that do not end it."""

import json
import re

import pytest

from pallas_kernels import bench, timing
from pallas_kernels.attention import bench as attention
from pallas_kernels.gated_delta_rule import bench as gated_delta_rule
from pallas_kernels.gated_delta_rule import peers, workload

ONE = (1, 1, 1, 128)  # a token of a head
TINY = "--op gated_delta_rule --shapes 1x64x1 --dim 8 --repeats 2 --twin 64 --decode 1"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "deep" / "gdn.json"
    words = f"{TINY} --seconds 0 --out {out} --implementations xla,mosaic_gpu,fla"
    returned = bench.main(words.split())
    assert json.loads(out.read_text()) == json.loads(json.dumps(returned))
    return returned


def rows(report, **of):
    return [r for r in report["rows"] if all(r.get(k) == v for k, v in of.items())]


def test_times_errors_and_memory(report):
    timed = rows(report, what="time", implementation="xla")
    assert [r["gates"] for r in timed] == ["strong", "slow"]
    for row in timed:
        assert row["fwd_ms"] > 0 and row["fwdbwd_ms"] > 0 and "error" not in row
        assert len(row["fwd_ms_all"]) == 2 and row["memory"]["fwdbwd"]["temp_bytes"] > 0
    found = rows(report, what="error", implementation="xla")
    assert [r["inputs"] for r in found] == list(workload.INPUTS)
    for row in found:
        assert row["errors"].keys() == {"o", "dq", "dk", "dv", "dg", "dbeta"}
        assert 0 < max(row["errors"].values()) < 0.05
    steps = rows(report, what="decode")
    assert {r["implementation"] for r in steps} >= {"xla", "reference"}
    assert all(r["share_of_copy"] > 0 for r in steps if r["implementation"] in ("xla", "reference"))


def test_what_cannot_run_says_why(report):
    for row in rows(report, what="time", implementation="mosaic_gpu"):
        assert row["error"].keys() == {"fwd", "fwd_residuals", "fwdbwd"} and "fwd_ms" not in row
        assert all("NotImplementedError: mosaic_gpu: " in error for error in row["error"].values())
    for row in rows(report, what="time", implementation="fla"):
        assert "no CUDA device" in row["error"] or "No module named" in row["error"]
    assert {"command", "commit", "versions", "device", "date", "seeds"} <= report["meta"].keys()


def test_a_peer_that_fails_does_not_end_the_run():
    def broken():
        raise RuntimeError("illegal memory access " + "x" * 1000)

    times, errors = timing.interleaved(
        {"good": timing.Program(lambda: 0), "bad": timing.Program(broken)}, 3, 0.0
    )
    assert times.keys() == {"good"} and len(times["good"]["ms_all"]) == 3
    assert errors["bad"].startswith("RuntimeError: ... ") and len(errors["bad"]) < 600


def test_nothing_is_begun_when_the_time_is_up():
    options = gated_delta_rule.Options(
        shapes=((1, 64, 1),), dim=8, decode=1, implementations=("xla",)
    )
    found = list(gated_delta_rule.rows(options, timing.Clock(0.0)))
    assert [r["error"] for r in found if r["what"] == "time"] == ["not run: the time was up"]


def test_flops_and_bytes_are_those_of_the_design():
    """Per token and head at 128 dims: the products of the chunk form, tensors, X and states."""
    assert workload.flops("fwd", ONE) == 163_840
    assert workload.flops("fwdbwd", ONE) == 163_840 + 393_216
    assert workload.traffic("fwd", ONE) == 1032
    assert workload.traffic("fwd_residuals", ONE) == 2072
    assert workload.traffic("fwdbwd", ONE) == 2072 + 2448


def test_kernels_do_the_work_of_the_whole_and_one_product_twice():
    C, d = workload.CHUNK, 128
    work, moved = (sum(part[n] for part in workload.parts(ONE).values()) for n in (0, 1))
    assert work == workload.flops("fwdbwd", ONE) + 2 * C * d  # P, once more in the sweep
    assert moved > workload.traffic("fwdbwd", ONE)


def test_a_breakdown_names_our_kernels_alone():
    options = gated_delta_rule.Options(implementations=("xla",))
    run = gated_delta_rule._Run(options, timing.Clock(1), 1e9, {}, {})
    kernels = {"gdn_sweep_kernel": 2.0, "gdn_sweep_2": 1.0, "wrapped_slice": 1.0}
    found = gated_delta_rule._breakdown(run, ONE, kernels)
    floor = workload.parts(ONE)["gdn_sweep"][1] / 1e6  # no rate of products is known here
    want = {"ms": 3.0, "floor_ms": round(floor, 5), "share": round(floor / 3, 4)}
    assert found == {"gdn_sweep": want}


def test_summary_takes_the_slower_gate():
    def row(name, gates, fwd, both):
        times = {"fwd_ms": fwd, "fwd_residuals_ms": fwd, "fwdbwd_ms": both}
        shares = {f"{w}_floor_share": 0.5 for w in ("fwd", "fwd_residuals", "fwdbwd")}
        base = {"what": "time", "shape": "s1_2_3", "implementation": name, "gates": gates}
        return base | times | shares

    found = gated_delta_rule.summary(
        [
            row("mosaic_gpu", "strong", 1.0, 4.0),
            row("mosaic_gpu", "slow", 2.0, 4.0),
            row("fla", "strong", 3.0, 2.0),
            row("fla", "slow", 3.0, 4.0),
            row("xla", "strong", 10.0, 30.0),
            {
                "what": "error",
                "implementation": "mosaic_gpu",
                "inputs": "slow",
                "errors": {"o": 0.1},
            },
            {"what": "decode", "implementation": "xla", "share_of_copy": 0.4},
        ]
    )
    assert found["fwd_ms_s1_2_3"] == 2.0 and found["fwd_vs_fla_s1_2_3"] == 0.667
    assert found["fwdbwd_vs_fla_s1_2_3"] == 2.0 and found["speedup_vs_xla_s1_2_3"] == 7.5
    assert found["max_rel_err"] == 0.1 and found["decode_step_xla_bandwidth_share"] == 0.4


@pytest.mark.parametrize(
    "words, message",
    [
        ("--implementations xla,tilelang", r"got \['tilelang'\]"),
        ("--shapes 8x4096", "expected BxTxR"),
    ],
)
def test_wrong_words_are_refused(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(f"--op gated_delta_rule --out {tmp_path / 'x.json'} {words}".split())
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_every_peer_says_why_it_cannot_run():
    for name in peers.PEERS:
        with pytest.raises(ImportError):
            peers.load(name)


@pytest.mark.torch
def test_a_peer_is_given_the_same_numbers_and_asked_for_the_same_gradients():
    """A token loop in torch, in the place of a peer, is as exact as bf16 outputs are."""
    torch = pytest.importorskip("torch")

    def token_loop(q, k, v, g, beta):
        dtype, (q, k, v) = v.dtype, (x.double() for x in (q, k, v))
        state, o = torch.zeros((*q.shape[:1], *q.shape[2:], v.shape[-1])).double(), []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            left = v[:, t] - torch.einsum("brh,brhe->bre", k[:, t], state)
            state = state + torch.einsum("brh,bre->brhe", k[:, t], beta[:, t, :, None] * left)
            o.append(torch.einsum("brh,brhe->bre", q[:, t], state) * q.shape[-1] ** -0.5)
        return torch.stack(o, 1).to(dtype), state

    arrays = workload.draw((1, 40, 2, 8), "slow")
    peer = peers.Peer("loop", "0", token_loop)
    found = workload.errors(workload.exact(arrays), workload.named(*peer.results(arrays)))
    assert found.keys() == {"o", "dq", "dk", "dv", "dg", "dbeta"} and max(found.values()) < 4e-3
    times, errors = timing.interleaved(peer.programs(arrays), 1, 0.0)
    assert times.keys() == {"fwd", "fwd_residuals", "fwdbwd"} and not errors


def test_a_second_run_adds_to_the_first_and_mixes_no_ratios(tmp_path):
    out = tmp_path / "gdn.json"
    words = f"{TINY} --seconds 0 --out {out} --implementations xla"
    bench.main(f"{words} --parts time,decode".split())
    report = bench.main(f"{words} --shapes 1x128x1 --parts time --add".split())
    shapes = [r["shape"] for r in rows(report, what="time")]
    assert shapes == ["s1_64_1"] * 2 + ["s1_128_1"] * 2
    assert len(rows(report, what="decode")) > 0 and len(rows(report, what="copy")) == 1
    assert {r["date"] for r in report["rows"]} <= {
        report["meta"]["date"],
        report["meta"]["earlier_runs"][0]["date"],
    }
    again = bench.main(f"{words} --parts time --add".split())
    assert len(again["rows"]) == len(report["rows"]) and len(again["meta"]["earlier_runs"]) == 2
    more = bench.main(f"{words} --parts decode --decode 3 --add".split())
    assert len(rows(more, what="decode")) == len(rows(again, what="decode")) + 2
    other = json.loads(out.read_text())
    other["meta"]["device"] = "1 x TPU v9"
    out.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="was measured on 1 x TPU v9"):
        bench.main(f"{words} --add".split())


def test_attention_is_measured_in_rows_and_packed(tmp_path):
    words = (
        "--op attention --shapes 1x64x2 --dim 16 --document 32 --twin 40 --repeats 2 --seconds 0"
    )
    out = tmp_path / "attention.json"
    report = bench.main(f"{words} --seconds 0 --implementations xla,mosaic_gpu --out {out}".split())
    for what in ("time", "packed"):
        (row,) = rows(report, what=what, implementation="xla")
        assert row["fwd_ms"] > 0 and row["fwdbwd_ms"] > 0 and "error" not in row
        (row,) = rows(report, what=what, implementation="mosaic_gpu")
        assert row["error"].keys() == {"fwd", "fwdbwd"} and "fwd_ms" not in row
    for name in ("cudnn_packed", "cudnn_rows"):
        (row,) = rows(report, what="packed", implementation=name)
        assert "error" in row
    found = rows(report, what="error", implementation="xla")
    assert [row["inputs"] for row in found] == list(attention.INPUTS)
    assert all(0 < max(row["errors"].values()) < 0.02 for row in found)


def test_attention_ratios_are_speeds_of_the_worse_direction():
    def row(what, name, fwd, both):
        figures = {"fwd_ms": fwd, "fwd_tflops": 1, "fwdbwd_ms": both, "fwdbwd_tflops": 1}
        return {"what": what, "shape": "16k", "implementation": name} | figures

    found = attention.summary(
        [
            row("time", "mosaic_gpu", 2.0, 8.0),
            row("time", "cudnn", 3.0, 4.0),
            row("packed", "mosaic_gpu", 1.0, 4.0),
            row("packed", "cudnn_packed", 2.0, 3.0),
        ]
    )
    assert (found["fwd_vs_cudnn_16k"], found["fwdbwd_vs_cudnn_16k"]) == (1.5, 0.5)
    assert found["packed_vs_cudnn_16k"] == 0.75
    assert attention.flops("fwd", (1, 4096, 16, 128)) == 4 * 4096**2 * 128 * 16 / 2
    assert attention.flops("fwdbwd", (1, 8192, 16, 128), 4096) == 3.5 * 2 * 4 * 4096**2 * 128 * 8


def test_an_option_of_another_op_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench.main(f"--op attention --decode 3 --out {tmp_path / 'x.json'}".split())
    assert "--op attention knows no decode" in capsys.readouterr().err
