"""Receivers: the shortcut at the readouts equals patching the whole sequence, frozen downstream."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from hydrajax.config import HydraConfig, ModelConfig, SelectConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.model import Model, abstract_model, bind, split_params
from hydrajax.selection import patching, streams
from hydrajax.selection.probes import Pair, batches, make_batch

LLAMA = dict(family="llama", vocab_size=31, width=24, mlp_width=40, num_layers=3, num_heads=4,
             num_kv_heads=2, head_dim=8, max_context=64)  # fmt: skip
BIASED = LLAMA | dict(tied_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True,
                      qk_norm=True, num_kv_heads=4)  # fmt: skip
CFG = SelectConfig(context=24, rows=4)
HIDDEN = jax.jit(Model.hidden, static_argnames="taps")


def teacher(values, seed=0):
    """A random teacher with larger weights than at a training start: its heads do something."""
    cfg = ModelConfig(**values)
    plan = HeadPlan.all_full(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    graphdef, shapes = split_params(
        abstract_model(cfg, HydraConfig.teacher(), plan, dtype=jnp.float32)
    )
    rng = np.random.default_rng(seed)
    params = {path: 0.3 * rng.standard_normal(s.shape, "f4") for path, s in shapes.items()}
    scales = [path for path in params if path.endswith(("scale", "_norm"))]
    return graphdef, params | {path: 1 + params[path] for path in scales}


def random_pairs(count, vocab=31, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(count):
        span, length = 1 + i % 3, (12, 23)[i % 2]
        clean = rng.integers(vocab, size=length)
        corrupt = clean.copy()
        corrupt[3 : 3 + span] = (clean[3 : 3 + span] + 1 + rng.integers(vocab - 1)) % vocab
        answer = rng.integers(vocab, size=span)
        other = (answer + 1) % vocab
        pairs.append(Pair(*(tuple(map(int, x)) for x in (clean, corrupt, answer, other)), 3))
    return pairs


class Oracle:
    """The frozen patch by definition, in float64 numpy, over all positions of one pair."""

    def __init__(self, model, params, pair):
        self.cfg, self.pair = model.cfg, pair
        self.params = {k: np.asarray(v, np.float64) for k, v in params.items()}
        both = jnp.array([pair.clean, pair.corrupt])
        x, taps = HIDDEN(model, both, taps=("attn_out", "head_out"))
        self.said = tuple(model.logits(x)[0, -len(pair.answer) :].argmax(-1).tolist())
        taps_of = taps.attn_out, taps.head_out
        layers = [(np.float64(y), np.float64(o)) for y, o in zip(*taps_of, strict=True)]
        self.clean = [(y[0], o[0]) for y, o in layers]
        self.corrupt = [(y[1], o[1]) for y, o in layers]

    def norm(self, x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.cfg.norm_eps) * self.params[scale]

    def mlp(self, x, at):
        gate, up, down = (
            (self.params[f"{at}.w_{n}"], self.params.get(f"{at}.b_{n}", 0.0))
            for n in ("gate", "up", "down")
        )
        gated, x = x @ gate[0] + gate[1], x @ up[0] + up[1]
        return (gated / (1 + np.exp(-gated)) * x) @ down[0] + down[1]

    def metric(self, outputs, ids):
        """m from the attention outputs of all layers."""
        x = self.params["embed.w"][list(ids)]
        for l, y in enumerate(outputs):
            x = x + y
            x = x + self.mlp(self.norm(x, f"layers.{l}.mlp_norm.scale"), f"layers.{l}.mlp")
        unembed = self.params.get("unembed.w", self.params["embed.w"].T)
        span = len(self.pair.answer)
        logits = (self.norm(x, "norm.scale") @ unembed)[-span:]
        decay = CFG.span_decay ** np.arange(span)
        j = np.arange(span)
        return decay @ (logits[j, self.pair.answer] - logits[j, self.pair.distractor]) / decay.sum()

    def ends(self):
        """m(x), m(x')."""
        runs = (self.clean, self.pair.clean), (self.corrupt, self.pair.corrupt)
        return [self.metric([y for y, _ in taps], ids) for taps, ids in runs]

    def patched(self, layer, heads):
        """m(x; some heads of a layer at their values under x', everywhere in the sequence)."""
        outputs = [y for y, _ in self.clean]
        o_TNH = self.clean[layer][1].copy()
        o_TNH[:, heads] = self.corrupt[layer][1][:, heads]
        w_o, b_o = (self.params.get(f"layers.{layer}.attn.{n}", 0.0) for n in ("w_o", "b_o"))
        outputs[layer] = np.einsum("tnh,nhd->td", o_TNH, w_o) + b_o
        return self.metric(outputs, self.pair.clean)

    def effect(self, layer, heads):
        m_clean, m_corrupt = self.ends()
        return (m_clean - self.patched(layer, heads)) / (m_clean - m_corrupt)


def effects_of(model, pairs, cfg):
    parts = [
        patching.receiver_effects(model, *patching.read_both(model, batch), batch)[:rows]
        for batch, rows in batches(pairs, cfg)
    ]
    return np.concatenate(parts)


@pytest.fixture(scope="module", params=[LLAMA, BIASED], ids=["tied", "biased"])
def case(request):
    graphdef, params = teacher(request.param)
    pairs = random_pairs(6)
    model = bind(graphdef, params)
    return model, pairs, [Oracle(model, params, pair) for pair in pairs]


def test_shortcut_is_the_full_frozen_patch(case):
    model, pairs, oracles = case
    want = np.array([[[o.effect(l, [n]) for n in range(4)] for l in range(3)] for o in oracles])
    programs = streams.frozen._cache_size()
    with jax.default_matmul_precision("float32"):
        got = effects_of(model, pairs, CFG)  # two batches, the last one padded
    assert np.abs(want).max() > 0.05  # something is measured
    assert_close("effects", want, got, 1e-4)
    assert streams.frozen._cache_size() == programs + 1  # one for all layers and batches


def test_judge_agrees_with_the_definition(case):
    model, pairs, oracles = case
    gap, right = patching.judge(model, make_batch(pairs[:4], CFG))
    assert_close("gap", [a - b for a, b in (o.ends() for o in oracles[:4])], gap, 1e-4)
    assert right.tolist() == [o.said == o.pair.answer for o in oracles[:4]]
    told = [replace(o.pair, answer=o.said) for o in oracles[:4]]
    assert patching.judge(model, make_batch(told, CFG))[1].all()


def test_null_patch_has_no_effect(case):
    model, pairs, _ = case
    batch = make_batch(pairs[:4], CFG)
    clean, corrupt = patching.read_both(model, batch)
    same = patching.Readout(corrupt.x, clean.taps)
    assert np.abs(patching.receiver_effects(model, clean, same, batch)).max() < 1e-4


def test_all_heads_patched_is_the_layer_patched(case):
    model, pairs, oracles = case
    batch = make_batch(pairs[:4], CFG)
    clean, corrupt = patching.read_both(model, batch)
    direction = patching.answer_direction(model, batch)
    for l in range(3):
        heads = patching.head_deltas(
            model.layers[l].attn.w_o[...], clean.taps.head_out[l], corrupt.taps.head_out[l]
        ).sum(0)
        layer = corrupt.taps.attn_out[l] - clean.taps.attn_out[l]
        by_heads, by_layer = patching.patched_metric(
            model, l, jnp.stack([heads, layer]), clean, direction
        )
        assert_close(f"layer {l}", by_layer, by_heads, 1e-4)
        assert_close(f"oracle {l}", [o.patched(l, range(4)) for o in oracles[:4]], by_heads, 1e-4)


def test_padding_and_neighbours_do_not_matter(case):
    model, pairs, _ = case
    together = effects_of(model, pairs[:3], CFG)
    alone = effects_of(model, pairs[2:3], SelectConfig(context=40, rows=1))
    assert_close("effects", together[2:], alone, 1e-4)
