"""Checkpoints come back bit for bit, on any devices, or not at all."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hydrajax.array_tree import flatten
from hydrajax.checkpoint import (
    CheckpointStore,
    hash_params,
    load_run,
    make_lineage,
    params_hash,
    read_config,
    write_config,
)
from hydrajax.config import HydraConfig, RunConfig, to_plain
from hydrajax.head_plan import HeadPlan
from hydrajax.model_config import ModelConfig, RopeConfig
from hydrajax.typing import UserError

MODEL = ModelConfig(vocab_size=16, width=8, mlp_width=16, num_layers=2, num_heads=4,
                    num_kv_heads=2, head_dim=2, rope=RopeConfig(theta=5e5))  # fmt: skip
PLAN = HeadPlan(((0, 3), ()), 4, 2)


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "layers.0.attn.fa.w_q": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "layers.1.attn.fa.w_q": jnp.zeros((8, 0), jnp.float32),  # a layer without FA heads
        "norm.scale": jnp.asarray(rng.normal(size=8), jnp.bfloat16),
        "step": jnp.int32(7),
    }


def on(devices, tree):
    """Shapes of a tree, split over the first axis where that is 8 long."""
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,),
                         devices=jax.devices()[:devices])  # fmt: skip

    def place(a):
        spec = P("d") if a.shape[:1] == (8,) and a.size else P()
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def assert_same(want, got):
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, steps=(5,), keep=2, **kwargs):
    store = CheckpointStore(folder, keep=keep)
    for step in steps:
        store.save(step, params=make_params(step), **kwargs)
    store.close()
    return store


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (8, 1)])
def test_restores_onto_another_device_count(tmp_path, before, after):
    params = make_params()
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": params, "opt_state": tx.init(params)}
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), state, on(before, state))
    store = CheckpointStore(tmp_path)
    store.save(3, **placed, data={"next": 12, "seed": np.int64(1)}, meta={"stage": "align"})
    found = store.restore(3, on(after, state))
    assert found["data"] == {"next": 12, "seed": 1} and found["meta"] == {"stage": "align"}
    assert_same(state, {k: found[k] for k in state})
    w = found["params"]["layers.0.attn.fa.w_q"]
    assert len(w.sharding.device_set) == after
    store.close()


def test_parameters_alone_come_as_numpy(tmp_path):
    store = saved(tmp_path, opt_state={"m": jnp.ones(3)})
    params = store.restore_params(5)
    assert all(isinstance(p, np.ndarray) for p in params.values())
    assert_same(make_params(5), params)


def test_a_donated_update_cannot_change_what_is_being_saved(tmp_path):
    update = jax.jit(lambda p: jax.tree.map(lambda a: a + 1, p), donate_argnums=0)
    params = {f"layers.{i}.w": jnp.full((256, 1024), i, jnp.float32) for i in range(8)}
    store = CheckpointStore(tmp_path)
    store.save(1, params=params)
    for _ in range(20):
        params = update(params)
    jax.block_until_ready(params)
    for path, value in store.restore_params(1).items():
        assert (value == int(path.split(".")[1])).all(), path
    store.close()


def test_mismatches_are_listed_and_nothing_is_cast(tmp_path):
    store = saved(tmp_path)
    target = dict(make_params())
    target["layers.0.attn.fa.w_q"] = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    target["norm.scale"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    target["new"] = target.pop("step")
    with pytest.raises(UserError) as e:
        store.restore(5, {"params": target})
    text = str(e.value)
    assert "layers.0.attn.fa.w_q: expected float32[8,6], found float32[8,4]" in text
    assert "norm.scale: expected float32[8], found bfloat16[8]" in text
    assert "new: expected int32[], found nothing" in text
    assert "step: expected nothing, found int32[]" in text
    with pytest.raises(UserError, match="holds no opt_state"):
        store.restore(5, {"params": make_params(), "opt_state": {"m": jnp.ones(2)}})
    with pytest.raises(UserError, match=r"No checkpoint of step 6 .*found: 5/"):
        store.restore_params(6)


def test_keeps_the_newest_and_saves_a_step_once(tmp_path, caplog):
    store = saved(tmp_path, steps=(1, 2, 3, 4))
    assert sorted(p.name for p in store.root.iterdir()) == ["3", "4"]
    again = CheckpointStore(tmp_path)
    again.save(4, params=make_params(99))
    assert "whole already" in caplog.text
    assert_same(make_params(4), again.restore_params(4))
    again.close()


def test_state_without_arrays(tmp_path):
    state = optax.sgd(0.1).init(make_params())
    store = saved(tmp_path, opt_state=state)
    found = store.restore(5, {"params": make_params(), "opt_state": state})
    assert found["opt_state"] == state and found["data"] is None


def test_flat_paths_are_those_of_messages():
    state = optax.adam(1e-3).init({"layers.0.w": jnp.ones(2)})
    assert list(flatten(state)) == ["0.count", "0.mu.layers.0.w", "0.nu.layers.0.w"]
    with pytest.raises(ValueError, match="share one path"):
        flatten({"a.b": 1, "a": {"b": 2}})


def test_hash_is_of_weights_not_of_files(tmp_path):
    write_config(tmp_path, model=MODEL, hydra=HydraConfig(), plan=PLAN, lineage={})
    saved(tmp_path)
    params = make_params(5)
    want = params_hash(tmp_path)
    assert want == hash_params(params) == hash_params(dict(reversed(params.items())))
    changed = params | {"norm.scale": params["norm.scale"].at[0].add(1)}
    cast = params | {"norm.scale": params["norm.scale"].astype(jnp.float32)}
    assert len({want, hash_params(changed), hash_params(cast)}) == 3
    lineage = make_lineage(["train.py"], tmp_path)
    assert (lineage["parent"], lineage["parent_hash"]) == (str(tmp_path), want)
    assert lineage["versions"]["jax"] == jax.__version__
    json.dumps(lineage)


def test_config_round_trip_and_load_run(tmp_path):
    run = RunConfig(stage="align", out=str(tmp_path))
    write_config(tmp_path, model=MODEL, hydra=HydraConfig(chunk=32), plan=PLAN, run=run,
                 lineage={"command": ["x"]})  # fmt: skip
    with pytest.raises(UserError, match=r"No checkpoint in .*\(looked in .*found: no such folder"):
        load_run(tmp_path)
    saved(tmp_path, steps=(5, 6))
    got = load_run(tmp_path)
    assert (got.info.model, got.info.plan, got.info.hydra.chunk) == (MODEL, PLAN, 32)
    assert got.info.run == to_plain(run) and got.info.path == Path(tmp_path)
    assert got.step == 6 and load_run(tmp_path, 5).step == 5
    assert_same(make_params(6), got.params)


def edited(folder, **changes):
    path = folder / "config.json"
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in body.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": "gone"}, r"config.json: missing fields \['plan'\]"),
        ({"format_version": 9}, "format_version 9"),
        ({"model": {"widht": 3}}, r"config.json: model has unknown keys \['widht'\]"),
        ({"model": 3}, "config.json: field 'model' is malformed"),
        ({"model_type": "llama"}, "convert_torch.py import"),
        ({"plan": HeadPlan.all_full(3, 4, 2).to_json()}, "config.json: head plan is for"),
    ],
)
def test_bad_configs_name_file_and_field(tmp_path, changes, message):
    write_config(tmp_path, model=MODEL, hydra=HydraConfig(), plan=PLAN, lineage={})
    edited(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_config_absent_or_unwritable(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"config.json not found \(found: notes.txt\)"):
        read_config(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_config(tmp_path / "notes.txt" / "x", model=MODEL, hydra=HydraConfig(), plan=PLAN,
                     lineage={})  # fmt: skip
