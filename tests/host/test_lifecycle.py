"""What installing, building policies and uninstalling do to the host, and what they refuse."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import inspect
import sys
from typing import Any

import pytest

import lzero_kv
from testing.episodes import Episodes
from testing.models import collect_model, make_policy, world_model_of

from .host_state import changed, host_attributes
from .plays import assert_same_play

CONSTRUCTORS = {
    'lzero.model.unizero_model.WorldModel',
    'lzero.model.sampled_unizero_model.WorldModel',
    'lzero.policy.unizero.UniZeroPolicy.__init__',
}
"""All that is replaced as long as no world model with the flag was built."""
HOT = {
    'lzero.mcts.tree_search.mcts_ctree.UniZeroMCTSCtree.search',
    'lzero.mcts.tree_search.mcts_ctree_sampled.SampledUniZeroMCTSCtree.search',
    'lzero.mcts.buffer.game_buffer_sampled_unizero.SampledUniZeroGameBuffer.sample',
    'lzero.mcts.buffer.game_buffer_sampled_unizero.SampledUniZeroGameBuffer._compute_target_policy_reanalyzed',
    'lzero.worker.muzero_collector.MuZeroCollector._output_log',
    'lzero.worker.muzero_collector.MuZeroCollector.collect',
    'lzero.worker.muzero_segment_collector.MuZeroSegmentCollector._output_log',
    'lzero.worker.muzero_segment_collector.MuZeroSegmentCollector.collect',
}
SMALL = dict(num_simulations=2, collector_env_num=2, evaluator_env_num=1)


def small_policy(family: str = 'tiny', **options: Any) -> Any:
    return make_policy(family, **{**SMALL, **options})


@pytest.fixture(scope='module', autouse=True)
def everything_loaded() -> None:
    """What the first policy of a process imports and registers is no change that a later one makes."""
    for family in ('tiny', 'lunarlander_continuous'):
        for kv in (False, True):
            small_policy(family, kv=kv)
    lzero_kv.uninstall()


def test_installing_replaces_constructors_only() -> None:
    before = host_attributes()
    lzero_kv.install()
    assert changed(before, host_attributes()) == CONSTRUCTORS


def test_uninstalling_leaves_the_host_as_it_was() -> None:
    before = host_attributes()
    lzero_kv.install()
    lzero_kv.uninstall()
    assert changed(before, host_attributes()) == set()


@pytest.mark.parametrize('family', ['tiny', 'lunarlander_continuous'])
def test_uninstalling_after_a_flag_on_policy_leaves_the_host_as_it_was(family: str) -> None:
    before = host_attributes()
    policy = small_policy(family, kv=True)
    assert changed(before, host_attributes()) == CONSTRUCTORS | HOT
    Episodes(policy, range(2), record=False).run(2)
    lzero_kv.uninstall()
    assert changed(before, host_attributes()) == set()


def test_installing_twice_is_the_same_as_once() -> None:
    before = host_attributes()
    lzero_kv.install()
    once = host_attributes()
    lzero_kv.install()
    assert changed(once, host_attributes()) == set()
    lzero_kv.uninstall()
    assert changed(before, host_attributes()) == set()


def test_two_flag_on_policies_replace_the_searches_once() -> None:
    before = host_attributes()
    small_policy(kv=True)
    once = host_attributes()
    small_policy(kv=True)
    assert changed(once, host_attributes()) == set()
    lzero_kv.uninstall()
    assert changed(before, host_attributes()) == set()


def test_uninstalling_what_is_not_installed_changes_nothing() -> None:
    before = host_attributes()
    lzero_kv.uninstall()
    assert changed(before, host_attributes()) == set()


def test_it_can_be_installed_again() -> None:
    small_policy(kv=True)
    lzero_kv.uninstall()
    policy = small_policy(kv=True)
    assert world_model_of(policy).kv_cache_manager.env_num == 3


@pytest.mark.parametrize('family', ['tiny', 'lunarlander_continuous'])
def test_with_the_flag_off_no_method_of_the_host_is_replaced(family: str) -> None:
    from lzero.model.unizero_world_models.world_model import WorldModel

    before = host_attributes()
    importlib.import_module('lzero_kv.plugin')
    lzero_kv.install()  # the plugin may have been imported by an earlier test
    policy = small_policy(family, kv=False, world_model=dict(use_new_cache_manager=False))
    Episodes(policy, range(2), record=False).run(2)
    assert changed(before, host_attributes()) == CONSTRUCTORS
    assert (
        type(policy).__name__
        == {'tiny': 'UniZeroPolicy', 'lunarlander_continuous': 'SampledUniZeroPolicy'}[family]
    )
    assert type(policy).__module__.startswith('lzero.policy')
    assert type(world_model_of(policy)) is WorldModel
    for name in ('_forward_collect', '_forward_eval', '_reset_collect', '_reset_eval', '_forward_learn'):
        assert name not in vars(policy)


def test_importing_the_plugin_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, 'lzero_kv.plugin', raising=False)
    before = host_attributes()
    importlib.import_module('lzero_kv.plugin')
    assert changed(before, host_attributes()) == CONSTRUCTORS


@pytest.mark.parametrize('version', ['0.1.0', '0.2.1', '0.3.0'])
def test_an_unknown_host_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host_attributes()
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: version)
    match = rf'expected LightZero 0\.2\.0 or main 2026-08, found LightZero {version}'
    with pytest.raises(RuntimeError, match=match):
        lzero_kv.install()
    assert changed(before, host_attributes()) == set()


def test_a_missing_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    before = host_attributes()
    monkeypatch.setattr(importlib.metadata, 'version', version)
    match = r'expected LightZero 0\.2\.0 or main 2026-08, found none; install it as its README says'
    with pytest.raises(RuntimeError, match=match):
        lzero_kv.install()
    assert changed(before, host_attributes()) == set()


@pytest.mark.parametrize('flag', ['yes', 'False', 1, 0, None])
def test_a_flag_of_a_wrong_type_is_refused(flag: Any) -> None:
    lzero_kv.install()
    before = host_attributes()
    with pytest.raises(
        TypeError, match='expected use_new_cache_manager=True or False in world_model_cfg, got '
    ):
        small_policy(kv=False, world_model=dict(use_new_cache_manager=flag))
    assert changed(before, host_attributes()) == set()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(kv_cache=dict(polcy='lru', max_bytes=-1)), r'2 mistake\(s\) in world_model_cfg\.kv_cache'),
        (dict(world_model=dict(tokens_per_block=3)), 'tokens_per_block=3: expected 2'),
        (dict(world_model=dict(cache_validation_mode='both')), "expected False, 'recompute' .* or 'model'"),
        (dict(kv_cache=dict(padding='host')), r"padding: 'host' is gone; .* leave padding out"),
        (dict(kv_cache=dict(validation_rate=2.0)), r'expected a number in \[0, 1\], got 2.0'),
        (dict(kv_cache=dict(max_bytes=1000)), r'max_bytes=1,000 is too small'),
        (dict(kv_cache=dict(max_bytes=17_280)), r'max_bytes=17,280 is too small: a search of 2 environments'),
        (dict(kv_cache=dict(window_slots=1)), r'window_slots=1: expected at least 2'),
    ],
)
def test_an_impossible_cache_is_refused_when_the_policy_is_built(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_policy(kv=True, **options)


def test_a_stock_model_is_refused_by_a_policy_with_the_flag() -> None:
    stock = small_policy(kv=False)
    lzero_kv.install()
    config = copy.deepcopy(stock._cfg)
    config.model.world_model_cfg.use_new_cache_manager = True
    before = host_attributes()
    with pytest.raises(RuntimeError, match=r'expected a model that was built after lzero_kv\.install'):
        type(stock)(config, model=collect_model(stock), enable_field=['learn', 'collect', 'eval'])
    assert changed(before, host_attributes()) == set()


@pytest.mark.parametrize('kv', [False, True])
@pytest.mark.parametrize('family', ['tiny', 'lunarlander_continuous'])
def test_a_search_takes_its_arguments_by_the_hosts_names(family: str, kv: bool) -> None:
    small_policy(family, kv=True)  # replaces the searches, those of stock models too
    policy, positional = (small_policy(family, kv=kv) for _ in range(2))
    search = policy._mcts_collect.search
    names = list(inspect.signature(search).parameters)
    assert names[2:5] == ['latent_state_roots', 'to_play_batch', 'timestep']
    policy._mcts_collect.search = lambda *given: search(**dict(zip(names, given, strict=False)))
    plays = [Episodes(one, range(2), record=False).run(2) for one in (policy, positional)]
    assert_same_play(*plays)


def test_a_policy_that_exists_goes_on_after_uninstalling() -> None:
    policy = small_policy(kv=True, kv_cache=dict(window='shift'))
    episodes = Episodes(policy, range(2), record=False)
    episodes.run(2)
    lzero_kv.uninstall()
    episodes.run(2)
    roots = world_model_of(policy).kv_cache_manager.stats_snapshot()['roots']
    assert (
        roots.hits == roots.queries >= 6
    )  # two environments, three continued steps; nodes ask for roots, too
    assert roots.rebuilt_tokens == 0
