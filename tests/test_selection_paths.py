"""Senders, ablation, attribution: the walk over blocks equals the definition, done at length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from test_selection_patching import BIASED, CFG, LLAMA, random_pairs, teacher

from hydrajax.losses import chunked_ce, next_tokens
from hydrajax.model import bind
from hydrajax.selection import ablation, attribution, patching, paths
from hydrajax.selection.probes import make_batch

L, N = 3, 4
ALL, NONE = np.ones((L, N), bool), np.zeros((L, N), bool)


@pytest.fixture(scope="module", params=[LLAMA, BIASED], ids=["tied", "biased"])
def case(request):
    graphdef, params = teacher(request.param)
    return bind(graphdef, jax.tree.map(jnp.asarray, params)), make_batch(random_pairs(4), CFG)


def at(*heads):
    mask = NONE.copy()
    for l, n in heads:
        mask[l, n] = True
    return mask


@jax.jit
def attention_of(block, x, seq):
    return block.attn(block.attn_norm(x), seq)[1]


@jax.jit
def written(block, o):
    y = jnp.einsum("btnh,nhd->btd", o, block.attn.w_o[...])
    return y if block.attn.b_o is None else y + block.attn.b_o[...]


@jax.jit
def mlp_half(block, x):
    return block.after_attention(x)


class Run:
    """A forward pass in which any head's output may be replaced."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.seq = model.sequence(batch.clean.shape, batch.segment_ids)
        self.direction = patching.answer_direction(model, batch)

    def __call__(self, tokens, choose):
        """`choose(l, recomputed)` gives the head outputs of layer l; returns (m, outputs)."""
        x, outputs = self.model.embed(tokens), []
        for l, block in enumerate(self.model.layers):
            o = choose(l, attention_of(block, x, self.seq))
            outputs.append(o)
            x = mlp_half(block, x + written(block, o))
        x = jnp.take_along_axis(self.model.norm(x), self.batch.at[..., None], axis=1)
        return patching.metric(x, self.direction), outputs


def path_patch(model, batch, sender, receivers, carriers, freeze=True):
    """Steps 1 to 3 by the book: three forward passes for one sender."""
    run, (layer, head) = Run(model, batch), sender
    m_clean, clean = run(batch.clean, lambda l, o: o)
    m_corrupt, corrupt = run(batch.corrupt, lambda l, o: o)
    seen = {}

    def step_1_and_2(l, o):
        seen[l] = o
        kept = jnp.where(carriers[l][:, None] & (l > layer), o, clean[l])
        return kept.at[:, :, head].set(corrupt[l][:, :, head]) if l == layer else kept

    run(batch.clean, step_1_and_2)
    swap = [receivers[l][:, None] & (l > layer) for l in range(L)]
    m_path, _ = run(
        batch.clean, lambda l, o: jnp.where(swap[l], seen[l], clean[l] if freeze else o)
    )
    return (m_clean - m_path) / (m_clean - m_corrupt)


@pytest.mark.parametrize("carriers", [NONE, at((1, 0), (1, 3))], ids=["round 1", "round 2"])
@pytest.mark.parametrize("freeze", [True, False], ids=["frozen", "live"])
def test_senders_are_path_patches(case, carriers, freeze):
    model, batch = case
    receivers = at((1, 1), (2, 0), (2, 2))
    want = np.zeros((4, L, N))
    for l, n in np.argwhere(ALL):
        want[:, l, n] = path_patch(model, batch, (l, n), receivers, carriers, freeze)
    got = paths.sender_effects(model, batch, paths.Roles(ALL, receivers, carriers), freeze)
    assert np.abs(want[:, 0]).max() > 0.01 and not want[:, 2].any()
    assert_close("senders", want, got, 1e-4)
    some = at((0, 2), (1, 1))
    few = paths.sender_effects(model, batch, paths.Roles(some, receivers, carriers), freeze)
    assert_close("wanted senders", np.where(some, want, 0), few, 1e-4)


def test_what_the_receivers_say_is_heard_behind_them_only_without_freezing(case):
    model, batch = case
    roles = paths.Roles(ALL, at((1, 1)), NONE)  # layer 2 reads what layer 1 writes
    frozen, live = (paths.sender_effects(model, batch, roles, freeze) for freeze in (True, False))
    assert np.abs(frozen - live).max() > 1e-3


def test_a_sender_without_receivers_behind_it_does_nothing(case):
    model, batch = case
    got = paths.sender_effects(model, batch, paths.Roles(ALL, at((1, 1)), NONE))
    assert got[:, 0].any() and not got[:, 1:].any()


def test_null_patch_has_no_effect():
    """Heads 0 and 1 of layer 0 say nothing, so their values under x' are their clean ones."""
    graphdef, params = teacher(LLAMA)
    w_v = params["layers.0.attn.fa.w_v"].copy()
    w_v[:, 0] = 0
    model = bind(graphdef, params | {"layers.0.attn.fa.w_v": w_v})
    roles = paths.Roles(ALL, at((1, 1), (2, 2)), at((1, 0)))
    got = paths.sender_effects(model, make_batch(random_pairs(4), CFG), roles)
    assert np.abs(got[:, 0, :2]).max() < 1e-4 < 1e-2 < np.abs(got[:, 0, 2:]).max()


def text_batch(rows=2, length=12):
    rng = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[1, 7:] = 0
    return {
        "tokens": rng.integers(31, size=(rows, length), dtype=np.int32),
        "segment_ids": segments,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape),
        "loss_mask": np.ones((rows, length), np.float32),
    }


def test_loss_rise_is_the_loss_with_a_head_at_its_mean(case):
    model, _ = case
    batch = text_batch()
    real = batch["segment_ids"] > 0
    means = ablation.head_sums(model, batch) / real.sum()
    got = ablation.loss_rise(model, batch, means)
    targets, weights = next_tokens({k: jnp.asarray(v) for k, v in batch.items()})
    seq = model.sequence(real.shape, batch["segment_ids"], batch["positions"])

    def loss(head=None):
        x = model.embed(batch["tokens"])
        for l, block in enumerate(model.layers):
            o = attention_of(block, x, seq)
            if head and head[0] == l:
                o = o.at[:, :, head[1]].set(np.asarray(o)[real][:, head[1]].mean(0))
            x = mlp_half(block, x + written(block, o))
        return chunked_ce(model, model.norm(x), targets, weights, 64)[0]

    clean = loss()
    # Means of other layers' heads are those of the clean run, as above.
    want = [[float(loss((l, n)) - clean) for n in range(N)] for l in range(L)]
    assert ablation.scored_tokens(batch) == 11 + 6
    assert_close("loss rise", want, got, 1e-3)


def test_attribution_is_the_gradient_of_a_patch(case):
    model, batch = case
    run = Run(model, batch)
    m_clean, clean = run(batch.clean, lambda l, o: o)
    m_corrupt, corrupt = run(batch.corrupt, lambda l, o: o)

    def moved(scale_LN):
        shift = [scale_LN[l][:, None] * (clean[l] - corrupt[l]) for l in range(L)]
        return run(batch.clean, lambda l, o: o + shift[l])[0]

    want = jax.jacrev(moved)(jnp.zeros((L, N))) / (m_clean - m_corrupt)[:, None, None]
    assert_close("attributions", want, attribution.attributions(model, batch), 1e-4)
