"""Budget: exact totals, whole groups, one per layer, ties by balance and lot, never by index."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydrajax.config import DataConfig, ModelConfig, SelectConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.selection.budget import evenly_spaced, full_layers, make_plan, tie_share
from hydrajax.selection.scorers import SCORERS, Context
from hydrajax.typing import UserError


def model_of(layers, kv_heads, group):
    heads = kv_heads * group
    return ModelConfig(vocab_size=8, width=8, mlp_width=8, num_layers=layers, num_heads=heads,
                       num_kv_heads=kv_heads, head_dim=2)  # fmt: skip


def shape_of(model):
    return model.num_layers, model.num_heads


def control(scorer, model, **flags):
    alloc = "layerwise" if scorer == "layerwise" else flags.pop("alloc", "global")
    cfg = SelectConfig(scorer=scorer, alloc=alloc, **flags)
    context = Context(cfg, model, DataConfig(), load_model=None, load_tokenizer=None)
    return make_plan(SCORERS[scorer](context).keys, cfg, model)


models = st.builds(model_of, st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))


@st.composite
def cases(draw):
    """A model, a config and scores that are often tied."""
    model = draw(models)
    cfg = SelectConfig(
        alloc=draw(st.sampled_from(["global", "global_c", "per_layer"])),
        unit=draw(st.sampled_from(["q_head", "kv_group"])),
        ratio=draw(st.floats(0, 1)),
        seed=draw(st.integers(0, 9)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    keys = [rng.integers(0, draw(st.integers(1, 4)), shape_of(model)) / 4.0 for _ in range(2)]
    return model, cfg, keys


@settings(max_examples=150, deadline=None)
@given(cases())
def test_totals_constraints_and_repeatability(case):
    model, cfg, keys = case
    group = 1 if cfg.unit == "q_head" else model.num_heads // model.num_kv_heads
    units = model.num_heads // group
    total = int(np.floor(cfg.ratio * model.num_layers * units + 0.5))
    if cfg.alloc == "global_c" and total < model.num_layers:
        with pytest.raises(UserError, match="use a ratio >= "):
            make_plan(keys, cfg, model)
        return
    plan = make_plan(keys, cfg, model)
    assert plan.num_fa == total * group
    assert plan == make_plan(keys, cfg, model)
    counts = [len(heads) // group for heads in plan.fa]
    if cfg.alloc == "global_c":
        assert min(counts) >= 1
    if cfg.alloc == "per_layer":
        assert max(counts) - min(counts) <= 1
    for l in range(model.num_layers):
        for kv in plan.layer(l).kv_fa if cfg.unit == "kv_group" else ():
            assert set(range(kv * group, (kv + 1) * group)) <= set(plan.fa[l])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_better_heads_go_first(case):
    """Without constraints no head stays out that beats one inside, first key first."""
    model, cfg, keys = case
    plan = make_plan(keys, replace(cfg, alloc="global", unit="q_head"), model)
    pairs = {(l, n): (keys[0][l, n], keys[1][l, n]) for l, n in np.ndindex(*shape_of(model))}
    inside = [pairs.pop((l, n)) for l, heads in enumerate(plan.fa) for n in heads]
    if inside and pairs:
        assert min(inside) >= max(pairs.values())


def test_the_suggested_ratio_is_enough():
    for layers, heads in ((1, 1), (3, 7), (30, 9), (28, 16)):
        model, keys = model_of(layers, heads, 1), [np.zeros((layers, heads))]
        with pytest.raises(UserError) as error:
            make_plan(keys, SelectConfig(ratio=0.0), model)
        least = float(str(error.value).split(">= ")[1].split(" ")[0])
        assert make_plan(keys, SelectConfig(ratio=min(least, 1.0)), model).num_fa == layers


@pytest.mark.parametrize("unit", ["q_head", "kv_group"])
@pytest.mark.parametrize("alloc", ["global", "per_layer"])
def test_ties_ignore_the_index_and_balance_layers(alloc, unit):
    model = model_of(6, 4, 2)
    chosen = np.zeros(shape_of(model))
    for seed in range(200):
        cfg = SelectConfig(alloc=alloc, unit=unit, ratio=0.25, seed=seed)
        plan = make_plan([np.zeros(shape_of(model))], cfg, model)
        assert {len(heads) for heads in plan.fa} == {2}
        for l, heads in enumerate(plan.fa):
            chosen[l, list(heads)] += 1
    # Each head is drawn 50 times in the mean; five standard deviations for 200 draws.
    assert np.abs(chosen - 50).max() < 5 * np.sqrt(200 * 0.25 * 0.75)


def test_ties_go_to_the_layer_with_fewer_chosen():
    score = np.zeros((3, 4))
    score[0, :3] = 1.0
    plan = make_plan([score], SelectConfig(alloc="global", ratio=7 / 12), model_of(3, 4, 1))
    assert [len(heads) for heads in plan.fa] == [3, 2, 2]


def test_group_ranks_as_its_best_head():
    score = np.array([[0.9, 0.0, 0.5, 0.5], [0.6, 0.6, 0.0, 0.7]])
    cfg = SelectConfig(alloc="global", unit="kv_group", ratio=0.5)
    assert make_plan([score], cfg, model_of(2, 2, 2)).fa == ((0, 1), (2, 3))


@pytest.mark.parametrize("unit", ["q_head", "kv_group"])
@pytest.mark.parametrize("scorer", ["random", "fixed", "layerwise"])
def test_nothing_and_everything(scorer, unit):
    model = model_of(3, 2, 2)
    assert control(scorer, model, ratio=0.0, unit=unit).num_fa == 0
    full = HeadPlan.all_full(3, 4, 2)
    assert control(scorer, model, ratio=1.0, unit=unit) == full
    if scorer != "layerwise":
        assert control(scorer, model, ratio=1.0, unit=unit, alloc="global_c") == full


def test_fixed_repeats_itself_in_every_layer():
    plan = control("fixed", model_of(6, 9, 1), ratio=1 / 3)
    assert set(plan.fa) == {(1, 4, 7)}
    counts = [len(h) for h in control("fixed", model_of(30, 3, 3), alloc="global_c").fa]
    assert sum(counts) == 68 and set(counts) == {2, 3}


def test_random_depends_on_the_seed_alone():
    model = model_of(5, 4, 2)
    plans = [control("random", model, seed=s) for s in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert len({len(heads) for heads in plans[0].fa}) > 1  # not balanced over layers


def test_layerwise():
    model = model_of(28, 8, 2)
    halo = (2, 3, 6, 8, 9, 21, 25)
    plan = control("layerwise", model, layers=halo)
    assert [l for l, heads in enumerate(plan.fa) if len(heads) == 16] == list(halo)
    assert plan.num_fa == 7 * 16
    assert full_layers(SelectConfig(ratio=0.25), 8) == (2, 6) == evenly_spaced(2, 8)
    with pytest.raises(UserError, match="do not exist"):
        control("layerwise", model, layers=(28,))


def test_tie_share_counts_units_below_the_floor():
    model = model_of(2, 2, 2)
    score = np.array([[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.2]])
    plan = HeadPlan(((0, 1), (0, 1, 2, 3)), 4, 2)
    assert tie_share(score, plan, SelectConfig(unit="kv_group"), model) == pytest.approx(1 / 3)
    assert tie_share(score, plan, SelectConfig(), model) == pytest.approx(4 / 6)


def test_scores_must_be_numbers():
    with pytest.raises(UserError, match="not finite"):
        make_plan([np.full((1, 2), np.nan)], SelectConfig(), model_of(1, 2, 1))
