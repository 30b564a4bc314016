"""The Triton kernels without a GPU: interpreted against float64, compiled for four, declined."""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import GatedDeltaConfig, gated_delta_rule, gated_delta_step
from pallas_kernels.gated_delta_rule import triton_gpu, triton_gpu_launch
from pallas_kernels.gated_delta_rule.arg_specs import GatedDeltaArgs
from tests.helpers import assert_close
from tests.kernels import op_suite, triton_aot
from tests.kernels.test_gated_delta_rule import OP
from tests.kernels.triton_interpreter import worker

TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)

# Borders inside chunks and on them, a document of one token, an id that comes back.
_DOCUMENTS = ((1, 3), (2, 1), (1, 60), (0, 40), (1, 6))

SPECS = {
    "random": GatedDeltaArgs(shape=(1, 130, 1, 1, 64, 64)),
    "one_token": GatedDeltaArgs(shape=(2, 1, 1, 1, 64, 64), initial_state=True),
    "grouped": GatedDeltaArgs(shape=(1, 70, 2, 4, 64, 64), initial_state=True),
    "correlated": GatedDeltaArgs(
        shape=(2, 70, 1, 1, 64, 64), keys="correlated", beta=(0.98,), initial_state=True
    ),
    "repeated": GatedDeltaArgs(
        shape=(1, 128, 1, 1, 64, 64), keys="repeated", beta=(0.9, 0.98), gate=(0.0, -0.1)
    ),
    "strong_decay": GatedDeltaArgs(
        shape=(1, 100, 1, 1, 64, 128), gate=(-40.0, -0.1), initial_state=True
    ),
    "documents": GatedDeltaArgs(
        shape=(1, 110, 1, 2, 128, 128), documents=_DOCUMENTS, initial_state=True, beta=(0.0, 1.0)
    ),
    "narrow": GatedDeltaArgs(shape=(1, 65, 1, 1, 128, 64), keys="correlated", initial_state=True),
}
# One key alone, and hardly any decay: little is left of dg, and in bf16 of dbeta.
TRITON_OP = dataclasses.replace(
    OP, specs=SPECS, cancels={("repeated", "d_g"): 100, ("repeated", "d_beta"): 5}
)


@pytest.fixture(scope="module")
def interpreter():
    with worker() as pool:
        yield pool


def check(spec, dtype):
    op_suite.check(TRITON_OP, spec, "triton_gpu", dtype)


@TRITON
@pytest.mark.parametrize(
    "spec, dtype",
    [
        *((spec, "float32") for spec in SPECS),
        *((spec, "bfloat16") for spec in ("random", "grouped", "repeated", "documents")),
    ],
)
def test_interpreted(spec, dtype, interpreter):
    """Outputs and all gradients of the op equal those of the token loop in float64."""
    interpreter.submit(check, spec, dtype).result()


def token(H, E, dtype):
    rng = np.random.default_rng(0)
    B, K, R = 2, 1, 2
    q, k = (rng.normal(size=(B, K, H)) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    wide = (jnp.asarray(x, dtype) for x in (q, k, rng.normal(size=(B, R, E))))
    g = -rng.choice([0.0, 0.3, 40.0], (B, R))
    rest = g, rng.choice([0.0, 0.7, 1.0], (B, R)), rng.normal(size=(B, R, H, E))
    return *wide, *(jnp.asarray(x, jnp.float32) for x in rest)


def two_steps(implementation, *operands):
    *inputs, state = operands
    _, state = gated_delta_step(*inputs, state, implementation=implementation)
    return gated_delta_step(*inputs, state, implementation=implementation)


def check_steps(H, E, dtype, rel):
    operands = token(H, E, dtype)
    with jax.enable_x64(True):
        want = two_steps("reference", *(jnp.asarray(np.float64(x)) for x in operands))
    got = two_steps("triton_gpu", *operands)
    assert_close("o", want[0], got[0], rel)
    assert_close("state", want[1], got[1], 1e-6)


@TRITON
@pytest.mark.parametrize(
    "H, E, dtype, rel", [(64, 64, "bfloat16", 2e-3), (128, 64, "float32", 1e-6)]
)
def test_steps_interpreted(H, E, dtype, rel, interpreter):
    interpreter.submit(check_steps, H, E, dtype, rel).result()


@TRITON
@pytest.mark.aot_gpu
@pytest.mark.parametrize(
    "dtype, dim, capability",
    [
        *(("bfloat16", dim, capability) for dim in (64, 128) for capability in (80, 86, 89)),
        ("bfloat16", 128, 90),
        ("float32", 64, 86),
        ("float32", 128, 86),
    ],
)
def test_compiled(dtype, dim, capability):
    """All kernels fit into the chip; in bf16 nothing spills, in fp32 less than a cache line."""
    for name, call in triton_aot.calls(dtype, dim).items():
        spilled, shared = triton_aot.resources(*call, capability)
        assert spilled <= (0 if dtype == "bfloat16" else 128), (name, spilled)
        assert shared <= triton_aot.SHARED_MEMORY[capability], (name, shared)


@TRITON
@pytest.mark.aot_gpu
def test_compiled_with_exact_products():
    """Products of fp32 as good as fp32 take more registers, and fit."""
    with jax.default_matmul_precision("highest"):
        calls = triton_aot.calls("float32", 128)
    assert calls["gdn_sweep"][2]["HOW"] == "tf32x3"
    for name, call in calls.items():
        spilled, shared = triton_aot.resources(*call, 86)
        assert spilled <= 1024 and shared <= triton_aot.SHARED_MEMORY[86], (name, spilled, shared)


def shapes(K=1, R=2, H=64, E=64, dtype=jnp.bfloat16):
    B, T = 1, 70
    made = {"q": (B, T, K, H), "k": (B, T, K, H), "v": (B, T, R, E)}
    made = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in made.items()}
    gate = jax.ShapeDtypeStruct((B, T, R), jnp.float32)
    return made | {"g": gate, "beta": gate}


