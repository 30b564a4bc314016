"""One suite for every op: outputs and all gradients of an implementation against float64.

An `Op` names the public function and says which arguments stay fp32 beside bf16 ones. The truth is
the `reference` implementation in float64 on the same rounded arguments; the test files compare it
with an independent loop.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers import assert_close


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    call: Callable  # call(spec, implementation, **arrays) -> tuple of outputs
    specs: Mapping
    fp32: tuple[str, ...]
    tolerance: Mapping[str, tuple[float, float]]  # dtype -> of outputs, of gradients
    # (spec, gradient) -> factor on its tolerance, where it is the small rest of terms that cancel
    cancels: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)


def check(op: Op, spec: str, implementation: str, dtype: str) -> None:
    """Compare outputs and gradients with the float64 reference."""
    want = truth(op, spec)
    got = evaluate(op, spec, implementation, draw(op, spec), dtype)
    of_outputs, of_gradients = op.tolerance[dtype]
    assert want.keys() == got.keys()
    for name, value in want.items():
        rel = of_gradients if name.startswith("d_") else of_outputs
        rel *= op.cancels.get((spec, name), 1)
        assert_close(f"{spec} {implementation} {dtype} {name}", value, got[name], rel)


@functools.cache
def truth(op: Op, spec: str) -> dict[str, np.ndarray]:
    return evaluate(op, spec, "reference", draw(op, spec), "float64")


def draw(op: Op, spec: str, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Arguments whose values are exact in bf16, so that all dtypes are given the same ones."""
    arrays = op.specs[spec].arrays(np.random.default_rng(zlib.crc32(spec.encode())))
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return {name: _cast(op, name, _round(x), dtype) for name, x in arrays.items()}


def evaluate(op: Op, spec: str, implementation: str, arrays, dtype: str) -> dict[str, np.ndarray]:
    """Run forward and backward; outputs are out_<n>, gradients d_<argument>."""
    x64 = dtype == "float64"
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"):
        arrays = {name: jnp.asarray(_cast(op, name, x, dtype)) for name, x in arrays.items()}
        floats = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        others = {n: x for n, x in arrays.items() if n not in floats}
        outputs, gradients = _value_and_vjp(op.call, op.specs[spec], implementation, floats, others)
    named = {f"out_{i}": x for i, x in enumerate(outputs)}
    named |= {f"d_{name}": x for name, x in gradients.items()}
    return {name: np.asarray(x).astype(np.float64) for name, x in named.items()}


# Compiling is nearly all the time these tests take on a CPU.
_COMPILER = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


jit = functools.partial(jax.jit, compiler_options=_COMPILER)


@functools.partial(jit, static_argnums=(0, 1, 2))
def _value_and_vjp(call, spec, implementation, floats, others):
    outputs, vjp = jax.vjp(lambda x: call(spec, implementation, **x, **others), floats)
    rng = np.random.default_rng(7)
    # Every output gets a cotangent, rounded to bf16 so that all dtypes are given the same one.
    cotangents = [rng.standard_normal(x.shape).astype(jnp.bfloat16) for x in outputs]
    cotangents = tuple(jnp.asarray(c, x.dtype) for c, x in zip(cotangents, outputs, strict=True))
    return outputs, vjp(cotangents)[0]


def _round(x):
    floating = np.issubdtype(x.dtype, np.floating)
    return x.astype(jnp.bfloat16).astype(np.float64) if floating else x


def _cast(op: Op, name: str, x, dtype: str):
    if not np.issubdtype(x.dtype, np.floating):
        return x
    if name in op.fp32 and dtype == "bfloat16":
        dtype = "float32"
    return np.asarray(x).astype(jnp.dtype(dtype))


def shapes_in(jaxpr):
    """Yield the shape of every value in a jaxpr and in those nested in it."""
    for equation in jaxpr.eqns:
        for value in equation.outvars:
            yield tuple(getattr(value.aval, "shape", ()))
        for nested in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            nested = getattr(nested, "jaxpr", nested)
            if hasattr(nested, "eqns"):
                yield from shapes_in(nested)
