"""The key table: both directions, and agreement with the model that the paths belong to."""

import numpy as np
import pytest

from hydrajax.config import HydraConfig
from hydrajax.head_plan import HeadPlan
from hydrajax.hf.rules import Rule, rules
from hydrajax.model import abstract_model, split_params
from tests.hf_folder import CONFIGS, tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_rules_are_exactly_the_parameters_of_the_model(name):
    cfg = CONFIGS[name]
    plan = HeadPlan.all_full(cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    _, params = split_params(abstract_model(cfg, HydraConfig.teacher(), plan))
    table = rules(cfg)
    assert {rule.path: rule.shape for rule in table} == {k: v.shape for k, v in params.items()}
    assert len({rule.hf for rule in table}) == len(table)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_identity(name):
    weights = tensors(CONFIGS[name])
    for rule in rules(CONFIGS[name]):
        ours = rule.to_ours(weights[rule.hf])
        assert ours.shape == rule.shape
        np.testing.assert_array_equal(rule.to_hf(ours), weights[rule.hf])


def test_heads_come_out_as_an_axis():
    cfg = CONFIGS["qwen3"]
    rule = next(r for r in rules(cfg) if r.hf == "model.layers.0.self_attn.q_proj.weight")
    flat = np.arange(np.prod(rule.hf_shape)).reshape(rule.hf_shape)
    head = 3
    rows = flat[head * cfg.head_dim : (head + 1) * cfg.head_dim]
    np.testing.assert_array_equal(rule.to_ours(flat)[:, head], rows.T)


def test_same_changes_nothing():
    x = np.arange(24).reshape(2, 3, 4)
    rule = Rule.same("layers.0.attn.la.w_q", x.shape)
    np.testing.assert_array_equal(rule.to_ours(x), x)
    np.testing.assert_array_equal(rule.to_hf(x), x)
