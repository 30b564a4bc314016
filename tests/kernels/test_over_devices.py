"""Rows split over a mesh axis: ops on the parts give what they give on the whole, gradients too.

The truth is the float64 reference on whole rows. Tolerances are those of the ops on one device:
in float64 nothing but rounding may differ, in float32 the order of sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import GatedDeltaConfig, attention, causal_conv, gated_delta_rule
from pallas_kernels.attention.arg_specs import AttentionArgs
from pallas_kernels.causal_conv.arg_specs import CausalConvArgs
from pallas_kernels.gated_delta_rule.arg_specs import GatedDeltaArgs
from tests.helpers import assert_close
from tests.kernels import op_suite

AXIS, TOKENS = "context", P(None, "context")
PARTS = (2, 8)
# Of 48 tokens, in parts of 24, 12 and 6: documents that go on over one border and over several,
# some that end at one, one of a single token, ids that come back, the last one behind a border.
DOCUMENTS = ((1, 5), (2, 1), (1, 18), (2, 15), (3, 3), (1, 4), (0, 2))


def split(op, whole: tuple[str, ...], out: tuple[P, ...], implementation: str, arrays):
    """`op` on parts of the arrays, "xla on 4" devices; those in `whole` are the same on all."""
    implementation, _, parts = implementation.partition(" on ")
    devices = jax.devices()[: int(parts)]
    mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return jax.shard_map(
        lambda arrays: op(**arrays, implementation=implementation, axis_name=AXIS),
        mesh=mesh,
        in_specs=({name: P() if name in whole else TOKENS for name in arrays},),
        out_specs=out,
        check_vma=False,
    )(arrays)


def rule(spec, implementation, **arrays):
    op = functools.partial(gated_delta_rule, config=GatedDeltaConfig(chunk=spec.chunk))
    if implementation == "reference":
        return op(**arrays, implementation="reference")
    return split(op, ("initial_state",), (TOKENS, P()), implementation, arrays)


RULE = op_suite.Op(
    call=rule,
    specs={
        "documents": GatedDeltaArgs(
            shape=(2, 48, 1, 2, 16, 8), documents=DOCUMENTS, initial_state=True, chunk=16
        ),
        "one_document": GatedDeltaArgs(
            shape=(1, 48, 2, 2, 16, 16), gate=(0.0, -0.1), initial_state=True, chunk=4
        ),
        "repeated": GatedDeltaArgs(
            shape=(1, 64, 1, 2, 16, 16), keys="repeated", beta=(0.9, 0.98), gate=(0.0, -0.1),
            chunk=16,
        ),
    },
    fp32=("g", "beta", "initial_state"),
    tolerance={"float64": (1e-14, 1e-13), "float32": (1e-6, 3e-6), "bfloat16": (1.2e-2, 1.2e-2)},
    cancels={("repeated", "d_g"): 100},  # see test_gated_delta_rule
)  # fmt: skip


@pytest.mark.parametrize(
    "spec, parts",
    [*(("documents", parts) for parts in (1, 2, 4, 8)), ("one_document", 4), ("repeated", 2)],
)
def test_the_delta_rule(spec, parts):
    op_suite.check(RULE, spec, f"xla on {parts}", "float64")


@pytest.mark.parametrize(
    "implementation, dtype",
    [("reference on 4", "float64"), ("xla on 8", "float32"), ("xla on 4", "bfloat16")],
)
def test_the_delta_rule_of_others_and_in_lower_precision(implementation, dtype):
    op_suite.check(RULE, "documents", implementation, dtype)


def test_a_part_that_starts_a_document_knows_nothing_of_the_left():
    """Not even values near the end of fp32."""
    arrays = op_suite.draw(RULE, "one_document", "float32")
    arrays["segment_ids"] = np.repeat(np.array([[3, 1]], np.int32), 24, axis=1)
    want, want_state = rule(RULE.specs["one_document"], "reference", **arrays)
    arrays["v"][:, :24] = 1e38
    rule_on_parts = op_suite.jit(rule, static_argnums=(0, 1))
    got, state = rule_on_parts(RULE.specs["one_document"], "xla on 4", **arrays)
    assert_close("o", want[:, 24:], got[:, 24:], 1e-6)
    assert_close("state", want_state, state, 1e-6)


@pytest.mark.parametrize("saved, scans", [((), 11), (("gdn_parts",), 8)])
def test_remat_may_keep_the_states_between_parts(saved, scans):
    """Forward: two of the maps, their fold and the part; backward: two sweeps, a fold, and again
    the forward, or without the maps where their results are kept."""
    arrays = op_suite.draw(RULE, "one_document", "float32")
    arrays = {name: jnp.asarray(x) for name, x in arrays.items()}
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    layer = jax.checkpoint(
        lambda x: rule(RULE.specs["one_document"], "xla on 2", **x)[0], policy=policy
    )
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(arrays)
    assert count_scans(jaxpr.jaxpr) == scans


def count_scans(jaxpr) -> int:
    nested = (
        getattr(inner, "jaxpr", inner)
        for equation in jaxpr.eqns
        if equation.primitive.name != "scan"
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        )
    )
    own = sum(equation.primitive.name == "scan" for equation in jaxpr.eqns)
    return own + sum(count_scans(inner) for inner in nested if hasattr(inner, "eqns"))


def attend(spec, implementation, q, k, v, q_ids=None, kv_ids=None, q_offset=None):
    ids = kv_ids if q_ids is None else (q_ids, kv_ids)
    op = functools.partial(attention, causal=spec.causal, window=spec.window)
    arrays = dict(q=q, k=k, v=v, segment_ids=ids, q_offset=q_offset)
    if implementation == "reference":
        return (op(**arrays, implementation="reference"),)
    op = lambda op=op, **arrays: (op(**arrays),)  # noqa: E731
    return split(op, ("q_offset",), (TOKENS,), implementation, arrays)


ATTENTION = op_suite.Op(
    call=attend,
    specs={
        "documents": AttentionArgs(shape=(2, 48, 48, 4, 2, 16), documents=DOCUMENTS),
        "window": AttentionArgs(shape=(1, 48, 48, 2, 2, 16), window=20),
        "pair": AttentionArgs(
            shape=(1, 16, 48, 2, 1, 16), causal=False, documents=DOCUMENTS,
            query_documents=((2, 9), (7, 2), (1, 5)),  # 7 is in no key
        ),
        "cache": AttentionArgs(shape=(2, 8, 48, 4, 2, 16), q_offset=(40, 3)),
    },
    fp32=(),
    tolerance={"float64": (1e-14, 1e-13), "float32": (1e-6, 2e-6)},
)  # fmt: skip


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("spec", ATTENTION.specs)
def test_attention(spec, parts):
    op_suite.check(ATTENTION, spec, f"xla on {parts}", "float64")


def test_attention_in_float32():
    op_suite.check(ATTENTION, "documents", "xla on 8", "float32")


def convolve(spec, implementation, **arrays):
    op = functools.partial(causal_conv, activation=spec.activation)
    if implementation == "reference":
        return op(**arrays, implementation="reference")
    return split(op, ("w", "initial_state"), (TOKENS, P()), implementation, arrays)


CONVOLUTION = op_suite.Op(
    call=convolve,
    specs={
        "documents": CausalConvArgs(
            (2, 48, 4, 12), activation="silu", documents=DOCUMENTS, initial_state=True
        ),
        "plain": CausalConvArgs((2, 24, 4, 12)),  # 8 parts are all halo
    },
    fp32=(),
    tolerance={"float64": (1e-14, 1e-13)},
)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("spec", CONVOLUTION.specs)
def test_the_convolution(spec, parts):
    op_suite.check(CONVOLUTION, spec, f"xla on {parts}", "float64")


def test_parts_shorter_than_the_halo_are_refused():
    arrays = {"x": jnp.ones((1, 16, 3)), "w": jnp.ones((4, 3))}
    with pytest.raises(ValueError, match=r"at least W - 1 = 3 tokens on each device of axis 'con"):
        convolve(CONVOLUTION.specs["plain"], "xla on 8", **arrays)
