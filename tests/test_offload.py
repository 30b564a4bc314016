"""optim.offload and train.remat=host: the same numbers, in host memory and not on the device."""

import functools
import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from tiny_runs import CFG, HYDRA, PLAN, batch, draw, run_config, teacher

from hydrajax import sharding
from hydrajax.checkpoint import CheckpointStore
from hydrajax.config import (
    HydraConfig,
    KernelConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    to_plain,
)
from hydrajax.head_plan import HeadPlan
from hydrajax.layout import Layout, lay_out
from hydrajax.optim import make_optimizer, state_shardings
from hydrajax.rehearse import memory as hbm
from hydrajax.rehearse.step import devices_of
from hydrajax.sharding import make_mesh, place_batch
from hydrajax.start import check_resumable
from hydrajax.trainer import TrainState, jit_train_step, means
from hydrajax.typing import UserError
from train import restore

H100 = Path(__file__).parent / "h100.txtpb"
STEPS = 3
CLIPPED = dict(clip_norm=1e-2)  # far below the gradients' norm


@functools.cache
def layout(offload: bool, devices: int = 1, remat: str = "none") -> Layout:
    cfg = run_config("distill", dict(offload=offload, **CLIPPED), ce_weight=0.5, remat=remat)
    full = HeadPlan.all_full(CFG.num_layers, CFG.num_heads, CFG.num_kv_heads)
    student = SimpleNamespace(model=CFG, hydra=HYDRA, plan=PLAN)
    taught = SimpleNamespace(model=CFG, hydra=HydraConfig.teacher(), plan=full)
    mesh = make_mesh(MeshConfig(1, devices), jax.devices()[:devices])
    return lay_out(cfg, mesh, student, lambda: taught)


@functools.cache
def step_of(offload: bool, devices: int = 1, remat: str = "none"):
    """The compiled step as a function of state and rows."""
    made = layout(offload, devices, remat)
    frozen = {path: jax.device_put(teacher()[1][path], a.sharding)
              for path, a in made.teacher.params.items()}  # fmt: skip
    fn = jit_train_step(made.programs, made.places)

    def step(state: TrainState, rows: dict):
        with jax.set_mesh(made.mesh):
            placed = place_batch(made.mesh, {k: np.asarray(v) for k, v in rows.items()})
            return fn(state, frozen, placed)

    return step


def first(offload: bool, devices: int = 1) -> TrainState:
    """As train.py makes it."""
    made = layout(offload, devices)
    params = jax.device_put(draw(HYDRA, PLAN)[1], made.places.params)
    init = jax.jit(made.programs.tx.init, out_shardings=made.places.opt_state)
    count = jax.device_put(jnp.zeros((), jnp.int32), made.places.step)
    return TrainState(count, params, init(made.programs.trainable(params)))


def trained(state: TrainState, offload: bool, devices: int = 1, steps=range(STEPS)) -> TrainState:
    for seed in steps:
        state, _ = step_of(offload, devices)(state, batch(seed=seed))
    return state


def kinds(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def moments(state: TrainState):
    adam = state.opt_state[1]
    return adam.mu, adam.nu


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("devices", [1, 4])
def test_the_same_bits_with_the_moments_on_the_host(devices):
    want = trained(first(False, devices), False, devices)
    got = trained(first(True, devices), True, devices)
    assert_same(got, want)
    assert any(np.asarray(m).any() for m in moments(got)[0].values())
    if devices > 1:  # and they are split as they were
        one, other = (moments(s)[1]["layers.0.mlp.w_up"] for s in (got, want))
        assert one.sharding.spec == other.sharding.spec != PartitionSpec()
        assert one.addressable_shards[0].data.shape == other.addressable_shards[0].data.shape


@pytest.mark.parametrize("devices", [1, 4])
def test_the_same_bits_with_the_inputs_of_blocks_on_the_host(devices):
    found = {}
    for remat in ("block", "host"):
        state = first(False, devices)
        for seed in range(STEPS):
            state, metrics = step_of(False, devices, remat)(state, batch(seed=seed))
        found[remat] = state, metrics
    assert_same(found["host"], found["block"])


@pytest.mark.gpu
@pytest.mark.parametrize("offload, remat", [(True, "block"), (False, "host"), (True, "host")])
def test_on_a_gpu_the_same_curve(offload, remat):
    """To rounding: XLA fuses otherwise beside copies."""
    curves = []
    with jax.default_matmul_precision("highest"):
        for choice in ((False, "block"), (offload, remat)):
            state, curve = first(choice[0]), []
            for seed in range(STEPS):
                state, metrics = step_of(choice[0], 1, choice[1])(state, batch(seed=seed))
                curve.append(means([metrics])["loss"])
            curves.append(curve)
    np.testing.assert_allclose(*curves, rtol=1e-4)
    assert np.ptp(curves[0]) > 0.01 * curves[0][0]
    assert kinds(moments(state)) == {"pinned_host" if offload else "device"}


@pytest.mark.parametrize("devices", [1, 4])
def test_moments_alone_are_in_host_memory_from_the_first_state_on(devices):
    device = jax.devices()[0].default_memory().kind
    before = first(True, devices)
    after = trained(before, True, devices, steps=[0])
    for state in (before, after):
        assert kinds(moments(state)) == {"pinned_host"}
        adam, rate = state.opt_state[1], state.opt_state[-1]
        assert kinds((state.step, state.params, adam.count, rate)) == {device}
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state)))
    assert kinds(moments(first(False, devices))) == {device}


