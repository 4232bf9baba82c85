"""What may be chosen about layer budgets, and what is said about mistakes."""

from __future__ import annotations

from typing import Any

import pytest

from lzero_kv.budget import ALLOCATIONS, SELECTIONS, BudgetConfig, Sizes
from lzero_kv.budget.allocation import AttentionBased, Pyramid
from lzero_kv.budget.selection import H2O, HACE, Cake
from lzero_kv.config import NodeBudget


def mistakes(config: type[BudgetConfig] = BudgetConfig, **given: Any) -> list[str]:
    with pytest.raises(ValueError, match='mistake') as caught:
        config.read(given)
    first, *lines = str(caught.value).splitlines()
    assert first == f'{len(lines)} mistake(s) in budget:'
    return [line.removeprefix('  budget.') for line in lines]


def test_the_defaults_are_those_of_cake():
    config = BudgetConfig.read(dict(ratio=0.25))
    assert (config.window, config.sinks, config.minimum, config.step) == (32, 0, 1, 1)
    assert config.allocator() == AttentionBased(alpha=1.0, tau1=1.0, tau2=1.0, preference='normal')
    assert config.selector() == Cake(gamma=200.0, kernel=5)


def test_every_field_is_documented():
    assert all(field.description for field in BudgetConfig.model_fields.values())


def test_every_method_can_be_built_from_the_defaults():
    for allocation in ALLOCATIONS:
        for selection in SELECTIONS:
            config = BudgetConfig.read(dict(tokens=64, allocation=allocation, selection=selection))
            assert type(config.allocator()) is ALLOCATIONS[allocation]
            assert type(config.selector()) is SELECTIONS[selection]


def test_parameters_reach_their_methods():
    config = BudgetConfig.read(dict(ratio=0.5, allocation='pyramid', selection='h2o', rho=0.9))
    assert (config.allocator(), config.selector()) == (Pyramid(), H2O(rho=0.9))
    given = dict(ratio=0.5, selection='hace', strategy='time_decay', theta=0.1, gamma=3.0, kernel=7, tau1=1.6)
    config = BudgetConfig.read(given)
    assert config.selector() == HACE('time_decay', None, None, 3.0, 7, 0.1)
    assert (config.selector().decay, config.selector().accumulated_share) == (0.95, 1.0)
    assert config.allocator().tau1 == 1.6


def test_a_ready_made_config_is_taken_as_it_is():
    config = BudgetConfig(tokens=99)
    assert BudgetConfig.read(config) is config
    with pytest.raises(ValueError, match='frozen'):
        config.tokens = 3
    with pytest.raises(TypeError, match=r'budget must be a dict such as dict\(ratio=0.25\), got float'):
        BudgetConfig.read(0.25)


# --- sizes ---


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        # 4 layers of 162 tokens; a quarter of 648 is 162
        (dict(ratio=0.25, window=8), Sizes(162, 8, 0, 1, 1)),
        (dict(ratio=1), Sizes(648, 32, 0, 1, 1)),
        # 77.76 slots
        (dict(ratio=0.12, window=4, sinks=2, step=2), Sizes(78, 4, 2, 1, 2)),
        (dict(tokens=50, minimum=3), Sizes(200, 32, 0, 3, 1)),
        (dict(tokens=1024), Sizes(4096, 32, 0, 1, 1)),
        # 32.4 and 16.2 of 162 tokens
        (dict(selection='h2o', heavy_ratio=0.1, recent_ratio=0.2), Sizes(4 * 48, 32, 0, 1, 1)),
        (dict(selection='h2o', heavy_ratio=0.001, recent_ratio=0.002, sinks=2), Sizes(4 * 4, 1, 2, 1, 1)),
    ],
)
def test_sizes_of_a_model(given, expected):
    assert BudgetConfig.read(given).sizes(layers=4, context=162) == expected


def test_ratios_are_the_decimal_numbers_that_were_written():
    config = BudgetConfig.read(dict(selection='h2o', heavy_ratio=0.3, recent_ratio=0.29))
    # 0.3 * 10 and 0.29 * 100 in binary are a little less than 3 and 29
    assert config.sizes(1, 10)[:2] == (5, 2)
    assert config.sizes(1, 100)[:2] == (59, 29)


def test_a_small_ratio_is_refused_instead_of_emptying_a_layer():
    config = BudgetConfig.read(dict(ratio=0.05, window=4, sinks=2))
    with pytest.raises(
        ValueError, match=r'need 28 slots, the budget for 41 tokens has 8; write ratio=0.171 or'
    ):
        config.sizes(layers=4, context=41)
    assert BudgetConfig.read(dict(ratio=0.171, window=4, sinks=2)).sizes(4, 41).total == 28
    # a context that is kept whole anyway is no mistake
    assert BudgetConfig.read(dict(ratio=1.0)).sizes(layers=4, context=5).total == 20


# --- mistakes ---


def test_all_mistakes_are_reported_at_once():
    assert mistakes(ratoi=0.5, ratio=0, selection='cakes', window=0, per_head=1, strategy='hybird') == [
        'ratio: expected a number greater than 0 and at most 1, got 0 of type int',
        'window: expected an integer of at least 1, got 0 of type int',
        'per_head: expected True or False, got 1 of type int',
        "strategy: expected one of ['attention', 'time_decay', 'hybrid'], got 'hybird'; "
        "did you mean 'hybrid'?",
        "ratoi: there is no such field; did you mean 'ratio'?",
        f"selection: expected one of {list(SELECTIONS)}, got 'cakes'; did you mean 'cake'?",
    ]


