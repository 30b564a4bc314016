"""Generation: decoding is the full forward's greedy path, rows do not see each other, samplers."""

import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrajax import generation
from hydrajax.checkpoint import CheckpointStore, make_lineage, write_config
from hydrajax.config import HydraConfig, ModelConfig
from hydrajax.generation import Sampling, generate, open_run, read, stream
from hydrajax.head_plan import HeadPlan
from hydrajax.model import Model, bind, split_params
from hydrajax.tokenizer import load_tokenizer, save_tokenizer
from hydrajax.typing import UserError

# Small enough that compilation is all that costs time; tests share shapes (16 prompt tokens,
# room for 32) to compile little.
CFG = ModelConfig(
    vocab_size=272, width=32, mlp_width=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
    max_context=24, bos_id=256,
)  # fmt: skip
MIXED = HeadPlan(((0, 2, 3),), 4, 2)
FLAGS = {
    "teacher": HydraConfig.teacher(),
    "default": HydraConfig(),
    "conv": HydraConfig(la_short_conv="random", la_kv="gqa"),
}
GREEDY = Sampling(max_new_tokens=12, max_context=32)
DRAWN = replace(GREEDY, temperature=1.5, seed=3)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def build(name="default", cfg=CFG):
    """A model whose greedy path wanders: every parameter is far from its initial value."""
    plan = HeadPlan.all_full(1, 4, 2) if name == "teacher" else MIXED
    graphdef, params = split_params(
        Model(cfg, FLAGS[name], plan, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    rng = np.random.default_rng(1)
    noise = {k: 0.3 * rng.standard_normal(v.shape).astype("f4") for k, v in params.items()}
    return graphdef, {k: v + noise[k] for k, v in params.items()}


@pytest.fixture(scope="module")
def model():
    return build()


def prompt(length, seed=0):
    return [int(t) for t in np.random.default_rng(seed).integers(0, 256, length)]


def greedy_by_forward(graphdef, params, ids, count):
    """The same tokens without any cache: one full forward for each of them."""
    forward = jax.jit(lambda p, t: bind(graphdef, p)(t))
    ids = list(ids)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(params, padded)[0, len(ids) - 1])))
    return ids[-count:]


@pytest.mark.parametrize("name", FLAGS)
def test_decoding_is_greedy_over_the_full_forward(name):
    graphdef, params = build(name)
    ids = prompt(11, 1)
    want = greedy_by_forward(graphdef, params, ids, 12)
    assert len(set(want)) > 3, "the path must wander to prove anything"
    assert generate(graphdef, params, [ids], sampling=GREEDY) == [want]


def test_rows_of_a_ragged_batch_are_as_if_alone(model):
    prompts = [prompt(n, n) for n in (3, 16, 11, 1)]
    together = generate(*model, prompts, sampling=GREEDY)
    assert together == [generate(*model, [p], sampling=GREEDY)[0] for p in prompts]


def test_prefill_in_pieces_is_prefill_at_once():
    graphdef, params = build("conv")
    prompts = [prompt(n, n) for n in (30, 5, 16, 23)]
    want, state = read(graphdef, params, prompts, 32)
    got, pieces = read(graphdef, params, prompts, 32, piece=16)
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(pieces.length, state.length)
    step = jax.jit(lambda p, t, s: bind(graphdef, p).step(t, s)[0])
    tokens = jnp.arange(4, dtype=jnp.int32)
    after = [step(params, tokens, s) for s in (pieces, state)]
    np.testing.assert_allclose(*after, atol=1e-4)


def test_a_thousand_tokens_follow_the_full_forward(model):
    graphdef, params = model
    ids, sampling = prompt(16), Sampling(max_new_tokens=1000, max_context=1016)
    (new,) = generate(graphdef, params, [ids], sampling=sampling)
    assert len(new) == 1000
    logits = jax.jit(lambda p, t: bind(graphdef, p)(t))(params, jnp.array([ids + new]))[0]
    logits = np.asarray(logits)[len(ids) - 1 : -1]
    best, said = logits.max(-1), logits[np.arange(1000), new]
    assert np.all(best - said <= 1e-4 * np.abs(logits).max())


def test_seeds_decide_the_draws(model):
    ids = [prompt(8)]
    first = generate(*model, ids, sampling=DRAWN)
    assert generate(*model, ids, sampling=DRAWN) == first
    assert list(stream(*model, ids[0], sampling=DRAWN)) == first[0]
    assert generate(*model, ids, sampling=replace(DRAWN, seed=4)) != first
    # The random numbers belong to the row, whatever stands beside it.
    assert generate(*model, [*ids, prompt(3)], sampling=DRAWN)[0] == first[0]