def traced(function, operands, kind, implementation=None):
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 108, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(operands)


def gradients(operands):
    def loss(x):
        o, state = gated_delta_rule(**x)
        return o.astype(jnp.float32).sum() + state.sum()

    return jax.value_and_grad(loss)(operands)


def jax_triton_or_skip():
    try:
        triton_gpu_launch.jax_triton()
    except NotImplementedError as reason:
        pytest.skip(str(reason))


KINDS = {"NVIDIA A100-SXM4-40GB": True, "NVIDIA L4": True, "NVIDIA H100 80GB HBM3": False}


@pytest.mark.parametrize("kind, taken", KINDS.items())
def test_the_device_of_the_mesh_decides(kind, taken):
    """It is taken by the table for an Ampere or Ada mesh alone, and lowered for CUDA alone."""
    jax_triton_or_skip()
    found = traced(gradients, shapes(), kind)
    assert ("triton_kernel_call" in str(found.jaxpr)) == taken
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice(kind, 108, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert "triton_kernel_call" not in found.lower(lowering_platforms=("cpu",)).as_text()
        if taken:
            text = found.lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("@triton_kernel_call") == 7


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB"])
def test_the_step_of_the_mesh_is_taken(kind):
    """And it updates a donated state where it lies."""
    jax_triton_or_skip()
    x = {name: jax.ShapeDtypeStruct((2, *s.shape[2:]), s.dtype) for name, s in shapes().items()}
    x["state"] = jax.ShapeDtypeStruct((2, 2, 64, 64), jnp.float32)
    text = str(traced(lambda x: gated_delta_step(**x), x, kind).jaxpr)
    assert "gdn_step" in text and "input_output_aliases=((5, 1),)" in text


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dtype": jnp.float16}, "takes bfloat16, float32, got float16"),
        ({"H": 96}, r"needs key and value dims in \(64, 128\), got \(96, 64\)"),
        ({"chunk": 32}, "needs chunks of 64, got 32"),
    ],
)
def test_declines(changes, words):
    config = GatedDeltaConfig(chunk=changes.pop("chunk", 64))
    with pytest.raises(NotImplementedError, match=f"^triton_gpu: {words}"):
        jax.eval_shape(
            lambda x: gated_delta_rule(**x, config=config, implementation="triton_gpu"),
            shapes(**changes),
        )


def test_declines_without_jax_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    words = "triton_gpu: needs jax-triton beside a CUDA build of jax, got .*jax_triton.*"
    for function in (gated_delta_rule, gated_delta_step):
        x = shapes()
        if function is gated_delta_step:
            x = {n: jax.ShapeDtypeStruct((2, *s.shape[2:]), s.dtype) for n, s in x.items()}
            x["state"] = jax.ShapeDtypeStruct((2, 2, 64, 64), jnp.float32)
        with pytest.raises(NotImplementedError, match=words):
            jax.eval_shape(lambda x, f=function: f(**x, implementation="triton_gpu"), x)


@pytest.mark.parametrize(
    "kind, capability",
    [
        ("NVIDIA A100 80GB PCIe", 80),
        ("NVIDIA A10G", 86),
        ("NVIDIA RTX A6000", 86),
        ("NVIDIA GeForce RTX 3090 Ti", 86),
        ("NVIDIA L40S", 89),
        ("NVIDIA RTX 6000 Ada Generation", 89),
        ("NVIDIA GeForce RTX 4090", 89),
    ],
)
def test_takes_ampere_and_ada(kind, capability):
    assert triton_gpu_launch.capability(kind) == capability
    triton_gpu.check_device(kind)


@pytest.mark.parametrize("kind", [None, "cpu", "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB"])
def test_declines_other_devices(kind):
    words = rf"^triton_gpu: runs by default on Ampere and Ada .*, got {kind}$"
    with pytest.raises(NotImplementedError, match=words):
        triton_gpu.check_device(kind)
