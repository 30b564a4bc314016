"""Transplant: every tensor comes from where the plan says; initial values equal their formulas."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import CFG, batch, draw

from hydrajax.calibration import inverse_softplus
from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.model import bind, init_params
from hydrajax.presets import HYDRA_PRESETS
from hydrajax.transplant import SILU_ONE, Teacher, transplant
from hydrajax.typing import UserError

MODEL = replace(
    CFG, num_layers=2, qk_norm=True, qkv_bias=True, out_bias=True, tied_embeddings=False
)
PLAN = HeadPlan(((0, 3), (1,)), 4, 2)
LA = {0: [1, 2], 1: [0, 2, 3]}
SMALL, SMALL_PLAN = replace(MODEL, num_layers=1), HeadPlan(((1,),), 4, 2)
PLAIN = dict(gdn_init="fla", gamma_init="one")  # nothing that needs data


@functools.cache
def teacher(cfg: ModelConfig = MODEL) -> Teacher:
    full = HeadPlan.all_full(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    return Teacher(*draw(HydraConfig.teacher(), full, cfg, seed=1), cfg)


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in batch(seed=seed).items()}


@functools.cache
def student(**flags):
    """Parameters and report; cached, for each set of flags is drawn by a program of its own."""
    return transplant(teacher(), HydraConfig(**PLAIN | flags), PLAN, [], seed=3)


def small(seed: int = 3, **flags) -> dict:
    """One layer, head 1 full, the others linear."""
    return transplant(teacher(SMALL), HydraConfig(**PLAIN | flags), SMALL_PLAN, [], seed)[0]


@pytest.mark.parametrize(
    "flags, fa_kv, la_kv",
    [
        ({}, {0: [0, 1], 1: [0]}, {0: [0, 1], 1: [0, 1, 1]}),
        (dict(fa_kv="expanded"), {0: [0, 1], 1: [0]}, {0: [0, 1], 1: [0, 1, 1]}),
        (dict(la_kv="gqa"), {0: [0, 1], 1: [0]}, {0: [0, 1], 1: [0, 1]}),
        (dict(qkv_split=False, la_kv="gqa"), None, None),
    ],
    ids=["shared_mha", "expanded", "gqa", "tied"],
)
def test_tensors_come_from_the_heads_that_the_plan_names(flags, fa_kv, la_kv):
    params, report = student(**flags)
    source = teacher().params
    for l, la in LA.items():
        prefix, fa = f"layers.{l}.attn", list(PLAN.fa[l])
        for name in ("w_q", "b_q"):
            whole = source[f"{prefix}.fa.{name}"]
            np.testing.assert_array_equal(params[f"{prefix}.fa.{name}"], whole[..., fa, :])
            np.testing.assert_array_equal(params[f"{prefix}.la.{name}"], whole[..., la, :])
        for name in ("w_k", "w_v", "b_k", "b_v"):
            whole = source[f"{prefix}.fa.{name}"]
            if fa_kv is None:  # one projection that both branches read
                np.testing.assert_array_equal(params[f"{prefix}.kv.{name}"], whole)
                assert f"{prefix}.fa.{name}" not in params
                continue
            np.testing.assert_array_equal(params[f"{prefix}.fa.{name}"], whole[..., fa_kv[l], :])
            np.testing.assert_array_equal(params[f"{prefix}.la.{name}"], whole[..., la_kv[l], :])
        for branch in ("fa", "la"):
            for name in ("q_norm", "k_norm"):
                want = source[f"{prefix}.fa.{name}"]
                np.testing.assert_array_equal(params[f"{prefix}.{branch}.{name}"], want)
    outside = [p for p in source if ".attn.fa." not in p]  # W_O, norms, MLPs, both embeddings
    assert "unembed.w" in outside and "layers.0.attn.b_o" in outside
    for path in outside:
        np.testing.assert_array_equal(params[path], source[path], err_msg=path)
    assert report.copied + report.cloned + report.new == sum(p.size for p in params.values())
    assert report.copied >= sum(source[p].size for p in outside)
    assert all(p.dtype == jnp.float32 for p in params.values())


def test_report_counts_queries_once_and_kv_of_linear_heads_as_clones():
    _, report = student()
    d, h = MODEL.width, MODEL.head_dim
    heads = sum(map(len, LA.values()))
    assert report.cloned == 2 * heads * (d * h + h) + 2 * 2 * h  # w_k, w_v, b_k, b_v; q/k norms
    gates = 2 * 4 * (d * h + h)
    recurrence = heads * (2 * d + 3)
    fusion = 2 * (4 + 2 * h)  # gamma, w_fa, w_la
    assert report.new == gates + recurrence + fusion


def test_expanded_fa_keys_are_one_per_head():
    plan = HeadPlan(((0, 1, 3), (2, 3)), 4, 2)
    flags = HydraConfig(fa_kv="expanded", **PLAIN)
    params, _ = transplant(teacher(), flags, plan, [], 0)
    want = teacher().params["layers.0.attn.fa.w_k"]
    np.testing.assert_array_equal(params["layers.0.attn.fa.w_k"], want[:, [0, 0, 1]])


def test_a_layer_of_full_heads_alone_is_the_teachers_layer_under_safe():
    plan = HeadPlan(((0, 1, 2, 3), (1,)), 4, 2)
    hydra = HydraConfig(**HYDRA_PRESETS["safe"] | PLAIN)
    params, _ = transplant(teacher(), hydra, plan, [], 0)
    graph, _ = init_params(MODEL, hydra, plan, 0, dtype=jnp.float32)
    new = [p for p in params if p not in teacher().params and p.startswith("layers.0.")]
    assert all(params[p].size == 0 for p in new)  # at most a gamma of no heads
    forward = jax.jit(
        lambda s, t, toks: [
            bind(g, p).hidden(toks, taps=("attn_out", "resid"))[1]
            for g, p in ((graph, s), (teacher().graphdef, t))
        ]
    )
    ours, theirs = forward(params, teacher().params, rows()["tokens"])
    np.testing.assert_array_equal(ours.attn_out[0], theirs.attn_out[0])
    np.testing.assert_array_equal(ours.resid[1], theirs.resid[1])
    assert not np.array_equal(ours.attn_out[1], theirs.attn_out[1])


# ---- taylor ------------------------------------------------------------------------------------


def attention_weights(params: dict, x: np.ndarray, positions: np.ndarray, segments: np.ndarray):
    """Softmax attention of a layer in float64, loops over everything: [B, N, T, T]."""
    w_q, w_k = (np.asarray(params[f"layers.0.attn.fa.{n}"], np.float64) for n in ("w_q", "w_k"))
    rows_, length, _ = x.shape
    heads, h = w_q.shape[1:]
    group = heads // w_k.shape[1]
    freqs = 10_000.0 ** (-np.arange(0, h, 2) / h)

    def rotate(vector, position):
        a, b = np.split(vector, 2)
        cos, sin = np.cos(position * freqs), np.sin(position * freqs)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    p = np.zeros((rows_, heads, length, length))
    for r, n, t in np.ndindex(rows_, heads, length):
        q = rotate(x[r, t] @ w_q[:, n], positions[r, t])
        seen = [s for s in range(t + 1) if segments[r, s] == segments[r, t]]
        keys = [rotate(x[r, s] @ w_k[:, n // group], positions[r, s]) for s in seen]
        e = np.exp(np.array(keys) @ q / np.sqrt(h))
        p[r, n, t, seen] = e / e.sum()
    return p


def test_taylor_turns_look_back_and_entropy_into_decay_and_write_strength():
    guide = replace(teacher(CFG), params=dict(teacher(CFG).params))
    guide.params["layers.0.attn.fa.w_q"] *= 4  # peaked enough for heads to differ
    plan, data = HeadPlan(((2,),), 4, 2), rows()
    params, _ = transplant(guide, HydraConfig(gamma_init="one"), plan, [data], 0)

    x = np.asarray(guide.params["embed.w"], np.float64)[data["tokens"]]
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True) + CFG.norm_eps)
    x *= np.asarray(guide.params["layers.0.attn_norm.scale"], np.float64)
    p = attention_weights(guide.params, x, data["positions"], data["segment_ids"])
    distances, entropies = [[] for _ in range(4)], [[] for _ in range(4)]
    for r, t in np.ndindex(*data["tokens"].shape):
        context = data["positions"][r, t] + 1
        if data["segment_ids"][r, t] == 0 or context == 1:
            continue
        for n in range(4):
            w = p[r, n, t]
            distances[n].append(sum(w[s] * (t - s) for s in range(t + 1)))
            entropies[n].append(-sum(v * np.log(v) for v in w if v > 0) / np.log(context))
    la = [0, 1, 3]
    distance = np.mean(distances, axis=1)[la]
    beta = 0.3 + 0.4 * (1 - np.mean(entropies, axis=1)[la])
    assert np.ptp(distance) > 0.1 and np.ptp(beta) > 0.01
    prefix = "layers.0.attn.la"
    half_life = np.log(2) / np.log1p(np.exp(np.asarray(params[f"{prefix}.dt_bias"], np.float64)))
    np.testing.assert_allclose(half_life, distance, rtol=1e-4)
    write = 1 / (1 + np.exp(-np.asarray(params[f"{prefix}.beta_bias"], np.float64)))
    np.testing.assert_allclose(write, beta, rtol=1e-4)
    np.testing.assert_array_equal(params[f"{prefix}.a_log"], 0)
    np.testing.assert_array_equal(params[f"{prefix}.w_a"], 0)


# ---- gates, decay, gamma -----------------------------------------------------------------------


def test_gates_begin_at_one_and_fla_decays_lie_in_their_range():
    params, _ = student()
    for l in LA:
        prefix = f"layers.{l}.attn"
        np.testing.assert_allclose(params[f"{prefix}.la.b_z"], SILU_ONE, rtol=1e-6)
        np.testing.assert_allclose(params[f"{prefix}.fa.b_z"], 1.0)
        assert np.abs(params[f"{prefix}.la.w_z"]).max() < 1e-3
        a = np.exp(params[f"{prefix}.la.a_log"])
        dt = np.log1p(np.exp(params[f"{prefix}.la.dt_bias"]))
        assert (a > 0).all() and (a < 16.01).all()
        assert (dt > 0.99e-3).all() and (dt < 0.101).all()
        np.testing.assert_array_equal(params[f"{prefix}.la.beta_bias"], 0)
    assert float(jax.nn.silu(SILU_ONE)) == pytest.approx(1, abs=1e-6)


def test_blend_gates_average_output_and_value_weights():
    w_o, w_v = (np.asarray(teacher(SMALL).params[f"layers.0.attn.{n}"]) for n in ("w_o", "fa.w_v"))
    want = np.stack([(w_o[n].T + w_v[:, n // 2]) / 2 for n in (0, 2, 3)], axis=1)
    got = small(gate_init="blend")["layers.0.attn.la.w_z"]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    with pytest.raises(UserError, match="blend needs an elementwise gate"):
        small(gate_init="blend", fa_gate="headwise")


def test_an_identity_convolution_passes_its_last_tap():
    params = small(la_short_conv="identity")
    for name in ("conv_q", "conv_k", "conv_v"):
        taps = params[f"layers.0.attn.la.{name}"]
        np.testing.assert_array_equal(taps[-1], 1)
        np.testing.assert_array_equal(taps[:-1], 0)


def test_gamma_brings_each_head_to_the_teachers_loudness():
    """As in training: the logit scale of inference, large here, must not be in it."""
    guide, data = teacher(SMALL), [rows(0), rows(1)]
    base = HydraConfig(chunk=16, fa_logit_base=20.0, **PLAIN)
    graph, _ = init_params(SMALL, base, SMALL_PLAN, 0, dtype=jnp.float32)
    unscaled, _ = transplant(guide, base, SMALL_PLAN, [], 0)

    @jax.jit
    def heads(s, t, batch):
        inputs = {k: batch[k] for k in ("tokens", "segment_ids", "positions")}
        _, taps = bind(guide.graphdef, t).hidden(**inputs, taps=("attn_in", "head_out"))
        model = bind(graph, s)
        shape = batch["tokens"].shape
        seq = model.sequence(shape, batch["segment_ids"], batch["positions"], training=True)
        return model.layers[0].attn(taps.attn_in[0], seq)[1], taps.head_out[0]

    pairs = [
        [
            np.asarray(a, np.float64)[part["segment_ids"] > 0]
            for a in heads(unscaled, guide.params, part)
        ]
        for part in data
    ]
    u, o = (np.concatenate(side) for side in zip(*pairs, strict=True))  # [tokens, N, H]
    rms = lambda a: np.sqrt(np.mean(a * a, axis=(0, 2)))  # noqa: E731
    want = {
        "calibrated": rms(o) / np.maximum(rms(u), 0.05),
        "ols": np.sum(o * u, axis=(0, 2)) / np.sum(u * u, axis=(0, 2)),
    }
    for init in want:
        params, _ = transplant(guide, replace(base, gamma_init=init), SMALL_PLAN, data, 0)
        got = params["layers.0.attn.fusion.gamma"]
        np.testing.assert_allclose(got, want[init], rtol=1e-4, err_msg=init)


def test_zero_la_silences_linear_heads_only():
    params = small(gamma_init="zero_la")
    np.testing.assert_array_equal(params["layers.0.attn.fusion.gamma"], [0, 1, 0, 0])
    params = small(gamma_init="zero_la", fusion="la_only_norm")
    np.testing.assert_array_equal(params["layers.0.attn.fusion.gamma"], [0, 0, 0])


@pytest.mark.parametrize(
    "flags", [dict(gdn_init="fla"), dict(gdn_init="fla", gamma_init="ols"), dict(gamma_init="one")]
)
def test_calibration_without_rows_is_an_error(flags):
    with pytest.raises(UserError, match="need calibration rows"):
        transplant(teacher(), HydraConfig(**flags), PLAN, [], 0)


def test_the_seed_decides_what_is_drawn():
    path = "layers.0.attn.la.a_log"
    one, again, other = (small(seed)[path] for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_inverse_softplus_undoes_softplus():
    y = np.array([1e-12, 1e-4, 0.3, 5.0, 80.0])
    x = inverse_softplus(y)
    np.testing.assert_allclose(np.logaddexp(0, x), y, rtol=1e-9)
