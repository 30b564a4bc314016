"""Model: prefill + decode = forward for every mixture, all-full = teacher, packing, causality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.head_plan import HeadPlan, cache_bytes
from hydrajax.model import Model, abstract_model, bind, logical_axes, split_params
from hydrajax.presets import HYDRA_PRESETS

CFG = ModelConfig(
    vocab_size=64, width=32, mlp_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    qk_norm=True, qkv_bias=True,
)  # fmt: skip
MIXED = HeadPlan(((0, 2, 3), (1,)), 4, 2)
DEGENERATE = HeadPlan(((), (0, 1, 2, 3)), 4, 2)
FLAGS = {name: HYDRA_PRESETS[name] for name in HYDRA_PRESETS} | {
    "tied": dict(qkv_split=False, la_kv="gqa"),
    "gqa": dict(la_kv="gqa", la_short_conv="random"),
    "expanded": dict(fa_kv="expanded", fa_pos="partial", fa_gate="headwise"),
    "conv": dict(la_short_conv="random", la_qkv_act="silu", norm_weight="per_head"),
    "pre_norm": dict(gate_pos="pre_norm", norm_weight="none", la_pos="nope"),
    "competition": dict(fusion="gated_competition"),
    "adapter": dict(fusion="layer_norm_adapter", la_gate="none"),
    "scale_only": dict(fusion="scale_only"),
    "none": dict(fusion="none", la_qkv_act="silu"),
}


def build(hydra: HydraConfig, plan: HeadPlan = MIXED, cfg: ModelConfig = CFG, seed: int = 0):
    """Graph and random parameters, every one of them away from its initial value."""
    model = abstract_model(cfg, hydra, plan, dtype=jnp.float32)
    graphdef, shapes = split_params(model)
    rng = np.random.default_rng(seed)
    draw = lambda a: 0.15 * rng.standard_normal(a.shape) + (a.ndim == 1)  # noqa: E731
    return graphdef, {k: jnp.asarray(draw(a), jnp.float32) for k, a in shapes.items()}


def forward(graphdef, params, toks, **kwargs):
    """Logits, compiled: op by op the same tests take minutes."""
    run = jax.jit(lambda p, toks, kw: bind(graphdef, p)(toks, **kw))
    return run(params, toks, kwargs)


def decoder(graphdef, params):
    """Compiled prefill and step of a bound model."""
    prefill = jax.jit(lambda p, t, s, n: bind(graphdef, p).prefill(t, s, lengths=n))
    step = jax.jit(lambda p, t, s: bind(graphdef, p).step(t, s))
    init = bind(graphdef, params).init_state
    return (
        init,
        lambda t, s, n=None: prefill(params, t, s, n),
        lambda t, s: step(params, t, s),
    )


def tokens(batch: int, length: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CFG.vocab_size, (batch, length)))


PLANS = [(name, MIXED) for name in FLAGS] + [("paper", DEGENERATE)]


@pytest.mark.parametrize("name, plan", PLANS)
def test_prefill_in_pieces_and_decode_equal_the_full_forward(name, plan):
    graphdef, params = build(HydraConfig(**FLAGS[name]), plan)
    toks = tokens(2, 12)
    init, prefill, step = decoder(graphdef, params)
    want = forward(graphdef, params, toks)
    logits, state = prefill(toks[:, :5], init(2, 16))
    np.testing.assert_allclose(logits, want[:, 4], atol=2e-5)
    logits, state = prefill(toks[:, 5:8], state)
    np.testing.assert_allclose(logits, want[:, 7], atol=2e-5)
    for t in range(8, 12):
        logits, state = step(toks[:, t], state)
        np.testing.assert_allclose(logits, want[:, t], atol=2e-5)


@pytest.mark.parametrize("flags", [FLAGS["default"], FLAGS["conv"]], ids=["default", "conv"])
def test_ragged_rows_decode_as_if_alone(flags):
    graphdef, params = build(HydraConfig(**flags))
    toks = tokens(2, 10)
    init, prefill, step = decoder(graphdef, params)
    want = forward(graphdef, params, toks)
    lengths = jnp.array([3, 6])
    padded = jnp.where(jnp.arange(6)[None] < lengths[:, None], toks[:, :6], 63)
    logits, state = prefill(padded, init(2, 12), lengths)
    np.testing.assert_allclose(logits, want[jnp.arange(2), lengths - 1], atol=2e-5)
    for i in range(3):
        logits, state = step(toks[jnp.arange(2), lengths + i], state)
        np.testing.assert_allclose(logits, want[jnp.arange(2), lengths + i], atol=2e-5)


@pytest.mark.parametrize("flags", [FLAGS[n] for n in ("paper", "tied", "pre_norm", "adapter")])
def test_every_parameter_gets_a_gradient(flags):
    graphdef, params = build(HydraConfig(**flags))
    toks = tokens(2, 12)
    loss = lambda p: jnp.sum(jax.nn.logsumexp(bind(graphdef, p)(toks), axis=-1))  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(g).all() for g in grads.values())
    dead = [k for k, g in grads.items() if not np.abs(g).max() > 0]
    assert dead == []


def test_all_full_plan_is_the_teacher_bit_for_bit():
    full = HeadPlan.all_full(2, 4, 2)
    graphdef, params = build(HydraConfig.teacher(), full)
    student = HydraConfig(fusion="none", fa_pos="rope", fa_gate="none", fa_logit_scale="off")
    other, fresh = split_params(abstract_model(CFG, student, full, dtype=jnp.float32))
    assert fresh.keys() == params.keys()
    toks = tokens(2, 20)
    np.testing.assert_array_equal(forward(graphdef, params, toks), forward(other, params, toks))


@pytest.mark.parametrize("flags", [FLAGS["default"], FLAGS["conv"], FLAGS["safe"]])
def test_packed_documents_equal_separate_ones_and_padding_never_matters(flags):
    graphdef, params = build(HydraConfig(**flags))
    toks = tokens(1, 20)
    model = functools.partial(forward, graphdef, params)
    segments = jnp.array([[1] * 7 + [2] * 9 + [0] * 4])
    positions = jnp.array([[*range(7), *range(9), *range(4)]])
    packed = model(toks, segment_ids=segments, positions=positions)
    np.testing.assert_allclose(packed[:, :7], model(toks[:, :7]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 7:16], model(toks[:, 7:16]), atol=2e-5)
    other = model(toks.at[:, 16:].set(1), segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(other[:, :16], packed[:, :16])


def test_no_token_sees_the_future():
    graphdef, params = build(HydraConfig(la_short_conv="random"))
    toks = tokens(1, 16)
    before = forward(graphdef, params, toks)
    after = forward(graphdef, params, toks.at[0, 9].set((toks[0, 9] + 1) % 64))
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert (np.abs(after[:, 9:] - before[:, 9:]).max(axis=-1) > 0).all()


def test_taps_at_positions_are_slices_of_the_whole():
    graphdef, params = build(HydraConfig())
    model, toks = bind(graphdef, params), tokens(2, 12)
    names = ("attn_in", "attn_out", "head_out", "resid")
    hidden = jax.jit(lambda p, at: bind(graphdef, p).hidden(toks, taps=names, tap_at=at))
    at = jnp.array([[3, 11], [0, 5]])
    (_, whole), (_, some) = hidden(params, None), hidden(params, at)
    for name in names:
        for a, b in zip(getattr(whole, name), getattr(some, name), strict=True):
            np.testing.assert_array_equal(b, a[jnp.arange(2)[:, None], at])
    out = whole.resid[0] + whole.attn_out[0]
    np.testing.assert_allclose(model.layers[0].after_attention(out), whole.resid[1], atol=1e-6)


@pytest.mark.parametrize("remat", ["block", "host", "dots"])
def test_remat_changes_no_gradient(remat):
    toks, grads = tokens(2, 12), []
    _, params = build(HydraConfig())
    for policy in ("none", remat):
        graphdef, _ = split_params(
            abstract_model(CFG, HydraConfig(), MIXED, dtype=jnp.float32, remat=policy)
        )
        loss = lambda p, g=graphdef: jnp.mean(jnp.square(bind(g, p)(toks)))  # noqa: E731
        grads.append(jax.jit(jax.grad(loss))(params))
    for path in params:
        np.testing.assert_allclose(grads[1][path], grads[0][path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("conv", ["off", "identity"])
def test_measured_cache_bytes_equal_the_formula(conv):
    model = Model(CFG, HydraConfig(la_short_conv=conv), MIXED, rngs=nnx.Rngs(0))
    state = model.init_state(2, 32)
    assert state.nbytes() == cache_bytes(MIXED, CFG.head_dim, 32, conv=conv != "off")


def test_declared_axes_match_every_parameter():
    model = Model(CFG, HydraConfig(la_short_conv="random"), MIXED, rngs=nnx.Rngs(0))
    _, params = split_params(model)
    axes = logical_axes(model)
    assert {k: len(v) for k, v in axes.items()} == {k: v.ndim for k, v in params.items()}


def test_permuted_heads_with_a_permuted_output_matrix_change_nothing():
    """Heads of a layer without groups may be renamed: y depends on the sets, not on the ids."""
    cfg = ModelConfig(
        vocab_size=64, width=32, mlp_width=48, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8
    )
    plan, order = HeadPlan(((0, 2),), 4, 4), np.array([2, 3, 0, 1])
    graphdef, params = build(HydraConfig(), plan, cfg)
    moved = dict(params)
    moved["layers.0.attn.w_o"] = params["layers.0.attn.w_o"][order]
    moved["layers.0.attn.fusion.gamma"] = params["layers.0.attn.fusion.gamma"][order]
    for path in params:  # FA heads (0, 2) become (2, 0), LA heads (1, 3) become (3, 1)
        if ".fa." in path or ".la." in path:
            axis = params[path].ndim - (1 if path.endswith(("w_a", "w_b", "a_log", "_bias")) else 2)
            moved[path] = np.flip(params[path], axis)
    toks = tokens(2, 12)
    np.testing.assert_allclose(
        forward(graphdef, moved, toks), forward(graphdef, params, toks), atol=2e-5
    )
