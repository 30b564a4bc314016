"""Sharding: every mesh computes what one device does, and says what it could not split."""

import functools
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_runs import CFG, batch, programs, run_config, teacher

from hydrajax import sharding
from hydrajax.config import HydraConfig, MeshConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.layout import head_split
from hydrajax.model import abstract_model, logical_axes, split_params
from hydrajax.optim import state_shardings
from hydrajax.rehearse.step import devices_of
from hydrajax.sharding import check_batch, make_mesh, param_shardings, place_batch, replicated, spec
from hydrajax.trainer import TrainState, make_train_step, means
from hydrajax.typing import UserError

RAGGED = HeadPlan(((0, 1, 3),), 4, 2)  # three FA heads, one LA head: nothing divides by two
RUN = run_config("distill", ce_weight=0.5)


@functools.cache
def start():
    return programs(RUN, plan=RAGGED)


def axes_and_shapes():
    model = abstract_model(CFG, HydraConfig(), RAGGED)
    return logical_axes(model), {path: a.shape for path, a in split_params(model)[1].items()}


@functools.cache
def alone() -> tuple[dict, dict]:
    """Parameters and metrics after a step on one device."""
    made, state = start()
    after, metrics = jax.jit(make_train_step(made))(state, teacher()[1], batch(8))
    return jax.device_get(after.params), means([metrics])


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2)],
    ids=["data", "fsdp", "data_fsdp_model"],
)
def test_a_step_on_a_mesh_equals_a_step_on_one_device(sizes):
    made, state = start()
    mesh = make_mesh(MeshConfig(*sizes))
    axes, shapes = axes_and_shapes()
    shardings = param_shardings(mesh, axes, shapes)
    places = TrainState(
        NamedSharding(mesh, P()),
        shardings,
        state_shardings(made.tx, made.trainable(state.params), shardings, mesh),
    )
    rows = place_batch(mesh, {k: np.asarray(v) for k, v in batch(8).items()})
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(made), out_shardings=(places, None))
        after, metrics = step(
            jax.device_put(state, places), jax.device_put(teacher()[1], whole), rows
        )
    params, values = alone()
    got = means([metrics])
    for name in values:
        assert got[name] == pytest.approx(values[name], rel=1e-5, abs=1e-6), name
    for path in params:
        np.testing.assert_allclose(after.params[path], params[path], atol=1e-5, err_msg=path)
        assert after.params[path].sharding.is_equivalent_to(shardings[path], params[path].ndim)
    if sizes[1] > 1:  # the largest matrices and their moments are split, not copied
        moments = after.opt_state[1].mu
        for tree in (after.params, moments):
            shard = tree["layers.0.mlp.w_up"].addressable_shards[0].data
            assert shard.size == CFG.width * CFG.mlp_width // (sizes[1] * sizes[3])


def test_spec_splits_what_divides_and_keeps_the_rest_whole():
    mesh = {"data": 2, "fsdp": 2, "context": 2, "model": 2}
    assert spec(("width", "mlp"), (16, 24), mesh) == P(("fsdp", "context"), "model")
    assert spec(("width", "fa_heads", None), (16, 3, 4), mesh) == P(("fsdp", "context"), None, None)
    assert spec(("batch", None, "heads", None), (8, 16, 4, 4), mesh)[0] == ("data", "fsdp")
    assert spec(("batch", None), (6, 16), mesh) == P(None, None)
    assert spec(("batch", "tokens", None), (8, 16, 4), mesh) == P(("data", "fsdp"), "context", None)
    with pytest.raises(ValueError, match="claimed twice"):
        spec(("mlp", "vocab"), (8, 8), mesh)
    with pytest.raises(ValueError):
        spec(("width",), (8, 8), mesh)
    with pytest.raises(KeyError):
        spec(("no such axis",), (8,), mesh)


def test_the_free_mesh_axis_takes_what_is_left():
    sizes = lambda *cfg: tuple(make_mesh(MeshConfig(*cfg)).shape.values())  # noqa: E731
    assert sizes() == (8, 1, 1, 1)
    assert sizes(2, -1, 1, 2) == (2, 2, 1, 2)
    assert sizes(1, 2, -1) == (1, 2, 4, 1)