def test_a_gradient_that_is_not_finite_leaves_the_host_as_it_was():
    state = trained(first(True), True)
    before = jax.device_get(state)
    bad = batch()
    bad["loss_mask"] = bad["loss_mask"].at[2, 5].set(jnp.nan)
    after, metrics = step_of(True)(state, bad)
    assert means([metrics])["nonfinite"] == 1 and int(after.step) == STEPS + 1
    assert_same((after.params, after.opt_state), (before.params, before.opt_state))
    assert kinds(moments(after)) == {"pinned_host"}


@pytest.mark.parametrize("then, devices", [(True, 4), (False, 1)])
def test_a_run_goes_on_with_the_other_choice(tmp_path, then, devices):
    """Saved with one choice, restored straight to where the other one wants it."""
    whole = trained(first(False, devices), False, devices)
    half = trained(first(not then, devices), not then, devices, steps=range(1))
    store = CheckpointStore(tmp_path)
    store.save(1, params=half.params, opt_state=half.opt_state)
    position = SimpleNamespace(set_state=lambda _: None)
    state = restore(store, 1, layout(then, devices), position)
    store.close()
    same = jax.tree.map(lambda a, place: a.sharding == place, state, layout(then, devices).places)
    assert all(jax.tree.leaves(same))
    assert_same(trained(state, then, devices, steps=range(1, STEPS)), whole)


def test_the_choice_may_change_on_resume_and_be_missing_in_what_was_written_before():
    now = run_config("distill", dict(offload=True), remat="host")
    before = json.loads(json.dumps(to_plain(run_config("distill"))))
    check_resumable(now, before)
    del before["optim"]["offload"], before["train"]["teacher_cache"]
    check_resumable(now, before)
    before["optim"]["clip_norm"] = 2.0
    with pytest.raises(UserError, match=r"optim.clip_norm: 2.0 -> 1.0"):
        check_resumable(now, before)


@pytest.mark.parametrize(
    "knob, chosen",
    [("optim.offload=True", dict(offload=True)), ("train.remat=host", dict(remat="host"))],
)
def test_devices_without_such_memory_are_refused(monkeypatch, knob, chosen):
    monkeypatch.setattr(sharding, "HOST", "no_such_memory")
    layout.__wrapped__(False)
    with pytest.raises(UserError, match=f"{knob} needs memory of kind 'no_such.* cpu has none"):
        layout.__wrapped__(**dict(offload=False) | chosen)


def test_the_rehearsal_counts_them_in_host_memory():
    with_, without = hbm.count(layout(True, 4)), hbm.count(layout(False, 4))
    assert with_.optimiser == 8  # two counters
    assert with_.host == without.optimiser - 8 > 0 == without.host
    assert replace(with_, host=0, optimiser=0) == replace(without, optimiser=0)


def chips(kind: str) -> list:
    """Devices that are not there; skips where there is nothing to compile for them with."""
    if kind == "tpu":
        return devices_of("v5e:2x2")
    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=H100.read_text(), topology="1x1x1"
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        pytest.skip(f"no CUDA plugin of jax to compile with: {error}")
    return list(found.devices)


def subject(layers: int) -> SimpleNamespace:
    """What is laid out: a small model without GDN heads."""
    model = ModelConfig(
        vocab_size=512, width=256, mlp_width=1024, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=64,
    )  # fmt: skip
    plan = HeadPlan.all_full(model.num_layers, model.num_heads, model.num_kv_heads)
    return SimpleNamespace(model=model, hydra=HydraConfig.teacher(), plan=plan)


needs_libtpu = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="compiles for TPUs: pip install 'jax[tpu]'"
)


AHEAD_OF_TIME = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("tpu", marks=[pytest.mark.aot_tpu, needs_libtpu]),
        pytest.param("cuda", marks=pytest.mark.aot_gpu),
    ],
)


