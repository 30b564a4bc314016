"""Compile the Triton kernels for GPUs that are not there, and read what ptxas says about them."""

import contextlib
import importlib
import io
import re
import tempfile

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gated_delta_rule import api, triton_gpu, triton_gpu_backward
from tests.kernels.triton_interpreter import LAUNCHING, PACKAGE, TYPES

# Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


def calls(dtype: str, dim: int) -> dict[str, tuple]:
    """Kernel name -> what `launch` is given in a forward, a backward and a step."""
    found, shape = {}, jax.ShapeDtypeStruct

    def record(kernel, operands, outputs, grid, **constants):
        del grid
        arrays = outputs if isinstance(outputs, tuple) else (outputs,)
        types = [_type(x) for x in (*operands, *arrays)]
        found[kernel.__name__] = kernel, types, constants
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

    wide, gate = shape((1, 64, 1, dim), dtype), shape((1, 64, 1), jnp.float32)
    state = shape((1, 1, dim, dim), jnp.float32)
    params = api.GatedDeltaParams(
        dim**-0.5, api.GatedDeltaConfig(64), wide.shape, wide.shape, jnp.dtype(dtype), True
    )

    def run(q, k, v, g, beta, state):
        operands = q, k, v, g, beta, None, state
        o, state, *residuals = triton_gpu.forward(params, *operands)
        triton_gpu_backward.backward(params, *operands, *residuals, o, state)
        advance = importlib.import_module(f"{PACKAGE}.triton_gpu_step_kernel").advance
        advance(1.0, *(x[:, 0] for x in operands[:5]), state)

    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHING:
            module = importlib.import_module(f"{PACKAGE}.triton_gpu_{name}")
            patch.setattr(module, "launch", record)
        jax.eval_shape(run, wide, wide, wide, gate, gate, state)
    return found


def _type(x) -> str:
    return "i32" if isinstance(x, int) else "*" + TYPES[x.dtype.name]


def resources(kernel, types, constants, capability: int) -> tuple[int, int]:
    """Bytes of spills, bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget

    constants = {n: x for n, x in constants.items() if n != "aliases"}
    options = {"num_warps": constants.pop("warps"), "num_stages": constants.pop("stages", 1)}
    signature = dict(zip(kernel.arg_names, types, strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    # As jax-triton has it: arrays start at multiples of 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(types) if x[0] == "*"}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), _ptxas_log(triton):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said.getvalue())
    assert len(spills) == 2, said.getvalue()
    return sum(map(int, spills)), made.metadata.shared


@contextlib.contextmanager
def _ptxas_log(triton):
    """Have ptxas print what it found, and let no cache keep it from running or be written to."""
    knobs = triton.knobs
    with contextlib.ExitStack() as stack:
        for part in (knobs.nvidia, knobs.compilation, knobs.cache):
            stack.enter_context(part.scope())
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        yield
