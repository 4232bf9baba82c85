"""With no fault planted, validation finds every row accounted for, and changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import collect_model, load_weights, make_policy, random_weights, world_model_of
from testing.reanalysis import reanalyze

from .plays import assert_same_play
from .test_operators import Operators
from .validated import MODES, WINDOWS, assert_accounted, counters_of, validated_policy

BOTH_MODES = pytest.mark.parametrize('mode', MODES)
FAMILIES_PLAYED = ('tiny', 'cartpole', 'lunarlander_continuous', 'memory', 'atari')


def eventful_run(policy: Any, family: str, environments: int = 4) -> tuple[int, int]:
    """Uneven episodes, subsets of ready environments, an evaluation in between, weights loaded in mid-run.

    Returns the rows of all root inferences, and of all searches.
    """
    everyone = set(range(environments))
    schedule = [everyone, everyone, {1, 2}, everyone, everyone, {3}, everyone]
    options: dict[str, Any] = dict(record=False, timesteps=FAMILIES[family].timesteps)
    collection = Episodes(policy, range(environments), lengths={1: [3, 4], 2: [2]}, **options)
    roots = len(collection.run(schedule))
    roots += len(Episodes(policy, [10, 11], mode='eval', lengths={10: [2], 11: [2]}, **options).run(2))
    roots += len(collection.run(2))
    load_weights(policy, random_weights(collect_model(policy), seed=5))
    roots += len(collection.run(3))
    return roots, roots * policy._cfg.num_simulations


def cases() -> list[Any]:
    """Each family in both windows and in both modes; the other half of the combinations are slow tests."""
    return [
        pytest.param(family, window, mode, marks=[pytest.mark.slow] * ((row + column + number) % 2))
        for row, family in enumerate(FAMILIES_PLAYED)
        for column, window in enumerate(WINDOWS)
        for number, mode in enumerate(MODES)
    ]


@pytest.mark.parametrize(('family', 'window', 'mode'), cases())
def test_nothing_is_found_where_nothing_is_wrong(family: str, window: str, mode: str, tmp_path: Path) -> None:
    policy = validated_policy(
        mode,
        tmp_path,
        family=family,
        environments=4,
        evaluator_env_num=2,
        num_simulations=3,
        kv_cache=dict(window=window),
    )
    roots, nodes = eventful_run(policy, family)
    counters = counters_of(policy)
    for kind in (counters.roots, counters.nodes):
        assert_accounted(kind)
    assert (counters.roots.compared, counters.nodes.compared) == (roots, nodes)
    assert counters.searches == counters.validated == 14
    assert not list(tmp_path.iterdir())


@BOTH_MODES
@pytest.mark.parametrize('choice', ['lru', 'priority'])
def test_evicted_windows_that_are_computed_again_are_right(choice: str, mode: str, tmp_path: Path) -> None:
    """Computed again, they are equal up to rounding; only what is still stored must equal to the last bit."""
    tight = dict(window_slots=3, policy=choice)
    policy = validated_policy(mode, tmp_path, num_simulations=10, kv_cache=tight)
    Episodes(policy, range(3), record=False).run(3)
    counters = counters_of(policy)
    assert_accounted(counters.total)
    assert counters.nodes.compared == 3 * 3 * 10
    stats = world_model_of(policy).kv_cache_manager.stats_snapshot()['nodes']
    assert stats.evictions > 0 and stats.rebuilt_tokens > 0


@BOTH_MODES
@pytest.mark.parametrize('window', WINDOWS)
def test_reanalysis_is_silent(window: str, mode: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path, environments=8, kv_cache=dict(window=window))
    for _ in range(2):
        reanalyze(policy, 2)
    counters = policy._target_model.world_model.validation
    assert_accounted(counters.total)
    assert counters.reanalysis.compared == 2 * 2 * 4 * 4
    assert counters_of(policy).total.compared == 0, 'the acting model has its own counters'


@BOTH_MODES
def test_of_a_large_reanalysis_whole_sequences_are_compared(mode: str, tmp_path: Path) -> None:
    """As many as LightZero has room for: eight environments, two sequences of four roots."""
    policy = validated_policy(mode, tmp_path, environments=8)
    reanalyze(policy, 3)
    counters = policy._target_model.world_model.validation
    assert_accounted(counters.total)
    assert counters.reanalysis.compared == 2 * 4 * 4


@BOTH_MODES
@pytest.mark.parametrize('clear', ['clear_caches', 'clear_init_caches', 'clear_recur_cache'])
def test_clearing_is_no_loss(clear: str, mode: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path)
    episodes = Episodes(policy, range(3), record=False)
    for _ in range(3):
        episodes.run(2)
        getattr(world_model_of(policy), clear)()
    episodes.run(1)
    assert_accounted(counters_of(policy).total)


@BOTH_MODES
@pytest.mark.parametrize('window', WINDOWS)
def test_validation_changes_nothing(window: str, mode: str, tmp_path: Path) -> None:
    """To the last bit: it computes beside, draws no random number and touches no entry."""
    choices = dict(window=window)
    plain = make_policy(
        'tiny', kv=True, kv_cache=choices, collector_env_num=3, evaluator_env_num=1, num_simulations=8
    )
    validated = validated_policy(mode, tmp_path, kv_cache=choices, num_simulations=8)
    schedule = [{0, 1, 2}, {0, 1, 2}, {0, 2}, {0, 1, 2}, {0, 1, 2}]
    torch.manual_seed(3)
    expected = Episodes(plain, range(3), lengths={1: [2]}).run(schedule)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    roots = Episodes(validated, range(3), lengths={1: [2]}).run(schedule)
    assert assert_same_play(roots, expected, tolerance=0.0) == 0.0
    assert torch.equal(torch.rand(1), drawn)
    before, after = (
        world_model_of(policy).kv_cache_manager.stats_snapshot() for policy in (plain, validated)
    )
    for kind in ('roots', 'nodes'):
        assert before[kind].hits == after[kind].hits and before[kind].misses == after[kind].misses


@pytest.mark.parametrize('rate, validated', [(0.25, 2), (0.0, 0), (1.0, 8)])
def test_a_part_of_the_searches_and_all_roots(rate: float, validated: int, tmp_path: Path) -> None:
    policy = validated_policy('model', tmp_path, kv_cache=dict(validation_rate=rate))
    Episodes(policy, range(3), record=False).run(8)
    counters = counters_of(policy)
    assert_accounted(counters.total)
    assert (counters.searches, counters.validated) == (8, validated)
    assert (counters.roots.compared, counters.nodes.compared) == (8 * 3, validated * 3 * 4)


def operators_of(world_model: dict[str, Any]) -> Any:
    """All that is dispatched in two steps of two environments; of a validation, at the roots alone."""
    policy = make_policy(
        'tiny',
        kv=True,
        kv_cache=dict(validation_rate=0.0),
        collector_env_num=2,
        evaluator_env_num=1,
        num_simulations=5,
        world_model=world_model,
    )
    episodes = Episodes(policy, range(2), record=False)
    with Operators() as operators:
        episodes.run(2)
    return operators.counts


def test_off_costs_nothing() -> None:
    without = operators_of({})
    assert operators_of(dict(cache_validation_mode=False)) == without
    on = operators_of(dict(cache_validation_mode='store'))
    assert sum(on.values()) > sum(without.values()), 'the counter sees a validation'


def test_without_it_there_is_no_validator_and_no_counter() -> None:
    policy = make_policy('tiny', kv=True, num_simulations=2, world_model=dict(cache_validation_mode=False))
    Episodes(policy, range(8), record=False).run(1)
    model = world_model_of(policy)
    assert model.validation is None and model.validator is None and model.observers == []


def test_a_copied_model_counts_for_itself(tmp_path: Path) -> None:
    policy = validated_policy('store', tmp_path)
    Episodes(policy, range(3), record=False).run(1)
    model = world_model_of(policy)
    copied = copy.deepcopy(model)
    assert copied.validation is not model.validation
    assert copied.validation.total.compared == 0 < model.validation.total.compared
    assert copied.validator is None and copied.observers == []
    assert policy._target_model.world_model.validation is not model.validation