@AHEAD_OF_TIME
def test_the_compiled_step_keeps_them_off_the_device(kind):
    devices = chips(kind)
    student = subject(layers=2)
    found, sizes = {}, {}
    for offload in (False, True):
        cfg = replace(run_config("pretrain", dict(offload=offload)), model=student.model)
        cfg = replace(cfg, kernels=KernelConfig(*("xla",) * 3))
        made = lay_out(cfg, make_mesh(MeshConfig(1, -1), devices), student, lambda: student)
        with jax.set_mesh(made.mesh):
            step = jit_train_step(made.programs, made.places)
            lowered = step.lower(made.state(), {}, made.batch())
        found[offload] = lowered.compile().memory_analysis()
        sizes = {path: 2 * 4 * math.prod(a.sharding.shard_shape(a.shape))
                 for path, a in made.trained().items()}  # fmt: skip
    total, largest = sum(sizes.values()), max(sizes.values())
    with_, without = found[True], found[False]
    assert with_.host_argument_size_in_bytes >= total  # tiles of small arrays are padded
    assert with_.host_alias_size_in_bytes == with_.host_output_size_in_bytes
    assert with_.host_output_size_in_bytes == with_.host_argument_size_in_bytes
    gone = without.argument_size_in_bytes - with_.argument_size_in_bytes
    assert gone >= total and gone == pytest.approx(with_.host_argument_size_in_bytes, rel=0.01)
    fresh = [s.output_size_in_bytes - s.alias_size_in_bytes for s in (with_, without)]
    assert fresh[0] <= fresh[1] < largest  # metrics: the state is donated


@AHEAD_OF_TIME
def test_a_few_parameters_moments_are_on_the_device_at_a_time(kind):
    """The update of 32 matrices; a compiler left to itself may fetch the moments of all."""
    mesh = make_mesh(MeshConfig(1, 1), chips(kind)[:1])
    place = NamedSharding(mesh, PartitionSpec())
    leaf = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=place)
    params, bytes_each = {f"w{i:02}": leaf for i in range(32)}, 4 * leaf.size
    temporary = {}
    for offload in (False, True):
        tx = make_optimizer(OptimConfig(offload=offload), 10)
        places = state_shardings(tx, params, dict.fromkeys(params, place), mesh, offload=offload)
        state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            jax.eval_shape(tx.init, params), places,
        )  # fmt: skip

        def step(params, state, grads, tx=tx):
            finite = jnp.isfinite(optax.tree.norm(grads))
            updates, state = tx.update(grads, state, params, finite=finite)
            return optax.apply_updates(params, updates), state

        where = dict.fromkeys(params, place), places
        compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=where).lower(
            params, state, params
        )
        temporary[offload] = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporary[True] - temporary[False] <= 4 * bytes_each  # of 64


@AHEAD_OF_TIME
def test_inputs_of_blocks_are_off_the_device_between_the_passes(kind):
    """A GPU fetches them one after another: with more layers it holds little more."""
    devices, found = chips(kind), {}
    for remat, layers in (("block", 2), ("block", 6), ("host", 2), ("host", 6)):
        student = subject(layers)
        cfg = run_config("pretrain", remat=remat, loss_chunk=512)
        cfg = replace(cfg, data=replace(cfg.data, rows=len(devices), seq_len=32_768))
        cfg = replace(cfg, model=student.model, kernels=KernelConfig(*("xla",) * 3))
        made = lay_out(cfg, make_mesh(MeshConfig(1, -1), devices), student, lambda: None)
        with jax.set_mesh(made.mesh):
            step = jit_train_step(made.programs, made.places)
            compiled = step.lower(made.state(), {}, made.batch()).compile()
        found[remat, layers] = compiled.memory_analysis()
    block_input = 32_768 * student.model.width * 4
    assert found["host", 6].host_temp_size_in_bytes >= 6 * block_input
    assert found["block", 6].host_temp_size_in_bytes == 0
    if kind == "tpu":  # where memory is plenty, its scheduler has many copies under way
        return
    more = {
        remat: found[remat, 6].temp_size_in_bytes - found[remat, 2].temp_size_in_bytes
        for remat in ("block", "host")
    }
    assert more["block"] >= 3.9 * block_input
    assert more["host"] <= 0.5 * block_input  # gradients of the layers' parameters


@pytest.mark.aot_gpu
def test_a_gpu_redoes_the_layers_one_after_another_beside_the_copies():
    """XLA's scheduler that hides copies would hold the inner activations of all layers at once."""
    student = subject(layers=8)
    devices, temporary = chips("cuda"), {}
    for offload in (False, True):
        cfg = run_config("pretrain", dict(offload=offload), remat="block", loss_chunk=1024)
        cfg = replace(cfg, data=replace(cfg.data, rows=1, seq_len=8192))
        cfg = replace(
            cfg, model=student.model, kernels=KernelConfig(*("xla",) * 3), mesh=MeshConfig()
        )
        made = lay_out(cfg, make_mesh(cfg.mesh, devices[:1]), student, lambda: student)
        with jax.set_mesh(made.mesh):
            step = jit_train_step(made.programs, made.places)
            compiled = step.lower(made.state(), {}, made.batch()).compile()
        temporary[offload] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[True] <= 1.1 * temporary[False]
