"""The rehearsal reads compiled programs right, knows what a step keeps, and names the knob."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_runs import CFG, HYDRA, PLAN, run_config

from experiments import rehearsal
from hydrajax.config import (
    DataConfig,
    HydraConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
)
from hydrajax.head_plan import HeadPlan
from hydrajax.layout import lay_out
from hydrajax.rehearse import memory as hbm
from hydrajax.rehearse.chips import CHIPS, GIB, chip_of
from hydrajax.rehearse.hlo import Program
from hydrajax.rehearse.memory import Memory, advice, overflow, refusal
from hydrajax.rehearse.report import bytes_on_host
from hydrajax.rehearse.roofline import roofline
from hydrajax.rehearse.step import drawn_plan, implementations, subjects
from hydrajax.rehearse.traffic import collectives
from hydrajax.sharding import make_mesh
from hydrajax.start import check_expected
from hydrajax.trainer import jit_train_step
from hydrajax.typing import UserError

REPO = Path(__file__).resolve().parents[1]


def tiny_layout(stage: str, mesh: MeshConfig | None = None, rows: int = 8, **train):
    cfg = run_config(stage, **train)
    cfg = replace(cfg, data=replace(cfg.data, rows=rows))
    full = HeadPlan.all_full(CFG.num_layers, CFG.num_heads, CFG.num_kv_heads)
    student = SimpleNamespace(model=CFG, hydra=HYDRA, plan=PLAN)
    teacher = SimpleNamespace(model=CFG, hydra=HydraConfig.teacher(), plan=full)
    return lay_out(cfg, make_mesh(mesh or MeshConfig(1, -1)), student, lambda: teacher)


def test_state_is_counted_by_its_shards():
    whole = hbm.count(tiny_layout("distill", MeshConfig(-1, 1)))
    split = hbm.count(tiny_layout("distill", MeshConfig(1, -1)))
    layout = tiny_layout("distill")
    assert whole.parameters == sum(4 * a.size for a in layout.student.params.values())
    assert whole.gradients == whole.parameters
    assert abs(whole.optimiser - 2 * whole.parameters) <= 16  # two moments and two counters
    assert whole.teacher == sum(a.size * a.dtype.itemsize for a in layout.teacher.params.values())
    assert whole.parameters / 8 <= split.parameters < whole.parameters / 4  # norms stay whole
    assert split.rows == whole.rows == 4 * 16 * 4  # one row of 16 tokens, four arrays of 4 bytes


def test_activations_are_what_the_backward_pass_is_given():
    """Per row; with remat a block keeps its input, without it keeps much more."""
    kept = {
        (remat, rows): hbm.activations(tiny_layout("distill", rows=8 * rows, remat=remat))
        for remat in ("host", "block", "dots", "none")
        for rows in (1, 2)
    }
    assert kept["host", 1] < kept["block", 1] < kept["dots", 1] < kept["none", 1]
    assert all(kept[remat, 2] == 2 * kept[remat, 1] for remat, _ in kept)
    inputs = CFG.num_layers * 16 * CFG.width * 4  # L x T x D, fp32 here
    assert kept["block", 1] - kept["host", 1] == inputs
    assert hbm.inputs_of_blocks(tiny_layout("distill", rows=16, accum=2)) == inputs
    by_accum = hbm.activations(tiny_layout("distill", rows=16, accum=2, remat="block"))
    assert by_accum == kept["block", 1]


@pytest.mark.parametrize("stage", ["align", "extend"])
def test_every_stage_can_keep_inputs_of_blocks_on_the_host(stage):
    host, block = (hbm.count(tiny_layout(stage, remat=remat)) for remat in ("host", "block"))
    assert block.activations - host.activations == host.inputs == block.inputs > 0


def test_activations_of_a_function_with_a_known_answer():
    def residuals(x, w):
        return jax.vjp(lambda w: jnp.sum(jnp.sin(x @ w)), w)[1]

    x, w = jnp.ones((8, 4)), jnp.ones((4, 6))
    jaxpr = jax.make_jaxpr(residuals)(x, w).jaxpr
    kept = hbm._kept(jaxpr, 1)
    assert [v.aval.shape for v in kept] == [(8, 6)]  # cos(x w); x itself is given, w no activation


SIZES = Memory(parameters=2 * GIB, optimiser=4 * GIB, teacher=GIB, rows=0, gradients=2 * GIB,
               activations=8 * GIB, inputs=8 * GIB, total=24 * GIB, hbm=16 * GIB)  # fmt: skip
MESH = {"data": 1, "fsdp": 4, "context": 1, "model": 1}


def config(rows: int = 64, **train) -> RunConfig:
    return RunConfig(
        stage="distill", data=DataConfig(rows=rows), train=StageConfig(**{"accum": 1} | train)
    )


@pytest.mark.parametrize(
    "message, want",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 79.24G of 15.75G hbm. "
            "Exceeded hbm capacity by 63.49G.",
            (79.24, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (32.00G) exceeds available HBM (15.75G). HLO module: jit__lambda.",
            (32.0, 15.75),
        ),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_the_compilers_refusal_is_understood(message, want):
    found = overflow(message)
    assert found == (want and tuple(int(x * GIB) for x in want))


def test_the_message_names_sizes_and_the_knob():
    text = refusal(config(), MESH, SIZES)
    assert "needs 24.00 GiB, its HBM has 16.00 GiB" in text
    assert "parameters 2.00" in text and "activations 8.00" in text
    assert "--config.train.accum=4 (now 1)" in text  # 15 GiB beside the state into 7


@pytest.mark.parametrize(
    "mesh, cfg, memory, knobs",
    [
        # Whole copies of the state on every device: split it.
        (MESH | {"data": 4, "fsdp": 1}, config(), replace(SIZES, parameters=20 * GIB),
         ["--config.mesh.data=1 --config.mesh.fsdp=4 (now 4 and 1)"]),
        # Split already, and still too much: no knob but more devices.
        (MESH, config(), replace(SIZES, parameters=20 * GIB), []),
        # One row a device: nothing to accumulate.
        (MESH, config(rows=4, remat="none", loss_chunk=512), SIZES,
         ["--config.train.remat=block (now none)", "--config.train.loss_chunk=256 (now 512)",
          "--config.data.seq_len=256 (now 512)"]),
        # Micro-batches must still divide over the devices.
        (MESH, config(rows=24, accum=2, loss_chunk=1), SIZES,
         ["--config.train.accum=6 (now 2)", "--config.train.remat=host (now block)"]),
        # The moments alone stand in the way: of the state, or of the whole step.
        (MESH, config(), replace(SIZES, optimiser=12 * GIB, total=30 * GIB),
         ["--config.optim.offload=True (now False)"]),
        (MESH, config(rows=4, loss_chunk=1), replace(SIZES, total=20 * GIB),
         ["--config.optim.offload=True (now False)", "--config.train.remat=host (now block)",
          "--config.data.seq_len=256 (now 512)"]),
        # Nor is the host told to keep what would not suffice.
        (MESH, config(rows=24, accum=2, loss_chunk=1), replace(SIZES, inputs=7 * GIB),
         ["--config.train.accum=6 (now 2)"]),
        (MESH, replace(config(), optim=OptimConfig(offload=True)),
         replace(SIZES, optimiser=12 * GIB), []),
    ],
)  # fmt: skip
def test_advice_fits_what_is_too_large(mesh, cfg, memory, knobs):
    given = list(advice(cfg, mesh, memory))
    assert len(given) == len(knobs)
    for text, knob in zip(given, knobs, strict=True):
        assert text.endswith(knob)


def test_what_is_in_host_memory_is_named_by_what_it_is():
    row = {"remat": "host", "memory_bytes": {"host": 5, "inputs": 3}}
    assert bytes_on_host(row) == {"optimiser": 5, "activations": 3}
    assert bytes_on_host(row | {"remat": "block"}) == {"optimiser": 5}
    assert bytes_on_host(row | {"memory_bytes": {}}) == {}  # of results before these keys


def test_roofline_by_hand():
    chip = chip_of("TPU v5 lite")
    times = roofline(chip, flops=197e12 * 0.3, hbm_bytes=819e9 * 0.1, ici_bytes=200e9 * 0.2)
    assert (times.compute_s, times.hbm_s, times.ici_s) == pytest.approx((0.3, 0.1, 0.2))
    assert times.floor_s == pytest.approx(0.3) and times.ceiling_s == pytest.approx(0.6)
    assert times.mfu == pytest.approx((0.5, 1.0)) and times.bound == "compute"
    assert roofline(chip, 0.0, 0.0, 1.0).bound == "ICI"


def test_every_chip_has_a_peak_and_unknown_kinds_are_refused():
    assert all(chip.peak > 1e14 and chip.hbm >= 16 * GIB for chip in CHIPS)
    with pytest.raises(UserError, match=r"'TPU v9'.*TPU v5 lite, TPU v5, TPU v6 lite, TPU7x"):
        chip_of("TPU v9")


def test_shapes_come_from_the_config_where_no_folder_is():
    cfg = replace(config(), model=replace(CFG, num_layers=3), teacher="no/such/folder")
    student, teacher = subjects(cfg)
    assert student.source == "drawn" and teacher.source == "config.model"
    assert student.plan.num_fa == 3 == drawn_plan(cfg, cfg.model).num_fa  # a quarter of 12
    assert teacher.plan == HeadPlan.all_full(3, 4, 2)
    with pytest.raises(UserError, match=r"teacher's shapes.*config.model.*no/such/folder"):
        subjects(replace(cfg, model=None))


@functools.cache
def compiled_on_a_mesh():
    """(layout, executable) of a step compiled from shapes alone."""
    layout = tiny_layout("distill", MeshConfig(2, 2, 1, 2))
    with jax.set_mesh(layout.mesh):
        step = jit_train_step(layout.programs, layout.places)
        lowered = step.lower(layout.state(), layout.teacher.params, layout.batch())
        return layout, lowered.compile()


def test_a_step_compiled_from_shapes_runs_on_arrays():
    """The layout that is rehearsed is the one that trains: the executable takes the real state."""
    layout, executable = compiled_on_a_mesh()
    rng = np.random.default_rng(0)

    def draw(a):
        return jax.device_put(np.asarray(0.1 * rng.standard_normal(a.shape), a.dtype), a.sharding)

    rows = {k: jax.device_put(np.ones(a.shape, a.dtype), a.sharding)
            for k, a in layout.batch().items()}  # fmt: skip
    state, teacher = jax.tree.map(draw, (layout.state(), layout.teacher.params))
    after, _ = executable(state, teacher, rows)
    same = jax.tree.map(
        lambda a, want: a.sharding.is_equivalent_to(want, a.ndim), after, layout.places
    )
    assert all(jax.tree.leaves(same))
    want = NamedSharding(layout.mesh, P(("data", "fsdp"), "context"))
    assert layout.batch()["tokens"].sharding == want


def test_programs_tell_the_implementation_of_each_op():
    layout, executable = compiled_on_a_mesh()
    found = Program(executable.as_text())
    assert implementations(found) == {"attention": ["xla"], "gated_delta_rule": ["xla"]}
    assert found.unknown_loops == 0
    sent = collectives(found, layout.mesh.size).sent
    assert sent["all-gather"] > 0 and sent["all-reduce"] + sent["reduce-scatter"] > 0


def test_another_teacher_than_the_config_is_for_is_refused():
    check_expected(None, CFG, "teachers/x")
    check_expected(CFG, replace(CFG, max_context=64), "teachers/x")  # no matter of shapes
    message = "teachers/x is not of config.model: width: expected 16, got 32"
    with pytest.raises(UserError, match=message):
        check_expected(CFG, replace(CFG, width=32), "teachers/x")


def test_the_page_says_what_the_result_files_say():
    assert rehearsal.PAGE.read_text() == rehearsal.page(), "python -m experiments.rehearsal table"
    for path in rehearsal.RESULTS.glob("*.json"):
        body = json.loads(path.read_text())
        assert {"command", "commit", "versions", "device", "date", "seeds"} <= body["meta"].keys()
        assert body["summary"]["fits"] is body["rows"][0]["fits"]


needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="compiles for TPUs: pip install 'jax[tpu]'"
)


def rehearse(*args: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_OPTIMIZATION_LEVEL": "O0", "XLA_FLAGS": ""} | environment
    return subprocess.run(
        [sys.executable, "-m", "hydrajax.rehearse", *args],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=500,
    )  # fmt: skip


@pytest.mark.aot_tpu
@needs_libtpu
def test_a_smoke_run_compiles_for_a_tpu_host(tmp_path):
    out = tmp_path / "r.json"
    done = rehearse(
        "--config=configs/qwen3_1p7b/align.py:smoke", "--topology=v5e:2x2", f"--out={out}",
        "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--config.model.num_layers=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "compiled and simulated, nothing executed" in done.stdout
    body = json.loads(out.read_text())
    (row,) = body["rows"]
    assert row["fits"] and row["devices"] == 4 and row["device_kind"] == "TPU v5 lite"
    assert row["implementations"]["attention"] == ["xla"] and row["loops_counted_once"] == 0
    assert row["memory_bytes"]["total"] > row["memory_bytes"]["parameters"] > 0
    assert sum(row["sent_bytes"].values()) > 0
    assert {"command", "commit", "versions", "device", "date", "seeds"} <= body["meta"].keys()


@pytest.mark.aot_tpu
@needs_libtpu
def test_what_does_not_fit_names_the_knob_and_exits_with_2(tmp_path):
    """Whole copies of 1.7B parameters and moments on 16 GiB: found without compiling."""
    out = tmp_path / "r.json"
    done = rehearse(
        "--config=configs/qwen3_1p7b/distill.py", "--topology=v5e:2x2", f"--out={out}",
        "--config.mesh.data=-1", "--config.mesh.fsdp=1", "--config.data.rows=4",
        "--config.model.num_layers=20",
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: v5e:2x2: does not fit: a device needs at least" in done.stderr
    assert "--config.mesh.data=1 --config.mesh.fsdp=4 (now 4 and 1)" in done.stderr
    body = json.loads(out.read_text())
    assert body["summary"]["fits"] is False and "does not fit" in body["summary"]["message"]
    assert body["rows"][0]["memory_bytes"]["parameters"] > 4 * 2**30


@pytest.mark.aot_tpu
@needs_libtpu
def test_what_cannot_be_laid_out_is_one_line_and_exit_code_2():
    done = rehearse("--config=configs/qwen3_1p7b/align.py:smoke", "--topology=v5e:3x3")
    assert done.returncode == 2 and "topology 'v5e:3x3'" in done.stderr
    done = rehearse(
        "--config=configs/qwen3_1p7b/align.py:smoke", "--topology=v5e:16x16",
    )  # fmt: skip
    assert done.returncode == 2
    assert "set data.rows to a multiple of 256" in done.stderr
