"""Every mesh axis alone and mixed: loss and gradients are those of one device.

The rows hold documents that cross the borders between devices, the layers every kind of head plan,
and the losses are cut in pieces. All is fp32, in which the order of sums may differ: half an ulp
on every parameter moves these gradients by 1.3e-5 of their size, the loss by 1e-7.
"""

import functools
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_runs import CFG, batch, programs, run_config, teacher

from hydrajax.config import HydraConfig, MeshConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.model import abstract_model, logical_axes
from hydrajax.sharding import make_mesh, param_shardings, place_batch
from hydrajax.trainer import make_loss

CFG3 = replace(CFG, num_layers=3, head_dim=8)
# Three FA heads and one GDN head, which no mesh.model divides; no FA head; no GDN head.
PLAN3 = HeadPlan(((0, 1, 3), (), (0, 1, 2, 3)), 4, 2)
HYDRA3 = HydraConfig(chunk=16, la_short_conv="random", la_kv="gqa")
ROWS, TOKENS = 8, 32


@functools.cache
def start(stage: str):
    made, state = programs(run_config(stage, ce_weight=0.5, loss_chunk=64), CFG3, PLAN3, HYDRA3)
    # Decays as of trained models, so that states live longer than a device's tokens.
    params = {path: p - 4 if path.endswith("a_log") else p for path, p in state.params.items()}
    trained = made.trainable(params)
    frozen = {path: p for path, p in params.items() if path not in trained}
    return made, trained, frozen


@functools.cache
def evaluate(stage: str, **sizes: int):
    """Loss, count, gradients and the program, with everything placed as train.py places it."""
    made, trained, frozen = start(stage)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), devices)
    axes = logical_axes(abstract_model(CFG3, HYDRA3, PLAN3))
    shapes = {path: p.shape for path, p in (trained | frozen).items()}
    places = param_shardings(mesh, axes, shapes)
    trained, frozen = (
        {path: jax.device_put(p, places[path]) for path, p in tree.items()}
        for tree in (trained, frozen)
    )
    words = jax.device_put(teacher(CFG3)[1], NamedSharding(mesh, P()))
    rows = place_batch(mesh, {k: np.asarray(v) for k, v in batch(ROWS, TOKENS).items()})
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(make_loss(made), has_aux=True))
        run = run.lower(trained, frozen, words, rows).compile()
        (loss, (count, _)), grads = run(trained, frozen, words, rows)
    return *jax.device_get((loss, count, grads)), run.as_text()


@pytest.mark.parametrize(
    "stage, sizes",
    [
        ("extend", dict(data=8)),
        ("extend", dict(fsdp=4)),
        ("extend", dict(context=2)),
        ("extend", dict(context=8)),
        ("extend", dict(model=2)),
        ("distill", dict(data=2, context=2, model=2)),
        ("align", dict(fsdp=2, context=2, model=2)),
    ],
    ids=lambda x: x if isinstance(x, str) else "_".join(f"{k}{n}" for k, n in x.items()),
)
def test_loss_and_gradients_are_those_of_one_device(stage, sizes):
    want, want_count, want_grads, _ = evaluate(stage)
    got, got_count, got_grads, _ = evaluate(stage, **sizes)
    assert got_count == want_count
    assert got == pytest.approx(want, rel=1e-6)
    assert got_grads.keys() == want_grads.keys()
    for path, grad in want_grads.items():
        assert_close(path, grad, got_grads[path], 3e-5)


def test_split_tokens_move_by_the_ops_alone():
    """Beside them weights are gathered, as under fsdp, and never the activations of all tokens."""
    program = evaluate("extend", context=8)[-1]
    gathered = re.findall(r" = (\S+) all-gather(?:-start)?\(.*op_name=\"([^\"]*)\"", program)
    whole = {name for shape, name in gathered if shape.startswith(f"f32[{ROWS},{TOKENS},")}
    assert whole and all("shard_map" in name for name in whole)
