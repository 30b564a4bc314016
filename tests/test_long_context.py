"""Long rows: order of cases, search for the longest, what is read from XLA, one tiny case."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import long_case, long_context
from experiments.long_case import Case, asked_bytes, time_steps
from experiments.long_context import (
    MULTIPLE,
    Key,
    fits_of,
    guess_of,
    next_probe,
    order,
    story,
    summary,
)
from hydrajax.typing import UserError

SMOKE = "configs/qwen3_1p7b/extend.py:smoke"
K = 1024


def row(shape, tokens, fits=True, **more):
    return {"shape": shape, "tokens": tokens, "fits": fits} | more


def test_short_rows_of_both_shapes_come_first():
    found = order((64 * K, 16 * K))
    assert found == [Key(s, t * K) for t in (16, 64) for s in ("student", "teacher_shape")]


@pytest.mark.parametrize("limit", [100, 256, 270, 300, 352, 512, 831, 2000])
@pytest.mark.parametrize("guess", [None, 64, 256, 320, 416, 1024])
def test_the_search_ends_at_the_longest_multiple_that_fits(limit, guess):
    limit, guess = limit * K, guess and guess * K
    known = {t: t <= limit for t in (16 * K, 64 * K, 128 * K, 256 * K)}
    tried = 0
    while (tokens := next_probe(known, guess)) is not None:
        assert tokens not in known and tokens % MULTIPLE == 0
        known[tokens], tried = tokens <= limit, tried + 1
    assert max(t for t, fits in known.items() if fits) == limit // MULTIPLE * MULTIPLE
    near = guess is not None and abs(guess - limit) < MULTIPLE and guess >= 256 * K
    assert tried <= (2 if near else 12)


def test_a_shape_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        long_context.parse(["--results=x.json", "--shapes=student,teacher"])
    assert "expected some of" in capsys.readouterr().err
    assert long_context.parse(["--results=x.json"]).shapes == long_case.SHAPES


@pytest.mark.parametrize(
    "text, told",
    [("abc", "numbers of tokens, got abc"), ("train.remat@64", "key=value before the @, got tr")],
)
def test_other_rows_that_are_none_are_refused(text, told, capsys):
    with pytest.raises(SystemExit):
        long_context.parse(["--results=x.json", f"--also={text}"])
    assert f"expected {told}" in capsys.readouterr().err


def test_files_of_cases_have_names_that_a_file_can_have():
    cache = Key("student", 64, ("train.teacher_cache=runs/cache",))
    names = {cache.name, Key("student", 64).name, Key("student", 64, ("optim.offload=True",)).name}
    assert len(names) == 3 and not any("/" in name for name in names)


def test_a_search_that_knows_nothing_tries_nothing():
    assert next_probe({}, None) is None and next_probe({16 * K: False}, None) is None


def test_the_guess_is_where_the_line_of_memory_meets_the_limit():
    sized = lambda t, b: row("student", t * K, compiled_bytes=b, bytes_limit=80)  # noqa: E731
    rows = [sized(64, 30), sized(128, 40), sized(256, 60), row("teacher_shape", 512 * K)]
    assert guess_of(rows) == 384 * K
    assert guess_of(rows[:1]) is None and guess_of([row("student", 1), row("student", 2)]) is None


def test_the_summary_has_the_names_of_what_ran():
    rows = [
        row("student", 16 * K, tokens_per_s=5.0, mfu=0.5),
        row("teacher_shape", 16 * K, tokens_per_s=4.0, mfu=0.4),
        row("teacher_shape", 256 * K, fits=False),
        row("student", 288 * K, tokens_per_s=1.0, mfu=0.1, searched=True),
        {"shape": "student", "tokens": 64 * K, "error": "exit code 1"},
    ]
    assert summary(rows) == {
        "student_tokens_per_s_16k": 5.0,
        "teacher_shape_tokens_per_s_16k": 4.0,
        "mfu_16k": 0.5,
        "max_context": 288 * K,
    }
    assert summary([row("student", 16 * K, fits=False)]) == {}


def test_rows_with_changes_of_their_own_stand_apart():
    first, second = ["train.remat=host"], ["train.remat=host", "optim.offload=True"]
    rows = [
        row("student", 64 * K, tokens_per_s=3.0, mfu=0.3, compiled_bytes=30, bytes_limit=80),
        row("student", 512 * K, tokens_per_s=1.0, mfu=0.1, compiled_bytes=9, changes=first),
        row("student", 512 * K, tokens_per_s=2.0, mfu=0.2, changes=second),
        row("student", 768 * K, fits=False, changes=second),
    ]
    assert summary(rows) == {
        "student_tokens_per_s_64k": 3.0, "mfu_64k": 0.3, "max_context": 64 * K,
        "student_tokens_per_s_512k train.remat=host": 1.0, "mfu_512k train.remat=host": 0.1,
        "max_context train.remat=host": 512 * K,
        "student_tokens_per_s_512k train.remat=host optim.offload=True": 2.0,
        "mfu_512k train.remat=host optim.offload=True": 0.2,
        "max_context train.remat=host optim.offload=True": 512 * K,
    }  # fmt: skip
    assert fits_of(rows) == {64 * K: True} and guess_of(rows) is None
    given = long_context.parse(
        ["--results=x.json", f"--also={','.join(second)}@1024,2048", "--also=4096"]
    ).also
    with_changes = [Key("student", tokens, tuple(second)) for tokens in (1024, 2048)]
    assert given == [*with_changes, Key("student", 4096)]


def test_what_was_not_tried_is_said():
    rows = [row("student", 256 * K), row("student", 512 * K, fits=False)]
    assert story(rows, None, "why")["not_tried"].startswith(f"rows between {256 * K} and {512 * K}")
    assert story(rows[:1], None, "why")["not_tried"].startswith(f"rows between {256 * K} and more")
    settled = story([*rows, row("student", 288 * K, fits=False)], None, "why")
    assert settled["not_tried"] == "nothing between" and settled["does_not_fit"] == 288 * K


@pytest.mark.parametrize(
    "message, want",
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.",
            4770354232,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1.25TiB.", 1.25 * 2**40),
        ("Failed to allocate request for 176.00MiB (184549376B) on device", 176 * 2**20),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.", 12),
        ("RESOURCE_EXHAUSTED: no size", None),
    ],
)
def test_the_size_that_xla_asked_for(message, want):
    assert asked_bytes(message) == want


def tiny(shape="student", **changes) -> tuple:
    case = replace(Case(shape, 64, steps=1), **changes)
    changes = ["model.num_layers=1", "hydra.chunk=16"]
    return long_case.read_config(SMOKE, case, changes), case


def test_out_of_memory_is_a_result_and_other_errors_are_not(monkeypatch):
    def fail(message):
        def compile_case(layout):
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(long_case, "compile_case", compile_case)
        return long_case.run(*tiny())

    found = fail("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.00GiB.")
    assert not found["fits"] and found["asked_bytes"] == 3 * 2**30
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: a kernel")


@pytest.mark.parametrize("change", ["data.rows=2", "mesh.fsdp=2", "kernels.attention"])
def test_what_a_case_sets_itself_is_refused(change):
    with pytest.raises(UserError, match=change.split("=")[0]):
        long_case.read_config(SMOKE, Case("student", 64), [change])


def test_changes_reach_the_config_and_a_stage_with_a_teacher_is_refused():
    cfg = long_case.read_config(SMOKE, Case("student", 64), ["kernels.attention=xla"])
    assert cfg.kernels.attention == "xla" and (cfg.data.rows, cfg.train.accum) == (1, 1)
    plan = long_case.subjects(cfg)[0].plan
    assert plan.num_fa == 6 and min(map(len, plan.fa)) >= 1
    with pytest.raises(UserError, match="without a teacher"):
        long_case.read_config(SMOKE, Case("student", 64), ["train.kl_weight=1.0"])


def timed(monkeypatch, durations, **case):
    now = [0.0]

    def step(state):
        now[0] += durations[state]
        return state + 1, {"loss": (np.float32(7.0), np.float32(2.0))}

    monkeypatch.setattr(long_case, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return time_steps(step, 0, Case("student", 64, **case))


def test_the_first_step_warms_up_unless_it_is_long_and_the_time_over(monkeypatch):
    found = timed(monkeypatch, [9.0, 1.0, 3.0, 2.0])
    assert found["steps_s"] == [1.0, 3.0, 2.0] and found["step_s"] == 2.0
    assert found["metrics_of_first_step"] == {"loss": 3.5} and found["warmed_up"]
    found = timed(monkeypatch, [9.0, 4.0, 3.0], seconds=5.0)
    assert found["steps_s"] == [4.0] and found["warmed_up"]
    found = timed(monkeypatch, [30.0], seconds=5.0)
    assert found["step_s"] == 30.0 and not found["warmed_up"]
    assert not timed(monkeypatch, [1.0], steps=0)["warmed_up"]


def test_documents_of_one_length_fill_the_row():
    cfg, case = tiny(documents=3)
    layout, subject = long_case.lay_out_case(cfg, case, jax.devices())
    batch = long_case.make_batch(cfg, case, subject.model.vocab_size, layout)
    ids, positions = (np.asarray(batch[name])[0] for name in ("segment_ids", "positions"))
    assert np.bincount(ids).tolist() == [0, 21, 21, 22]
    assert positions[[0, 20, 21, 42, 63]].tolist() == [0, 20, 0, 0, 21]


def test_the_teacher_shape_has_every_head_full_and_no_gates():
    rows = {}
    for shape in long_case.SHAPES:
        cfg, case = tiny(shape)
        layout, subject = long_case.lay_out_case(cfg, case, jax.devices())
        rows[shape] = long_case.facts(cfg, case, layout, subject)
        gated = any(path.endswith("w_z") for path in layout.student.params)
        assert gated == (shape == "student") and layout.programs.run.optim == cfg.optim
    assert [row["fa_heads"] for row in rows.values()] == [[2], [8]]
    assert rows["teacher_shape"]["trained"] == rows["teacher_shape"]["parameters"]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_student_is_measured_in_a_process_of_its_own_and_kept(monkeypatch, tmp_path, ahead):
    arguments = [
        f"--results={tmp_path / 'x.json'}", f"--root={tmp_path}", f"--cache={tmp_path / 'cache'}",
        f"--config={SMOKE}", "--shapes=student", "--lengths=64", "--steps=1", "--no-search",
        f"--ahead={ahead}", "--also=train.remat=host@64",
        "model.num_layers=1",
        "kernels.gated_delta_rule=reference", "kernels.attention=reference",
    ]  # fmt: skip
    long_context.main(arguments)
    report = json.loads((tmp_path / "x.json").read_text())
    found, on_host = report["rows"]
    assert on_host["changes"] == ["train.remat=host"] and on_host["remat"] == "host"
    assert on_host["metrics_of_first_step"]["loss"] == found["metrics_of_first_step"]["loss"]
    assert report["summary"]["student_tokens_per_s_0k"] == found["tokens_per_s"] > 0
    assert found["metrics_of_first_step"]["loss"] == pytest.approx(np.log(259), rel=0.05)
    assert found["fa_heads"] == [2] and found["warmed_up"] and len(found["steps_s"]) == 1
    assert found["implementations"] == {
        "attention": ["reference"], "causal_conv": ["xla"], "gated_delta_rule": ["reference"],
    }  # fmt: skip
    assert report["meta"]["device"] == "1 x cpu" and report["search"]["fits"] == 64
    if ahead:  # measured is what that process saved
        told = json.loads((tmp_path / "logs/student_64_compile.log").read_text())
        assert told == {name: found[name] for name in told} and "seconds" in told
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"logs", "cache"}

    def again(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(long_context.Runner, "measure", again)
    long_context.main([*arguments, "--add"])
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == report["rows"]


def test_a_failed_case_is_kept_as_one_and_named(monkeypatch, tmp_path):
    def fail(self, key, what, *options):
        log = tmp_path / "log"
        log.write_text("Traceback\nValueError: no kernel")
        return 1, log

    monkeypatch.setattr(long_context.Runner, "_call", fail)
    arguments = [f"--results={tmp_path / 'x.json'}", f"--root={tmp_path}", "--lengths=64"]
    with pytest.raises(SystemExit, match=r"2 cases failed.*ValueError: no kernel"):
        long_context.main(arguments)
    report = json.loads((tmp_path / "x.json").read_text())
    assert [r["error"] for r in report["rows"]] == ["exit code 1: ValueError: no kernel"] * 2
    assert report["summary"] == {}
    subject = report["meta"]["subject"]
    assert long_context.earlier(tmp_path / "x.json", subject)[0] == []
    with pytest.raises(SystemExit, match=r"expected cases of .*2.*, got "):
        long_context.earlier(tmp_path / "x.json", subject | {"documents": 2})