@pytest.mark.parametrize(
    ('given', 'text'),
    [
        (dict(), 'ratio: expected either ratio or tokens, got neither; write ratio=0.25'),
        (dict(ratio=0.5, tokens=64), 'ratio: expected either ratio or tokens, got both'),
        (dict(ratio=0.5, selection='h2o', heavy_ratio=0.1), 'heavy_ratio: it needs the other one of'),
        (
            dict(ratio=0.5, selection='h2o', heavy_ratio=0.1, recent_ratio=0.1),
            'ratio: heavy_ratio and recent_ratio',
        ),
        (dict(window=4, selection='h2o', heavy_ratio=0.1, recent_ratio=0.1), 'window: heavy_ratio and'),
        (
            dict(selection='h2o', heavy_ratio=0.6, recent_ratio=0.6),
            'heavy_ratio: expected at most 1 together',
        ),
        (
            dict(selection='h2o', heavy_ratio=0.1, recent_ratio=0.2, step=2),
            'step: 2 needs a window in whole steps',
        ),
        (
            dict(ratio=0.5, allocation='pyramidal'),
            "allocation: expected one of ['uniform', 'adaptive', 'pyramid', ",
        ),
        (
            dict(ratio=0.5, allocation='uniform', alpha=0.5),
            "alpha: it is read with allocation='attention_based', ",
        ),
        (
            dict(ratio=0.5, allocation='pyramid', beta=5),
            "beta: it is read with allocation='adaptive', not with ",
        ),
        (
            dict(ratio=0.5, selection='h2o', gamma=5),
            "gamma: it is read with selection='cake' or selection='hace'",
        ),
        (
            dict(ratio=0.5, heavy_ratio=0.1, recent_ratio=0.1),
            "heavy_ratio: it is read with selection='h2o', not",
        ),
        (dict(ratio=0.5, window=5, step=2), 'window: expected whole steps of 2 tokens, got 5; write 6'),
        (dict(ratio=0.5, sinks=1, step=2), 'sinks: expected whole steps of 2 tokens, got 1; write 2'),
        (dict(tokens=32), 'tokens: expected at least window + sinks + minimum = 33, got 32; write 33'),
        (dict(ratio=0.5, kernel=4), 'kernel: expected an odd number, got 4; write 5'),
        (dict(ratio=0.5, window=1), "window: allocation='attention_based' needs the variance over 2 queries"),
        (
            dict(ratio=0.5, selection='hace', strategy='attention', mix=0.5),
            "mix: strategy='attention' reads the",
        ),
        (
            dict(ratio=0.5, selection='hace', strategy='time_decay', rho=1),
            "rho: strategy='time_decay' needs rho < 1",
        ),
        (
            dict(ratio=0.5, selection='hace', strategy='attention', rho=0.5),
            "rho: strategy='attention' has rho = 1",
        ),
    ],
)
def test_impossible_choices_are_refused(given, text):
    lines = mistakes(**given)
    assert any(line.startswith(text) for line in lines), lines
    with pytest.raises(ValueError, match='Value error'):
        BudgetConfig(**given)


def test_impossible_choices_are_reported_beside_wrong_values():
    lines = mistakes(ratio=0.5, selection='h2o', gamma=5.0, step='2', sinks=-1)
    assert [line.split(':')[0] for line in lines] == ['sinks', 'step', 'gamma']


WRONG = {
    'ratio': [0, 1.5, 'half'], 'tokens': [0, 2.5], 'window': [0, True], 'sinks': [-1], 'minimum': [-1],
    'step': [0], 'per_head': ['yes'], 'beta': [0.5], 'alpha': [-0.1, 1.1], 'tau1': [0], 'tau2': [0.01],
    'preference': ['inverse'], 'heavy_ratio': [0], 'recent_ratio': [2], 'rho': [0, 1.5], 'gamma': [-1],
    'kernel': [0], 'strategy': ['none'], 'mix': [2], 'theta': [-1], 'allocation': [3], 'selection': [None],
}  # fmt: skip


MOVING = {'smoothing': [1], 'hysteresis': [2]}
"""Of budgets that follow the attention between searches."""


@pytest.mark.parametrize(('config', 'wrong'), [(BudgetConfig, WRONG), (NodeBudget, WRONG | MOVING)])
def test_every_field_refuses_nonsense_and_says_what_it_expects(config, wrong):
    assert set(wrong) == set(config.model_fields)
    for name, values in wrong.items():
        for value in values:
            lines = mistakes(config, **{name: value})
            line = next(line for line in lines if line.startswith(f'{name}: expected '))
            assert f'got {value!r}' in line


@pytest.mark.parametrize('name', list(MOVING))
def test_what_moves_between_searches_is_of_world_models_alone(name):
    chosen = {'ratio': 0.5, 'allocation': 'attention_based', name: 0.5}
    assert getattr(NodeBudget.read(chosen), name) == 0.5
    assert mistakes(**chosen)[0].startswith(f'{name}: there is no such field')
    (line,) = mistakes(NodeBudget, **chosen | dict(allocation='adaptive'))
    assert line.startswith(f"{name}: it is read with allocation='attention_based', not with ")
