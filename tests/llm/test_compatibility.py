"""CAKE experiments in their own words."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from lzero_kv.budget import BudgetConfig
from lzero_kv.llm import (
    EXPERIMENT_CONFIG,
    BudgetCache,
    CAKEExperimentConfig,
    CAKEModelAdapter,
    apply_cake_to_model,
    remove_cake_from_model,
)

from .models import batch, generate, make

EXPERIMENT: dict[str, Any] = {
    'layer_allocation_strategies': ['adaptive'],
    'cache_budgets': [0.8],
    'layer_analysis_configs': {'attention_pattern_analysis': False, 'layer_importance_scoring': True},
}
SPECIFIC = {'window_size': 8, 'gamma': 0.8, 'tau1': 1.0, 'tau2': 1.0}


def test_a_model_runs_under_cake_and_is_left_as_it_was(caplog):
    model, (ids, mask) = make('mistral'), batch()
    before = generate(model, ids, mask)
    own = BudgetCache(
        model.config, dict(ratio=0.8, allocation='adaptive', selection='cake', window=8, sinks=0, gamma=0.8)
    )
    expected = generate(model, ids, mask, own)
    with caplog.at_level(logging.INFO, logger='lzero_kv'):
        cake_model = apply_cake_to_model(
            model=model,
            model_config_hf=model.config.to_dict(),
            cake_experiment_config=EXPERIMENT,
            cake_model_specific_config=SPECIFIC,
        )
    assert cake_model is model
    assert 'gamma 0.8 (CAKE itself has 200)' in caplog.text
    assert 'not read by adaptive' in caplog.text
    assert torch.equal(generate(cake_model, ids, mask), expected)
    assert remove_cake_from_model(cake_model) is model
    assert torch.equal(generate(model, ids, mask), before)


def cache_of(analysis: dict[str, bool], new: int = 2, **others: Any) -> BudgetCache:
    """The cache of a prompt under CAKE."""
    model, (ids, mask) = make('llama'), batch()
    apply_cake_to_model(
        model, model.config, EXPERIMENT | others | {'layer_analysis_configs': analysis}, SPECIFIC
    )
    given = dict(attention_mask=mask[:1], max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    return model.generate(ids[:1], **given).past_key_values


def test_every_key_does_what_the_table_says():
    plain = cache_of({})
    assert plain.preferences == [[]]
    assert len(cache_of({'attention_pattern_analysis': True}).preferences[0]) == 3
    assert sum(cache_of({'layer_importance_scoring': True}).importance[0]) == pytest.approx(1)
    moving, frozen = cache_of({}, new=40), cache_of({'dynamic_allocation': False}, new=40)
    assert sum(moving.slots[0]) > sum(frozen.slots[0])
    assert cache_of({}, cache_budgets=[20]).budget.tokens == 20
    strategies = {
        name: cache_of({}, layer_allocation_strategies=[name]).slots for name in ('uniform', 'adaptive')
    }
    assert strategies['uniform'] != strategies['adaptive'] == plain.slots
    model, (ids, mask) = make('llama'), batch()
    stock = generate(model, ids, mask)
    apply_cake_to_model(model, model.config, EXPERIMENT | {'cake_enabled': False}, SPECIFIC)
    assert torch.equal(generate(model, ids, mask), stock)


def test_temperatures_are_read_with_attention_based():
    model = make('llama')
    adapter = CAKEModelAdapter(
        model, model.config, EXPERIMENT | {'layer_allocation_strategies': ['attention_based']},
        SPECIFIC | {'tau1': 1.6, 'tau2': 0.4},
    )  # fmt: skip
    assert (adapter.budget.tau1, adapter.budget.tau2) == (1.6, 0.4)
    assert CAKEModelAdapter.supported_models == ('llama', 'mistral', 'qwen2')


def test_the_whole_series_of_experiments_is_possible():
    names = []
    for name, budget in CAKEExperimentConfig.read(EXPERIMENT_CONFIG, 'EXPERIMENT_CONFIG').budgets(SPECIFIC):
        BudgetConfig.read(budget)
        names.append(name)
    assert names[:6] == ['h2o 0.1', 'hace 0.1', 'h2o 0.2', 'hace 0.2', 'h2o 0.3', 'hace 0.3']
    assert names[6:] == [
        f'cake {strategy} {budget}'
        for strategy in ('uniform', 'adaptive', 'attention_based')
        for budget in (0.2, 0.4, 0.6, 0.8)
    ]


@pytest.mark.parametrize(
    ('experiment', 'specific', 'lines'),
    [
        (
            dict(layer_allocation_strategies=['adaptve'], cache_budget=[0.5],
                 layer_analysis_configs=dict(dynamic=True)),
            {},
            ["expected a list of 'uniform', 'adaptive' and 'attention_based', got 'adaptve'",
             "cache_budget: there is no such field; did you mean 'cache_budgets'?",
             'layer_analysis_configs.dynamic: there is no such field'],
        ),
        (dict(cache_budgets=[0.5, 0.25]), {}, ['cache_budgets must hold one value for one model']),
        (dict(cache_budgets=[0.0]), {}, ['cache_budgets: expected a list of numbers greater than 0']),
        ({}, dict(window=3, tau1=0), ["mean 'window_size'?", 'tau1: expected a number in [0.05, 100]']),
        (dict(cache_budgets=[20]), dict(window_size=32), ['tokens: expected at least window + sinks']),
    ],
)  # fmt: skip
def test_mistakes_are_named_all_at_once_and_nothing_is_changed(experiment, specific, lines):
    model, (ids, mask) = make('llama'), batch()
    before = generate(model, ids, mask)
    with pytest.raises(ValueError) as caught:
        apply_cake_to_model(model, model.config, experiment, specific)
    for line in lines:
        assert line in str(caught.value)
    assert torch.equal(generate(model, ids, mask), before)


def test_the_configuration_of_another_model_is_refused():
    model, other = make('llama'), make('qwen2')
    with pytest.raises(ValueError, match="model_type is 'llama' there, got 'qwen2'"):
        apply_cake_to_model(model, other.config.to_dict(), EXPERIMENT, SPECIFIC)
