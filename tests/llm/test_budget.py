"""Defaults of language models' budgets."""

import pytest

from lzero_kv.budget import SELECTIONS, BudgetConfig
from lzero_kv.llm.budget import PromptBudget
from lzero_kv.llm.experiment.methods import Method

HYBRID = PromptBudget.hybrid


def test_the_default_is_hace_that_forgets_with_a_window_and_sinks():
    config = PromptBudget.read(dict(ratio=0.25))
    assert (config.selection, config.allocation, config.window, config.sinks) == (
        'hace', 'attention_based', 64, 4,
    )  # fmt: skip
    assert HYBRID and all(getattr(config, name) == value for name, value in HYBRID.items())
    assert config.selector().decay == HYBRID['rho'] < 1


@pytest.mark.parametrize('selection', SELECTIONS)
def test_every_selection_has_the_same_window_and_sinks_and_h2o_forgets_nothing(selection):
    config = PromptBudget.read(dict(ratio=0.25, selection=selection))
    assert (config.window, config.sinks) == (64, 4)
    assert config.selector().decay == (HYBRID['rho'] if selection == 'hace' else 1)
    assert Method.parse(f'{selection} 0.25').budget()['selection'] == selection


@pytest.mark.parametrize('given', [dict(rho=0.9), dict(strategy='time_decay'), dict(strategy='attention')])
def test_what_is_given_goes_before_the_defaults(given):
    config = PromptBudget.read(dict(ratio=0.25, sinks=1, **given))
    own = BudgetConfig.read(dict(ratio=0.25, selection='hace', **given))
    assert config.selector().decay == own.selector().decay != HYBRID['rho']
    assert config.sinks == 1


def test_a_config_is_taken_as_it_is():
    own = BudgetConfig.read(dict(ratio=0.25))
    assert PromptBudget.read(own) is own
    assert (own.selection, own.window, own.sinks) == ('cake', 32, 0)
