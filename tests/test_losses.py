"""Losses: chunked sums against float64 numpy, their gradients, and which tokens count."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import NamedSharding

from hydrajax.config import MeshConfig
from hydrajax.layers import Embedding, Unembedding
from hydrajax.losses import (
    alignment,
    best_words,
    branch_stats,
    cached_kl,
    chunked_ce,
    chunked_kl,
    next_tokens,
    sum_over_chunks,
)
from hydrajax.sharding import make_mesh, spec

B, T, D, V = 3, 12, 8, 20
RNG = np.random.default_rng(0)
X, XT = RNG.standard_normal((2, B, T, D)).astype(np.float32)
W, WT = RNG.standard_normal((2, D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T))
WEIGHTS = RNG.uniform(0, 1, (B, T)).astype(np.float32) * (RNG.uniform(size=(B, T)) < 0.7)


def unembed(w):
    """All that a loss asks of a model."""
    return SimpleNamespace(unembedding=lambda: (lambda w, x: x @ w, w))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def one_hot(targets: np.ndarray) -> np.ndarray:
    return np.eye(V)[targets]


def with_gradients(loss):
    """((sum, count), gradients by x and w), compiled."""
    run = jax.value_and_grad(lambda x, w: loss(x, w), argnums=(0, 1), has_aux=True)
    return jax.jit(run)(X, W)


@pytest.mark.parametrize("layer", [Embedding, Unembedding])
def test_logits_are_fp32_and_their_gradients_products_of_narrow_operands(layer):
    x, words = jnp.bfloat16(X), W.T if layer is Embedding else W
    cotangent = RNG.standard_normal((B, T, V)).astype(np.float32)

    def loss(x, w):
        logits = layer.logits(w, x)
        assert logits.dtype == jnp.float32
        return jnp.sum(logits * cotangent)

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    wide = re.findall(r"f32\[\S+ = dot_general\[", str(jax.make_jaxpr(gradient)(x, words)))
    assert len(wide) == 1  # the logits
    total, (dx, dw) = gradient(x, words)
    exact, w = np.float64(x), np.float64(jnp.bfloat16(W))
    assert_close("logits", np.sum(exact @ w * cotangent), total, 1e-5)
    assert_close("dx", cotangent @ w.T, np.float64(dx), 1e-2)
    want = np.einsum("btd,btv->dv", exact, cotangent)
    assert_close("dw", want.T if layer is Embedding else want, dw, 1e-2)


# 1 and 12 tokens of all rows are less than one position and a third of the positions.
@pytest.mark.parametrize("chunk", [1, 12, 20, 10_000])
def test_cross_entropy_and_its_gradients_equal_float64_at_every_chunk(chunk):
    (total, count), (dx, dw) = with_gradients(
        lambda x, w: chunked_ce(unembed(w), x, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS), chunk)
    )
    x, w, weights = (a.astype(np.float64) for a in (X, W, WEIGHTS))
    log_p = log_softmax(x @ w)
    nats = -np.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0]
    assert float(total) == pytest.approx((weights * nats).sum(), rel=1e-5)
    assert float(count) == pytest.approx(weights.sum(), rel=1e-6)
    by_logits = weights[..., None] * (np.exp(log_p) - one_hot(TARGETS))
    np.testing.assert_allclose(dx, by_logits @ w.T, atol=2e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btv->dv", x, by_logits), atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 12, 10_000])
def test_kl_and_its_gradients_equal_float64_at_every_chunk(chunk, temperature):
    (total, count), (dx, dw) = with_gradients(
        lambda x, w: chunked_kl(
            unembed(w), unembed(WT), (x, XT), jnp.asarray(WEIGHTS), chunk, temperature
        )
    )
    x, w, weights = (a.astype(np.float64) for a in (X, W, WEIGHTS))
    log_q = log_softmax(x @ w / temperature)
    log_p = log_softmax(XT.astype(np.float64) @ WT / temperature)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert float(total) == pytest.approx(temperature**2 * (weights * kl).sum(), rel=1e-5)
    assert float(count) == pytest.approx(weights.sum(), rel=1e-6)
    by_logits = temperature * weights[..., None] * (np.exp(log_q) - np.exp(log_p))
    np.testing.assert_allclose(dx, by_logits @ w.T, atol=2e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btv->dv", x, by_logits), atol=2e-5)


def kept_words(k: int, temperature: float = 1.0, chunk: int = 12):
    """What a cache would hold of the teacher."""
    find = jax.jit(lambda xt: best_words(unembed(WT), xt, k, (7.0, temperature), chunk))
    ids, log_p, rest = find(XT)
    return ids, log_p, rest[..., 1]


def kept_kl(kept, chunk: int = 12, temperature: float = 1.0):
    weights = jnp.asarray(WEIGHTS)
    return with_gradients(lambda x, w: cached_kl(unembed(w), x, kept, weights, chunk, temperature))


@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (12, 2.5), (10_000, 1.0)])
def test_kl_from_all_words_of_a_cache_is_the_teachers_own(chunk, temperature):
    want = with_gradients(
        lambda x, w: chunked_kl(
            unembed(w), unembed(WT), (x, XT), jnp.asarray(WEIGHTS), chunk, temperature
        )
    )
    got = kept_kl(kept_words(V, temperature), chunk, temperature)
    for name, a, b in zip(("sum", "count", "dx", "dw"), *map(jax.tree.leaves, (want, got)),
                          strict=True):  # fmt: skip
        assert_close(name, a, b, 1e-6)


@pytest.mark.parametrize("k, temperature", [(1, 1.0), (3, 2.5), (V - 1, 1.0)])
def test_kl_from_some_words_and_its_gradients_equal_float64(k, temperature):
    (total, count), (dx, dw) = kept_kl(kept_words(k, temperature), 12, temperature)
    x, w, weights = (a.astype(np.float64) for a in (X, W, WEIGHTS))
    p = np.exp(log_softmax(XT.astype(np.float64) @ WT / temperature))
    q = np.exp(log_softmax(x @ w / temperature))
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, np.argsort(-p, axis=-1)[..., :k], True, axis=-1)
    r, s = ((a * ~kept).sum(-1) for a in (p, q))
    kl = (kept * p * np.log(p / q)).sum(-1) + r * np.log(r / s)
    assert float(total) == pytest.approx(temperature**2 * (weights * kl).sum(), rel=1e-5)
    assert float(count) == pytest.approx(weights.sum(), rel=1e-6)
    by_logits = np.where(kept, q - p, q * (1 - (r / s)[..., None]))
    by_logits *= temperature * weights[..., None]
    np.testing.assert_allclose(dx, by_logits @ w.T, atol=2e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btv->dv", x, by_logits), atol=2e-5)


def test_more_words_never_lower_the_kl_and_all_of_them_make_it_whole():
    """Data processing: to lump words together loses what tells the two apart."""
    kls = []
    for k in (1, 2, 7, V):
        run = jax.jit(lambda kept: cached_kl(unembed(W), X, kept, jnp.asarray(WEIGHTS), 12)[0])
        kls.append(float(run(kept_words(k))))
    assert kls[0] > 0 and (np.diff(kls) > -1e-5).all()
    whole = chunked_kl(unembed(W), unembed(WT), (X, XT), jnp.asarray(WEIGHTS), 12)[0]
    assert kls[0] < kls[-1] == pytest.approx(float(whole), rel=1e-6)


def test_a_student_without_doubt_gets_a_finite_gradient_from_a_cache():
    """It leaves e^-200 to the others: 1 - sum q would be zero, and its logarithm no number."""
    sure = np.zeros((B, T, D), np.float32)
    sure[..., 0] = 1.0
    w = np.zeros((D, V), np.float32)
    w[0, 3] = 200.0
    kept = jnp.full((B, T, 1), 3), jnp.full((B, T, 1), np.log(0.75)), jnp.full((B, T), np.log(0.25))
    run = jax.value_and_grad(lambda x, w: cached_kl(unembed(w), x, kept, jnp.ones((B, T)), 12)[0])
    total, by_x = jax.jit(run)(sure, w)
    each = 0.75 * np.log(0.75) + 0.25 * (np.log(0.25) + 200 - np.log(V - 1))
    assert float(total) == pytest.approx(B * T * each, rel=1e-5)
    np.testing.assert_allclose(by_x[..., 0], 0.25 * 200, rtol=1e-5)  # (q_3 - p_3) w_3


def test_no_gradient_reaches_what_a_cache_holds():
    ids, *kept = kept_words(3)
    loss = lambda kept: cached_kl(unembed(W), X, (ids, *kept), WEIGHTS, 12)[0]  # noqa: E731
    for gradient in jax.jit(jax.grad(loss))(tuple(kept)):
        np.testing.assert_array_equal(gradient, 0)


def test_a_student_that_is_the_teacher_has_no_kl_and_no_gradient():
    (total, _), gradients = with_gradients(
        lambda x, w: chunked_kl(unembed(w), unembed(W), (x, X), jnp.asarray(WEIGHTS), 12)
    )
    assert float(total) == pytest.approx(0, abs=1e-5)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_no_gradient_reaches_the_teachers_hidden_states():
    loss = lambda xt: chunked_kl(unembed(W), unembed(WT), (X, xt), WEIGHTS, 12)[0]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(XT), 0)


def test_chunks_cover_every_token_once_for_lengths_without_small_divisors():
    seen = []

    def count(words, given, x):
        seen.append(x.shape)
        return jnp.sum(words * x)

    x = jnp.ones((2, 13))  # prime: pieces are single positions or the whole row
    assert float(sum_over_chunks(count, jnp.ones(()), (x,), 8)) == 26
    assert float(sum_over_chunks(count, jnp.ones(()), (x,), 26)) == 26
    assert set(seen) == {(2, 1), (2, 13)}


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 2, 4, 1)])
def test_devices_walk_over_their_own_tokens_and_meet_once(sizes):
    """Equal to one device, and as many collectives for eight pieces as for one."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, 32, D)).astype(np.float32)
    targets, weights = rng.integers(0, V, (8, 32)), rng.uniform(0, 1, (8, 32)).astype(np.float32)

    def both(x, w, chunk):
        loss = lambda x, w: chunked_ce(unembed(w), x, targets, weights, chunk)[0]  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    want = jax.jit(partial(both, chunk=10_000))(x, W)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, spec(("batch", "tokens", None), x.shape, dict(mesh.shape)))
        words = NamedSharding(mesh, spec(("width", "vocab"), W.shape, dict(mesh.shape)))
        placed, counts = (jax.device_put(x, split), jax.device_put(W, words)), []
        for chunk in (1, 10_000):
            program = jax.jit(partial(both, chunk=chunk)).lower(*placed).compile()
            text = program.as_text()
            counts.append([text.count(f" {n}(") for n in ("all-reduce", "all-gather")])
            for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(program(*placed)), strict=True):
                assert_close(f"{sizes} {chunk}", a, b, 1e-6)
            assert " while(" in text if chunk == 1 else True
    assert counts[0] == counts[1] and sum(counts[0]) > 0


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 2, 2, 2)])
def test_devices_keep_and_compare_words_of_their_own_tokens(sizes):
    """A teacher's best words, and the KL to them with its gradients, equal to one device."""
    rng = np.random.default_rng(1)
    x, xt = rng.standard_normal((2, 8, 32, D)).astype(np.float32)
    weights = rng.uniform(0, 1, (8, 32)).astype(np.float32)

    def both(x, xt, w, wt, chunk=4):
        kept = best_words(unembed(wt), xt, 3, (1.0, 2.0), chunk)
        data = *kept[:2], kept[2][..., 1]
        loss = lambda x, w: cached_kl(unembed(w), x, data, weights, chunk, 2.0)[0]  # noqa: E731
        return kept, jax.value_and_grad(loss, argnums=(0, 1))(x, w)

    want = jax.jit(both)(x, xt, W, WT)
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        split = NamedSharding(mesh, spec(("batch", "tokens", None), x.shape, dict(mesh.shape)))
        words = NamedSharding(mesh, spec(("width", "vocab"), W.shape, dict(mesh.shape)))
        rows, vocab = (
            (jax.device_put(a, split) for a in (x, xt)),
            (jax.device_put(a, words) for a in (W, WT)),
        )
        got = jax.jit(both)(*rows, *vocab)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert_close(f"{sizes}", a, b, 1e-6)