@pytest.mark.parametrize("k", [1, 3, 40])
def test_top_k_mask(k):
    logits = np.random.default_rng(0).standard_normal((4, 40)).astype("f4")
    got = np.asarray(generation.top_k_mask(jnp.asarray(logits), k))
    for row, mask in zip(logits, got, strict=True):
        assert set(np.flatnonzero(mask)) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_mask(p):
    logits = 3 * np.random.default_rng(0).standard_normal((4, 40)).astype("f4")
    got = np.asarray(generation.top_p_mask(jnp.asarray(logits), p))
    for row, mask in zip(logits.astype("f8"), got, strict=True):
        chance = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-chance)
        count = int(np.searchsorted(np.cumsum(chance[order]), p)) + 1
        assert set(np.flatnonzero(mask)) == set(order[:count])


def test_draws_follow_the_masked_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    sampling = Sampling(temperature=1.0, top_k=2)
    tokens = generation.draw(jnp.repeat(logits, 4000, axis=0), keys, sampling)
    share = np.bincount(np.asarray(tokens), minlength=4) / 4000
    np.testing.assert_allclose(share, [2 / 3, 1 / 3, 0, 0], atol=0.03)


def test_narrow_masks_leave_the_likeliest_token():
    logits = jax.random.normal(jax.random.key(0), (8, 40))
    keys = jax.random.split(jax.random.key(1), 8)
    for narrow in (dict(top_k=1), dict(top_p=1e-6), dict(top_k=5, top_p=1e-6)):
        got = generation.draw(logits, keys, Sampling(temperature=2.0, **narrow))
        np.testing.assert_array_equal(got, logits.argmax(axis=-1))


def test_the_end_token_ends_a_row(model):
    ids = prompt(8)
    (free,) = generate(*model, [ids], sampling=GREEDY)
    end = free[4]
    cut = free[: free.index(end)]
    sampling = replace(GREEDY, eos_ids=(end,))
    assert generate(*model, [ids], sampling=sampling) == [cut]
    assert generate(*model, [ids + cut], sampling=sampling) == [[]], "the end token comes first"


def test_the_context_limits_prompt_and_answer(model):
    default = replace(GREEDY, max_context=0)
    assert len(generate(*model, [prompt(15)], sampling=default)[0]) == CFG.max_context - 15
    with pytest.raises(UserError, match=r"30 tokens.*24"):
        generate(*model, [prompt(30)], sampling=default)
    assert len(generate(*model, [prompt(15)], sampling=GREEDY)[0]) == 12


def test_an_empty_prompt_starts_with_bos(model):
    sampling = replace(GREEDY, max_new_tokens=16)
    assert generate(*model, [], sampling=sampling) == []
    from_bos = generate(*model, [[CFG.bos_id]], sampling=sampling)
    assert generate(*model, [[]], sampling=sampling) == from_bos
    with pytest.raises(UserError, match="bos"):
        generate(*build(cfg=replace(CFG, bos_id=-1)), [[]], sampling=sampling)


@pytest.mark.parametrize(
    "bad", [dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0)]
)
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


def test_foreign_tokens_are_refused(model):
    with pytest.raises(UserError, match=r"0\.\.271"):
        generate(*model, [[3, 272]], sampling=Sampling())


def write_run(folder, cfg=CFG):
    graphdef, params = build(cfg=cfg)
    model = bind(graphdef, params)
    lineage = make_lineage(["test"], None)
    write_config(folder, model=cfg, hydra=model.hydra, plan=model.plan, lineage=lineage)
    save_tokenizer(load_tokenizer("bytes"), folder)
    store = CheckpointStore(folder)
    store.save(1, params=params)
    store.wait()
    store.close()
    return folder


def test_text_streams_in_whole_characters(tmp_path, monkeypatch):
    """Tokens are bytes; each piece that is printed must be text of its own."""
    text = "naïve 🙂 日本"
    folder, printed = write_run(tmp_path / "run"), []
    monkeypatch.setattr(generation, "stream", lambda *a, **k: iter(text.encode()))
    monkeypatch.setattr("builtins.print", lambda *a, **k: printed.append(a[0]))
    args = dict(run=str(folder), dtype="float32", prompt="x", chat=False, step=None)
    args |= dict(max_new_tokens=9, temperature=0.0, top_k=0, top_p=1.0, seed=0, max_context=0)
    generation._run(type("Flags", (), args))
    assert "".join(printed[:-1]) == text
    assert "🙂" in printed and "日" in printed


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", replace(CFG, vocab_size=250, bos_id=-1))
    with pytest.raises(UserError, match=r"run has ids up to 258, but .* only 250 rows"):
        open_run(folder, dtype=jnp.float32)


def test_command(tmp_path):
    folder = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "hydrajax.generation", f"--run={folder}"]
    done = subprocess.run(
        [*command, "--prompt=hello", "--max_new_tokens=5"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "5 tokens" in done.stderr

    failed = subprocess.run([*command, "--chat"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "chat template" in failed.stderr and "Traceback" not in failed.stderr
