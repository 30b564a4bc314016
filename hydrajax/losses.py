"""Losses of the stages. Every loss returns (sum, count): the host or the step divides, once.

The vocabulary never meets a whole sequence: cross entropy and KL walk over chunks of tokens (16K
tokens x 49K words would be 3.2 GB) and take each chunk's gradients while its logits are there.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from hydrajax.model import Model
from hydrajax.sharding import devices_of
from hydrajax.typing import Array, Float, Int


def next_tokens(batch: dict[str, Array]) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Targets and their weights: 0 at document ends, on padding and where loss_mask says so."""
    tokens, segments = batch["tokens"], batch["segment_ids"]
    targets = jnp.roll(tokens, -1, axis=1)
    same = (segments == jnp.roll(segments, -1, axis=1)) & (segments > 0)
    weights = jnp.where(same, jnp.roll(batch["loss_mask"], -1, axis=1), 0.0)
    return targets, weights.at[:, -1].set(0.0)


def chunked_ce(
    model: Model, x: Float[Array, "B T D"], targets: Array, weights: Array, chunk: int
) -> tuple[Array, Array]:
    """Weighted cross entropy in nats: (sum, sum of weights)."""

    def nats(x_BtD, targets_Bt, weights_Bt):
        logits = model.logits(x_BtD)
        picked = jnp.take_along_axis(logits, targets_Bt[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_Bt * (jax.nn.logsumexp(logits, axis=-1) - picked))

    return sum_over_chunks(nats, (x, targets, weights), chunk), jnp.sum(weights)


def chunked_kl(
    student: Model,
    teacher: Model,
    hidden: tuple[Float[Array, "B T D"], Float[Array, "B T D"]],
    weights: Float[Array, "B T"],
    chunk: int,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Forward KL(teacher || student) over the whole vocabulary, in nats, times temperature^2."""

    def nats(xs_BtD, xt_BtD, weights_Bt):
        log_q = jax.nn.log_softmax(student.logits(xs_BtD) / temperature)
        # Stopped here: gradients are taken of all that this closes over, the teacher's words too.
        logits = jax.lax.stop_gradient(teacher.logits(xt_BtD))
        log_p = jax.nn.log_softmax(logits / temperature)
        return jnp.sum(weights_Bt * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    xs, xt = hidden
    total = sum_over_chunks(nats, (xs, jax.lax.stop_gradient(xt), weights), chunk)
    return total * temperature**2, jnp.sum(weights)


def alignment(
    y: Float[Array, "B T D"], target: Float[Array, "B T D"], weights: Float[Array, "B T"]
) -> dict[str, Array]:
    """Sums over tokens of one layer: squared error, target power (both means over D), cosine."""
    y, target = y.astype(jnp.float32), jax.lax.stop_gradient(target.astype(jnp.float32))
    error = jnp.mean(jnp.square(y - target), axis=-1)
    power = jnp.mean(jnp.square(target), axis=-1)
    norms = jnp.sqrt(jnp.sum(y * y, axis=-1) * jnp.sum(target * target, axis=-1))
    cosine = jnp.sum(y * target, axis=-1) / jnp.maximum(norms, 1e-12)
    return {
        "error": jnp.sum(weights * error),
        "power": jnp.sum(weights * power),
        "cosine": jnp.sum(weights * jax.lax.stop_gradient(cosine)),
    }


def branch_stats(
    branches: tuple[tuple | None, tuple | None], weights: Float[Array, "B T"]
) -> dict[str, Array]:
    """Sums over tokens, for the log: mean square of each branch's outputs, mean of its gate z.

    In deep layers GDN outputs outgrow FA outputs (6.2x in RMS, HydraHead §1.4): watch the ratio.
    """
    out = {}
    for name, branch in zip(("fa", "la"), branches, strict=True):
        if branch is None:
            continue
        o, z = (None if a is None else a.astype(jnp.float32) for a in branch)
        out[f"power_{name}"] = jnp.sum(weights * jnp.mean(o * o, axis=(2, 3)))
        if z is not None:
            out[f"z_{name}"] = jnp.sum(weights * jnp.mean(z, axis=(2, 3)))
    return jax.lax.stop_gradient(out)


def sum_over_chunks(fn: Callable[..., Array], arrays: tuple[Array, ...], chunk: int) -> Array:
    """Sum of fn over pieces of the token axis, about `chunk` tokens of all rows at a time.

    Gradients flow to arrays[0] and to what fn closes over (the unembedding); the other arrays are
    data. Rows and tokens stay where they are sharded: every device has a share of each piece.
    """
    batch, length = arrays[0].shape[:2]
    devices = devices_of("tokens")
    shares = 1 if length % devices else devices
    own, most = length // shares, max(1, chunk // (batch * shares))
    piece = next(t for t in range(min(own, most), 0, -1) if own % t == 0)

    def pieces(x: Array) -> Array:
        x = jnp.moveaxis(x.reshape(batch, shares, own // piece, piece, *x.shape[2:]), 2, 0)
        return x.reshape(own // piece, batch, shares * piece, *x.shape[4:])

    x, *data = map(pieces, arrays)
    fn, weights = jax.closure_convert(fn, *(a[0] for a in (x, *data)))
    return _sum_over_pieces(fn, x, tuple(data), tuple(weights))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over_pieces(fn: Callable[..., Array], x: Array, data: tuple, weights: tuple) -> Array:
    def body(total: Array, pieces: tuple) -> tuple[Array, None]:
        return total + fn(*pieces, *weights), None

    return jax.lax.scan(body, jnp.zeros((), jnp.float32), (x, *data))[0]


def _sum_and_gradients(fn, x: Array, data: tuple, weights: tuple):
    """Gradients now, not in the backward pass: that would compute all logits once more."""

    def body(carry: tuple, pieces: tuple) -> tuple[tuple, Array]:
        total, by_weights = carry
        at = lambda x, weights: fn(x, *pieces[1:], *weights)  # noqa: E731
        value, (by_x, more) = jax.value_and_grad(at, argnums=(0, 1))(pieces[0], weights)
        return (total + value, jax.tree.map(jnp.add, by_weights, more)), by_x

    start = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, weights)
    (total, by_weights), by_x = jax.lax.scan(body, start, (x, *data))
    return total, (by_x, by_weights)


def _scaled(fn, gradients, cotangent: Array):
    by_x, by_weights = jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradients)
    return by_x, None, by_weights


_sum_over_pieces.defvjp(_sum_and_gradients, _scaled)