def test_targets_end_with_their_document_and_skip_padding_and_unscored_tokens():
    batch = {
        "tokens": jnp.array([[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]]),
        "segment_ids": jnp.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]]),
        "loss_mask": jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0.5, 1, 1.0]]),
    }
    targets, weights = next_tokens(batch)
    np.testing.assert_array_equal(targets[0, :5], [6, 7, 8, 9, 0])
    # Position t is weighed by what the mask says of the token it predicts, t + 1.
    np.testing.assert_array_equal(weights, [[1, 0, 1, 1, 0, 0], [1, 0, 0.5, 1, 1, 0]])


def test_alignment_sums_equal_float64_and_pull_towards_the_target():
    weights = (RNG.uniform(size=(B, T)) < 0.7).astype(np.float32)
    sums = {k: float(v) for k, v in jax.jit(alignment)(X, XT, weights).items()}
    y, target = X.astype(np.float64), XT.astype(np.float64)
    error, power = np.mean((y - target) ** 2, -1), np.mean(target**2, -1)
    cosine = (y * target).sum(-1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(target, axis=-1)
    want = {"error": error, "power": power, "cosine": cosine}
    for name, values in want.items():
        assert sums[name] == pytest.approx((weights * values).sum(), rel=1e-5), name
    gradient = jax.jit(jax.grad(lambda y: alignment(y, XT, weights)["error"]))(X)
    np.testing.assert_allclose(gradient, weights[..., None] * 2 * (y - target) / D, atol=1e-6)


def test_alignment_of_zeros_is_finite():
    zeros = jnp.zeros((1, 4, D))
    total = lambda y: sum(alignment(y, zeros, jnp.ones((1, 4))).values())  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(zeros)
    assert float(value) == 0 and np.isfinite(gradient).all()


def test_branch_stats_are_token_sums_without_gradient():
    rng = np.random.default_rng(0)
    o, z = rng.standard_normal((2, 2, 3, 4, 5)).astype("f4")
    weights = np.array([[1, 1, 0], [1, 0, 0]], "f4")
    stats = branch_stats(((jnp.asarray(o), None), (jnp.asarray(o), jnp.asarray(z))), weights)
    power = (weights * np.square(o.astype("f8")).mean((2, 3))).sum()
    assert stats.keys() == {"power_fa", "power_la", "z_la"}
    np.testing.assert_allclose(stats["power_fa"], power, rtol=1e-5)
    np.testing.assert_allclose(stats["z_la"], (weights * z.mean((2, 3))).sum(), rtol=1e-5)
    grad = jax.grad(lambda o: branch_stats((None, (o, None)), weights)["power_la"])(jnp.asarray(o))
    np.testing.assert_array_equal(grad, 0)