@pytest.mark.parametrize("sizes", [(3,), (-1, 3), (2, 2, 1, 4), (2, 2, 4), (1,)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match=r"does not fit 8 devices"):
        make_mesh(MeshConfig(*sizes))


def test_heads_that_stay_whole_are_listed():
    axes, shapes = axes_and_shapes()
    listed = replicated(make_mesh(MeshConfig(-1, 1, 1, 2)), axes, shapes)
    assert "layers.0.attn.fa.w_q" in listed and "layers.0.attn.la.a_log" in listed
    assert "layers.0.attn.fa.w_k" not in listed  # two kept KV heads
    assert "layers.0.attn.w_o" not in listed  # four heads
    assert not any(".mlp." in path or path == "embed.w" for path in listed)
    assert replicated(make_mesh(MeshConfig()), axes, shapes) == []


def test_no_parameter_of_any_head_layout_claims_a_mesh_axis_twice():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    cfg = replace(
        CFG, tied_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True
    )
    for flags in (
        {},
        dict(qkv_split=False, la_kv="gqa", la_short_conv="random"),
        dict(fa_kv="expanded", fusion="gated_competition", norm_weight="per_head"),
        dict(fusion="layer_norm_adapter", fa_gate="headwise"),
    ):
        for fa in ((), (0, 1), (0, 1, 2, 3)):
            model = abstract_model(cfg, HydraConfig(**flags), HeadPlan((fa,), 4, 2))
            shapes = {path: a.shape for path, a in split_params(model)[1].items()}
            param_shardings(mesh, logical_axes(model), shapes)


def test_rows_go_to_the_devices_of_data_and_fsdp():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    rows = place_batch(mesh, {"tokens": np.arange(32).reshape(8, 4)})["tokens"]
    assert {s.data.shape for s in rows.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(jnp.asarray(rows), np.arange(32).reshape(8, 4))


def test_tokens_go_to_the_devices_of_context_in_order():
    rows = place_batch(make_mesh(MeshConfig(2, 1, 4)), {"tokens": np.arange(64).reshape(4, 16)})
    for shard in rows["tokens"].addressable_shards:
        row, token = (0 if part.start is None else part.start for part in shard.index)
        want = 16 * row + token + np.array([[0, 1, 2, 3], [16, 17, 18, 19]])
        np.testing.assert_array_equal(shard.data, want)


def hosts(processes: int, local: int) -> list[SimpleNamespace]:
    """Devices of several processes, as far as meshes look at them."""
    return [
        SimpleNamespace(id=i, process_index=i // local, platform="cpu", device_kind="cpu",
                        slice_index=0)
        for i in range(processes * local)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sizes", [(4, 1, 1, 4), (1, 4, 2, 2), (2, 4, 2, 1), (4, 2, 1, 2), (8, 1, 1, 2)]
)
def test_devices_that_share_rows_are_of_one_process(sizes):
    """A TPU torus is cut along its links; processes would read different rows for one group."""
    devices = hosts(processes=4, local=4)
    cut = np.array(devices).reshape(4, 4).T.reshape(sizes)
    assert not sharding._reads_rows_apart(SimpleNamespace(devices=cut))
    found = sharding._process_by_process(sizes, 4, devices)
    assert found.shape == sizes and {d.id for d in found.flat} == set(range(16))
    assert sharding._reads_rows_apart(SimpleNamespace(devices=found))


@pytest.mark.aot_tpu
@pytest.mark.skipif(find_spec("libtpu") is None, reason="knows TPUs: pip install 'jax[tpu]'")
@pytest.mark.parametrize("context, model", [(1, 4), (4, 1), (2, 2), (1, 2)])
def test_rows_of_a_real_torus_are_read_by_one_process_each(context, model):
    for topology in ("v5e:4x4", "v5p:4x4x4"):
        mesh = make_mesh(MeshConfig(-1, 1, context, model), devices_of(topology))
        for group in mesh.devices.reshape(-1, context * model):
            assert len({device.process_index for device in group}) == 1


def test_every_micro_batch_is_split():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    check_batch(mesh, 8, 4, accum=2)
    with pytest.raises(UserError, match=r"8 rows in train.accum=4 .*; lower train.accum, .* of 16"):
        check_batch(mesh, 8, 4, accum=4)


def test_rows_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match="6 rows cannot be split over mesh data x fsdp = 4"):
        place_batch(make_mesh(MeshConfig(2, 2, 1, 2)), {"tokens": np.zeros((6, 4), np.int32)})


def test_tokens_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match=r"rows of 6 tokens .* mesh.context=4; set data.seq_len to"):
        place_batch(make_mesh(MeshConfig(2, 1, 4)), {"tokens": np.zeros((6, 6), np.int32)})


def test_rows_shorter_than_the_convolution_looks_back_are_refused():
    with pytest.raises(UserError, match=r"rows of 8 tokens are too short for mesh.context=4"):
        place_batch(make_mesh(MeshConfig(2, 1, 4)), {"tokens": np.zeros((6, 8), np.int32)})


def test_one_line_says_what_is_split_and_what_that_costs():
    plan = HeadPlan(((0, 1, 3), (), (0, 1, 2, 3)), 4, 2)
    assert head_split(plan, make_mesh(MeshConfig())) == ""
    assert head_split(plan, make_mesh(MeshConfig(-1, 1, 1, 2))) == (
        "mesh.model=2 splits FA heads in 1 of 2 layers (1.43 x an even split), GDN heads in 1 of 2 "
        "layers (1.20 x an even split); other layers' are whole on every device"
    )
    full = HeadPlan.all_full(3, 4, 2)
    assert head_split(full, make_mesh(MeshConfig(-1, 1, 1, 4))).startswith(
        "mesh.model=4 splits FA heads in 3 of 3 layers (1.00 x an even split); other"
    )
