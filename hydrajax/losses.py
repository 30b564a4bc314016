"""Losses of the stages. Every loss returns (sum, count): the host or the step divides, once.

The vocabulary never meets a whole sequence: cross entropy and KL walk over chunks of tokens (16K
tokens x 49K words would be 3.2 GB) and take each chunk's gradients while its logits are there.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hydrajax.model import Model
from hydrajax.sharding import Split, split_of
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
    to_logits, words = model.unembedding()

    def nats(words, _, x_BtD, targets_Bt, weights_Bt):
        logits = to_logits(words, x_BtD)
        picked = jnp.take_along_axis(logits, targets_Bt[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_Bt * (jax.nn.logsumexp(logits, axis=-1) - picked))

    total = sum_over_chunks(nats, words, (x, targets, weights), chunk)
    return total, jnp.sum(weights)


def chunked_kl(
    student: Model,
    teacher: Model,
    hidden: tuple[Float[Array, "B T D"], Float[Array, "B T D"]],
    weights: Float[Array, "B T"],
    chunk: int,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Forward KL(teacher || student) over the whole vocabulary, in nats, times temperature^2."""
    (of_student, words), (of_teacher, given) = student.unembedding(), teacher.unembedding()

    def nats(words, given, xs_BtD, xt_BtD, weights_Bt):
        log_q = jax.nn.log_softmax(of_student(words, xs_BtD) / temperature)
        log_p = jax.nn.log_softmax(of_teacher(given, xt_BtD) / temperature)
        return jnp.sum(weights_Bt * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    xs, xt = hidden
    data = xs, *jax.lax.stop_gradient((xt, weights))
    total = sum_over_chunks(nats, words, data, chunk, jax.lax.stop_gradient(given))
    return total * temperature**2, jnp.sum(weights)


def cached_kl(
    student: Model,
    x: Float[Array, "B T D"],
    kept: tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T"]],
    weights: Float[Array, "B T"],
    chunk: int,
    temperature: float = 1.0,
) -> tuple[Array, Array]:
    """Forward KL over a teacher's k best words and one bucket of all others, times temperature^2.

    With p of the teacher and q of the student, both at the temperature, K the kept words, and r
    and s what p and q leave to the others:

        sum_K p_i ln(p_i / q_i) + r ln(r / s),    r = 1 - sum_K p_i,    s = 1 - sum_K q_i

    To lump words together never raises a KL, so this is at most `chunked_kl`, and equal to it when
    K is the vocabulary. Its gradient by the student's logit i over the temperature is q_i - p_i in
    K and q_i (1 - r / s) outside: the others keep their proportions and meet the teacher's sum.

    `kept` is what `best_words` gives: ids, ln p at temperature 1, and ln of the sum over the
    others of p^(1 / temperature), -inf where there are none.
    """
    to_logits, words = student.unembedding()

    def nats(words, _, x_BtD, ids_Btk, log_p_Btk, rest_Bt, weights_Bt):
        log_q_BtV = jax.nn.log_softmax(to_logits(words, x_BtD) / temperature)
        scaled_Btk = log_p_Btk / temperature
        log_z_Bt = jnp.logaddexp(jax.nn.logsumexp(scaled_Btk, axis=-1), rest_Bt)
        # Data are scattered over the vocabulary, so that no backward has to scatter gradients.
        absent = jnp.full(log_q_BtV.shape, -jnp.inf)
        log_p_BtV = _put(absent, ids_Btk, scaled_Btk - log_z_Bt[..., None])
        is_kept = log_p_BtV > -jnp.inf
        each = jnp.exp(log_p_BtV) * jnp.where(is_kept, log_p_BtV - log_q_BtV, 0.0)
        nats_Bt = jnp.sum(each, axis=-1)
        if ids_Btk.shape[-1] < log_q_BtV.shape[-1]:
            # Not 1 - sum_K q: where the student is sure, that is rounding alone.
            log_s = jax.nn.logsumexp(jnp.where(is_kept, -jnp.inf, log_q_BtV), axis=-1)
            log_r = rest_Bt - log_z_Bt
            nats_Bt += jnp.exp(log_r) * (log_r - log_s)
        return jnp.sum(weights_Bt * nats_Bt)

    data = x, *jax.lax.stop_gradient((*kept, weights))
    total = sum_over_chunks(nats, words, data, chunk)
    return total * temperature**2, jnp.sum(weights)


def best_words(
    teacher: Model, x: Float[Array, "B T D"], k: int, temperatures: tuple[float, ...], chunk: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T n"]]:
    """What `cached_kl` needs of a teacher: ids and ln p of its k best words, and what they leave.

    The last array has, for every temperature t, ln of the sum over all other words of p^(1/t): no
    sum at one temperature tells the sum at another. Each device walks over its own tokens.
    """
    to_logits, words = teacher.unembedding()
    split = split_of(("batch", "tokens"), x.shape[:2])
    piece = _piece(split, x.shape[:2], chunk)

    def best(words, x_BtD):
        log_p_BtV = jax.nn.log_softmax(to_logits(words, x_BtD))
        log_p_Btk, ids_Btk = jax.lax.top_k(log_p_BtV, k)
        others = _put(log_p_BtV, ids_Btk, jnp.full_like(log_p_Btk, -jnp.inf))
        rest = [jax.nn.logsumexp(others / t, axis=-1) for t in temperatures]
        return ids_Btk, log_p_Btk, jnp.stack(rest, axis=-1)

    def own(words, shares):
        found = jax.lax.map(lambda pieces: best(words, *pieces), _pieces(piece, shares))
        shape = shares[0].shape[:2]
        return tuple(jnp.moveaxis(a, 0, 1).reshape(*shape, a.shape[-1]) for a in found)

    return split.run(own, (split.parts,) * 3)(words.astype(x.dtype), (x,))


def _put(into: Float[Array, "B T V"], ids: Int[Array, "B T k"], values: Array) -> Array:
    return jnp.put_along_axis(into, ids.astype(jnp.int32), values, axis=-1, inplace=False)


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


def sum_over_chunks(
    fn: Callable[..., Array],
    words: Array,
    arrays: tuple[Array, ...],
    chunk: int,
    given: Array | None = None,
) -> Array:
    """Sum of fn(words, given, *pieces), the pieces of about `chunk` tokens of a device at a time.

    Gradients flow to `words` and arrays[0]; `given` and the other arrays are data. Every device
    walks over its own rows and tokens with all of the words, and what it adds to the sum and to the
    words' gradient meets the others' once, at the end: a reduction for every piece would be most of
    what a pod sends.
    """
    split = split_of(("batch", "tokens"), arrays[0].shape[:2])
    piece = _piece(split, arrays[0].shape[:2], chunk)
    return _sum_over_pieces(fn, piece, split, words, arrays[0], (given, arrays[1:]))


def _piece(split: Split, shape: tuple[int, int], chunk: int) -> int:
    """Tokens of each of a device's rows that make about `chunk` together."""
    rows, tokens = split.share(shape)
    return next(t for t in range(min(tokens, max(1, chunk // rows)), 0, -1) if tokens % t == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum_over_pieces(
    fn: Callable[..., Array], piece: int, split: Split, words: Array, x: Array, data: tuple
) -> Array:
    def own(whole: tuple, shares: tuple) -> Array:
        def body(total: Array, pieces: tuple) -> tuple[Array, None]:
            return total + fn(*whole, *pieces), None

        start = jnp.zeros((), jnp.float32)
        return split.sum(jax.lax.scan(body, start, _pieces(piece, shares))[0])

    given, rest = data
    return split.run(own, P())((words.astype(x.dtype), given), (x, *rest))


def _sum_and_gradients(fn, piece: int, split: Split, words: Array, x: Array, data: tuple):
    """Gradients now, not in the backward pass: that would compute all logits once more."""

    given, rest = data

    def own(whole: tuple, shares: tuple):
        def body(carry: tuple, pieces: tuple) -> tuple[tuple, Array]:
            total, by_words = carry
            at = lambda cast, x: fn(cast, whole[1], x, *pieces[1:])  # noqa: E731
            value, (more, by_x) = jax.value_and_grad(at, argnums=(0, 1))(whole[0], pieces[0])
            return (total + value, by_words + more.astype(words.dtype)), by_x

        start = jnp.zeros((), jnp.float32), jnp.zeros(words.shape, words.dtype)
        sums, by_x = jax.lax.scan(body, start, _pieces(piece, shares))
        total, by_words = map(split.sum, sums)
        return total, by_words, jnp.moveaxis(by_x, 0, 1).reshape(shares[0].shape)

    run = split.run(own, (P(), P(), split.parts))
    # Cast before devices gather the words: half of what is sent.
    total, by_words, by_x = run((words.astype(x.dtype), given), (x, *rest))
    return total, (by_words, by_x)


def _pieces(size: int, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """[B, T, ...] -> [T / size, B, size, ...]"""
    return tuple(jnp.moveaxis(a.reshape(len(a), -1, size, *a.shape[2:]), 1, 0) for a in arrays)


def _scaled(fn, piece, split, gradients: tuple[Array, Array], cotangent: Array):
    by_words, by_x = ((cotangent * g).astype(g.dtype) for g in gradients)
    return by_words, by_x, None


_sum_over_pieces.defvjp(_sum_and_gradients, _scaled)
