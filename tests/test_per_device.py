"""A kernel on a mesh: devices run their parts; results and gradients are those of one device."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_runs import CFG

from hydrajax import attention as attention_module
from hydrajax.attention import _AXES, FullHeads
from hydrajax.config import HydraConfig, KernelConfig, MeshConfig
from hydrajax.deltanet import _HEADS, _RULE_AXES, _STATE, _STEP_AXES
from hydrajax.head_plan import HeadPlan
from hydrajax.layers import Sequence, rope_tables
from hydrajax.sharding import make_mesh, one_device, per_device
from pallas_kernels import attention, gated_delta_rule, gated_delta_step
from pallas_kernels.dispatch import device_kind

T, H = 24, 8


def arrays(rows: int, heads: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(rows, T, heads, H)) for _ in range(3))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    floats = {
        "q": q,
        "k": k,
        "v": v,
        "g": -rng.uniform(0, 0.3, (rows, T, heads)),
        "beta": rng.uniform(0, 1, (rows, T, heads)),
        "initial_state": rng.normal(size=(rows, heads, H, H)),
    }
    ids = np.cumsum(rng.uniform(size=(rows, T)) < 0.1, 1)
    floats = {name: jnp.asarray(x, jnp.float32) for name, x in floats.items()}
    return floats | {"segment_ids": jnp.asarray(ids, jnp.int32)}


def rule(**arrays):
    return gated_delta_rule(**arrays, implementation="xla")


def value_and_grads(op, arrays):
    """Outputs, and gradients for a cotangent that differs in every element."""
    ids = {name: x for name, x in arrays.items() if name == "segment_ids"}
    floats = {name: x for name, x in arrays.items() if name not in ids}

    def loss(floats):
        outputs = op(**floats, **ids)
        terms = [jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in outputs]
        return sum(terms), outputs

    (_, outputs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    return jax.device_get((outputs, grads))


@pytest.mark.parametrize("rows, heads", [(4, 2), (4, 3), (3, 2)], ids=["both", "rows", "heads"])
def test_parts_make_the_whole(rows, heads):
    """Rows or heads that do not divide are kept whole, and their gradients are not added up."""
    given = arrays(rows, heads)
    want = value_and_grads(rule, given)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 1, 2))):
        got = value_and_grads(per_device(rule, _RULE_AXES, (_HEADS, _STATE)), given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)


def test_parts_of_a_step_make_the_whole():
    given = {n: x if n == "initial_state" else x[:, 0] for n, x in arrays(4, 2).items()}
    given = given | {"state": given.pop("initial_state")}
    del given["segment_ids"]
    want = gated_delta_step(**given)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 1, 2))):
        step = per_device(gated_delta_step, _STEP_AXES, (_STEP_AXES["q"], _STATE))
        got = jax.jit(step)(**given)
    assert got[1].sharding.spec[:2] == (("data", "fsdp"), "model")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), got, want)


def test_every_device_sees_its_part_alone():
    """An op that XLA could not split sees the local shapes; the rest of the program sees all."""
    seen = []

    def op(q, segment_ids):
        seen.append((q.shape, segment_ids.shape, device_kind()))
        return (2 * q,)

    given = {name: x for name, x in arrays(4, 6).items() if name in ("q", "segment_ids")}
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 1, 2))):
        (out,) = jax.jit(per_device(op, _RULE_AXES, (_HEADS,)))(**given)
    assert seen == [((1, T, 3, H), (1, T), "cpu")]
    np.testing.assert_array_equal(out, 2 * given["q"])
    assert out.sharding.spec == jax.P(("data", "fsdp"), None, "model")


def test_one_device_is_left_alone_and_known():
    def op(q):
        seen.append((q.shape, device_kind()))
        return (q,)

    seen, q = [], jnp.zeros((4, T, 2, H))
    per_device(op, _RULE_AXES, (_HEADS,))(q=q)
    with jax.set_mesh(one_device()):
        jax.jit(per_device(op, _RULE_AXES, (_HEADS,)))(q=q)
    assert seen == [(q.shape, None), (q.shape, "cpu")]


@pytest.mark.parametrize("heads, local", [((6, 2), (3, 1)), ((6, 3), (6, 3)), ((3, 3), (3, 3))])
def test_query_heads_stay_with_their_key_heads(heads, local):
    """Both are split or none is; a share of the query heads would count to the wrong keys."""
    rng = np.random.default_rng(0)
    sizes = dict(zip("qkv", (heads[0], heads[1], heads[1]), strict=True))
    given = {n: jnp.asarray(rng.normal(size=(4, T, s, H)), jnp.float32) for n, s in sizes.items()}
    seen = []

    def op(**arrays):
        seen.append((arrays["q"].shape[2], arrays["k"].shape[2]))
        return (attention(**arrays),)

    want = value_and_grads(op, given)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 1, 2))):
        got = value_and_grads(per_device(op, _AXES, (_AXES["q"],)), given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)
    assert seen[-1] == local


@pytest.mark.parametrize(
    "kv_heads, local", [(4, (2, 1)), (2, (2, 2)), (8, (2, 2))], ids=["groups", "spread", "own"]
)
def test_query_heads_are_split_also_where_their_keys_are_not(kv_heads, local, monkeypatch):
    """Keys that do not divide are copied to their query heads; else every device would do all."""
    cfg = replace(CFG, num_layers=1, num_heads=8, num_kv_heads=kv_heads, head_dim=8)
    heads = FullHeads(
        cfg, HydraConfig.teacher(), HeadPlan.all_full(1, 8, kv_heads).layer(0), 0,
        KernelConfig(), nnx.Rngs(0),
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 6, cfg.width))
    run = nnx.jit(lambda heads, x: heads(x, sequence(x), None))
    want, seen = run(heads, x), []
    inner = attention_module.attention

    def watched(q, k, v, **rest):
        seen.append((q.shape[2], k.shape[2]))
        return inner(q, k, v, **rest)

    monkeypatch.setattr(attention_module, "attention", watched)
    with jax.set_mesh(make_mesh(MeshConfig(1, 2, 1, 4))):
        got = nnx.jit(lambda heads, x: heads(x, sequence(x), None))(heads, x)
    assert seen == [local]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def sequence(x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    cos, sin = rope_tables(CFG.rope, 8, positions)
    return Sequence(positions, None, cos, sin, True)
