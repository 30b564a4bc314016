"""The calls that are measured: their arguments, programs, exact results, FLOPs and bytes.

FLOPs and bytes are those the algorithm cannot do without, not those an implementation spends:

    per token and head       FLOPs             bytes
    forward                  8 C d + 6 d^2     q, k, v, o, g, beta
    forward with residuals   the same          and k, g, beta again, X through memory, the states
    backward                 20 C d + 14 d^2   q, k, v, dO, X, the states in, all gradients out

    B batch   T tokens   R heads   d = H = E dims   C = 64 rows of a chunk   X the chunks' inverses
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_delta_rule import api

__all__ = [
    "ARGUMENTS",
    "GATES",
    "INPUTS",
    "draw",
    "errors",
    "exact",
    "flops",
    "named",
    "parts",
    "programs",
    "traffic",
]

ARGUMENTS = ("q", "k", "v", "g", "beta")
GATES = {"strong": 0.2, "slow": 0.002}  # largest decay of one token
INPUTS = (*GATES, "correlated", "repeated")  # the latter two of keys, with strong gates
CHUNK = 64


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw(dims: tuple[int, int, int, int], inputs: str, seed: int = 0) -> dict[str, jax.Array]:
    """Arguments of one call and dO, from (B, T, R, d), made where they are used."""
    kq, kk, kv, kg, kb, kd, ks = jax.random.split(jax.random.key(seed), 7)
    shared = jax.random.normal(ks, (dims[0], 1, *dims[2:]))
    weight = {"correlated": 0.9, "repeated": 1.0}.get(inputs, 0.0)
    wide = {
        "q": _unit(jax.random.normal(kq, dims)),
        "k": _unit(weight**0.5 * shared + (1 - weight) ** 0.5 * jax.random.normal(kk, dims)),
        "v": jax.random.normal(kv, dims),
        "do": jax.random.normal(kd, dims),
    }
    wide = {name: x.astype(jnp.bfloat16) for name, x in wide.items()}
    decay = GATES.get(inputs, GATES["strong"])
    return wide | {
        "g": -jax.random.uniform(kg, dims[:3], maxval=decay),
        "beta": jax.random.uniform(kb, dims[:3]),
    }


def programs(name: str, dims: tuple[int, int, int, int]) -> dict[str, Callable]:
    """What compiles forward without and with what the backward needs, and both, of one of ours."""
    B, _, R, d = dims
    wide, gate = jax.ShapeDtypeStruct(dims, jnp.bfloat16), jax.ShapeDtypeStruct(dims[:3], "float32")
    operands = (wide, wide, wide, gate, gate)

    def plain(*x):
        return api.gated_delta_rule(*x, implementation=name)

    def both(*x):
        *x, do = x
        (o, state), vjp = jax.vjp(plain, *x)
        return o, vjp((do, jnp.zeros_like(state)))

    found = {"fwd": (plain, operands), "fwdbwd": (both, (*operands, wide))}
    if api.IMPLEMENTATIONS[name].forward is not None:
        params = api.GatedDeltaParams(
            d**-0.5, api.GatedDeltaConfig(chunk=64), dims, dims, jnp.dtype(jnp.bfloat16), True
        )
        forward = functools.partial(api.IMPLEMENTATIONS[name].forward, params)

        def kept(q, k, v, g, beta):
            api.IMPLEMENTATIONS[name].check(params)
            return forward(q, k, v, g, beta, None, jnp.zeros((B, R, d, d)))

        found["fwd_residuals"] = (kept, operands)
    return {what: functools.partial(_compile, f, x) for what, (f, x) in found.items()}


def _compile(function, operands) -> jax.stages.Compiled:
    return jax.jit(function).lower(*operands).compile()


def exact(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Output and gradients of the token loop in float64."""
    host = {name: np.asarray(x).astype(np.float64) for name, x in arrays.items()}
    with jax.enable_x64(True):
        return named(*_token_loop(host["do"], *(host[name] for name in ARGUMENTS)))


@jax.jit
def _token_loop(do, *operands):
    def rule(*x):
        return api.gated_delta_rule(*x, implementation="reference")[0]

    o, vjp = jax.vjp(rule, *operands)
    return o, vjp(do)


def named(o, gradients) -> dict[str, np.ndarray]:
    """Name o and the gradients of `ARGUMENTS`, on the host in float64."""
    found = {"o": o} | {f"d{n}": x for n, x in zip(ARGUMENTS, gradients, strict=True)}
    return {name: np.asarray(x).astype(np.float64) for name, x in found.items()}


def errors(want: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """RMS of the error by RMS of the truth, of every array."""

    def relative(x, y):
        return float(f"{np.sqrt(np.mean((y - x) ** 2) / np.mean(x**2)):.3g}")

    return {name: relative(want[name], got[name]) for name in want}


def flops(what: str, dims: tuple[int, int, int, int]) -> float:
    """Floating-point operations of `fwd`, `fwd_residuals` or `fwdbwd`."""
    B, T, R, d = dims
    forward, backward = 8 * CHUNK * d + 6 * d**2, 20 * CHUNK * d + 14 * d**2
    return B * T * R * (forward + backward * (what == "fwdbwd"))


def traffic(what: str, dims: tuple[int, int, int, int]) -> float:
    """Bytes that have to move: bf16 tensors, X and states, fp32 gates."""
    B, T, R, d = dims
    inverse, states, gates = 2 * CHUNK, 2 * d**2 / CHUNK, 8
    moved = 4 * 2 * d + gates
    if what != "fwd":
        moved += 2 * d + 2 * gates + 2 * inverse + states
    if what == "fwdbwd":
        moved += 7 * 2 * d + 2 * gates + inverse + states
    return B * T * R * moved


def parts(dims: tuple[int, int, int, int]) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes of the Hopper kernels of `fwdbwd`, by how their names begin.

    Bytes are of what each has to read and write; P is computed in three of them.
    """
    B, T, R, d = dims
    square, pairs = d**2, CHUNK * d
    wide, gates, inverse, state = 2 * d, 4, 2 * CHUNK, 2 * d**2 / CHUNK
    of = {
        "gdn_prepare": (2 * pairs, wide + 2 * gates + inverse),
        "gdn_recurrence": (6 * pairs + 6 * square, 4 * wide + 2 * gates + inverse + state),
        "gdn_sweep": (6 * pairs + 6 * square, 4 * wide + 2 * gates + inverse + state),
        "gdn_gradients": (
            16 * pairs + 8 * square,
            8 * wide + 4 * gates + inverse + 2 * state,
        ),
    }
    return {name: (B * T * R * work, B * T * R * moved) for name, (work, moved) in of.items()}


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True))
