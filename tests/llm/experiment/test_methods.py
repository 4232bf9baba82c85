"""Names of methods, their budgets, and every mistake in one message."""

from __future__ import annotations

import pickle

import pytest

from lzero_kv.budget import ALLOCATIONS, SELECTIONS, BudgetConfig
from lzero_kv.llm.experiment.methods import ALGORITHMS, Method


@pytest.mark.parametrize(
    ('text', 'budget'),
    [
        ('full', None),
        ('cake attention_based 0.25', dict(selection='cake', allocation='attention_based', ratio=0.25)),
        (
            'hace adaptive beta=4 strategy=hybrid window=16 tokens=128',
            dict(selection='hace', allocation='adaptive', beta=4, strategy='hybrid', window=16, tokens=128),
        ),
        (
            'h2o uniform heavy_ratio=0.1 per_head=False recent_ratio=0.2',
            dict(selection='h2o', allocation='uniform', heavy_ratio=0.1, recent_ratio=0.2, per_head=False),
        ),
    ],
)
def test_a_name_and_its_method_say_the_same(text, budget):
    method = Method.parse(text)
    assert method.name == text
    assert method.budget() == budget
    assert Method.parse(method.name) == method == pickle.loads(pickle.dumps(method))
    assert hash(Method.parse(text)) == hash(method)
    if budget is not None:
        BudgetConfig.read(method.budget())


def test_every_algorithm_with_every_allocation_has_a_name_of_its_own():
    made = {
        Method(algorithm, ratio=0.5, allocation=allocation).name
        for algorithm in ALGORITHMS[1:]
        for allocation in ALLOCATIONS
    }
    assert len(made) == len(SELECTIONS) * len(ALLOCATIONS)


def test_the_allocation_left_out_is_that_of_the_config():
    method = Method('snapkv', ratio=0.125)
    assert method.allocation == BudgetConfig(ratio=0.125).allocation
    assert method.name == f'snapkv {method.allocation} 0.125'


def test_the_row_of_the_full_cache_has_the_ratio_of_everything():
    assert Method('full').fields() == dict(
        method='full', algorithm='full', allocation=None, ratio=1.0, budget_tokens=None, options={}
    )
    assert Method.parse('cake uniform tokens=99').fields()['budget_tokens'] == 99


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('kake 0.25', ['algorithm', "got 'kake'", "did you mean 'cake'"]),
        ('', ['algorithm', "got ''"]),
        ('full 0.25', ['ratio: the full cache has no budget']),
        ('cake 0.25 0.5 unform', ['2 mistake(s)', '0.5: expected', 'unform: expected', 'uniform']),
        ('cake 1.5 window=no', ['2 mistake(s)', 'ratio', 'window']),
        ('cake 0.25 selection=h2o', ['selection: it is a field of the method']),
        ('streaming 0.25 gama=2', ['gama: there is no such field', "did you mean 'gamma'"]),
        ('h2o 0.25 gamma=2', ['gamma: it is read with']),
        ('cake', ['expected either ratio or tokens, got neither']),
    ],
)
def test_mistakes_are_said_all_at_once(text, said):
    with pytest.raises(ValueError) as caught:
        Method.parse(text)
    for words in said:
        assert words in str(caught.value)
