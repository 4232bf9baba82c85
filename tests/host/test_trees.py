"""Searches whose nodes share their roots' histories: the same keys and values as histories of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.lightzero.inference import flights
from lzero_kv.lightzero.inference import session as engine
from lzero_kv.lightzero.inference.events import NodesExpanded, Observer
from lzero_kv.lightzero.inference.trees import SearchTrees
from lzero_kv.validation.oracle import Oracle
from testing.episodes import Episodes
from testing.judging import judge_nodes, judge_reanalysis, judge_roots
from testing.models import make_policy, world_model_of
from testing.precision import precision
from testing.reanalysis import reanalyze

from .plays import assert_same_play, fail_with_nan

ROWS = 3


@pytest.fixture
def always_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of the small families are shorter than those that are shared by default."""
    monkeypatch.setattr(flights, 'SHARED_FROM', 1)


def shared_policy(family: str = 'tiny', **options: Any) -> Any:
    defaults = dict(
        kv=True, num_simulations=14, collector_env_num=ROWS, evaluator_env_num=1, infer_context_length=5,
        dtype=torch.float64,
    )  # fmt: skip
    return make_policy(family, **defaults | options)


def nodes_of(policy: Any) -> dict[str, Any]:
    return world_model_of(policy).kv_cache_manager.get_stats_summary()['nodes']


@pytest.mark.parametrize('context', [1, 2, 4, 12])
@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous'])
def test_every_node_equals_its_recomputation(always_shared: None, family: str, context: int) -> None:
    """Short windows overflow at once, one of four steps in the midst of searches, the longest never."""
    policy = shared_policy(family, infer_context_length=context)
    roots = Episodes(policy, range(ROWS), lengths={1: [3], 2: [4, 2]}).run(7)
    for verdict in (judge_roots(policy, roots, 'rebuild'), judge_nodes(policy, roots, 'rebuild')):
        assert verdict.wrong == 0, str(verdict)
    found = nodes_of(policy)
    assert found['hit_rate'] == 1.0 and found['rebuilt_tokens'] == 0
    assert (found['window_tokens'] > 0) == (context < 12)


@pytest.mark.parametrize('family', ['tiny', 'cartpole'])
def test_keys_and_values_are_those_of_a_history_of_its_own(
    always_shared: None, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[SearchTrees] = []
    monkeypatch.setattr(SearchTrees, '__init__', _noting(SearchTrees.__init__, kept))
    policy = shared_policy(family, infer_context_length=9)
    roots = Episodes(policy, range(ROWS), lengths={1: [2]}).run(3)[-ROWS:]
    oracle = Oracle(world_model_of(policy), 'rebuild')
    with precision(torch.float64):
        for row, root in enumerate(roots):
            answers = {0: oracle.root(root.observations, root.actions)}
            for node in root.nodes:
                answers[node.number] = oracle.child(
                    answers[node.parent], node.action, torch.from_numpy(node.latent)
                )
            for number, answer in answers.items():
                window = answer.window
                blocks = [
                    part for layer in oracle.layers for part in (window.keys[layer], window.values[layer])
                ]
                expected = torch.stack([torch.stack(block).flatten(1) for block in blocks])
                history = torch.cat(kept[-1].history(row, number))
                torch.testing.assert_close(history, expected, rtol=0, atol=1e-9)


def _noting(original: Any, kept: list[SearchTrees]) -> Any:
    def __init__(self: SearchTrees, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        kept.append(self)

    return __init__


def test_a_planted_fault_is_seen(always_shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that sees another node in its parent's place."""
    path_to = SearchTrees._path_to

    def wrong_path(self: SearchTrees, nodes: np.ndarray) -> np.ndarray:
        path = path_to(self, nodes)
        path[1, -1:] = np.where(path[1, -1:] > 1, path[1, -1:] - 1, path[1, -1:])
        return path

    monkeypatch.setattr(SearchTrees, '_path_to', wrong_path)
    policy = shared_policy(infer_context_length=9)
    roots = Episodes(policy, range(ROWS)).run(1)
    verdict = judge_nodes(policy, roots, 'rebuild')
    assert 0 < verdict.wrong < verdict.total


def test_reanalysis_shares_too(always_shared: None) -> None:
    policy = shared_policy(num_simulations=9)
    verdict = judge_reanalysis(policy, reanalyze(policy, 2), 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    manager = policy._target_model.world_model.kv_cache_manager
    assert manager.tree_bytes > 0
    assert manager.bytes == manager.slab.bytes + manager.tree_bytes


def test_nodes_that_do_not_fit_together_get_slots_of_their_own(always_shared: None) -> None:
    """The trees need more than what ``max_bytes`` leaves beside the roots; the pool grows into it instead."""
    row_bytes = world_model_of(shared_policy()).kv_cache_manager.layout.row_bytes
    tight = (ROWS + 1) * (3 + 4 + 1) * row_bytes + 9 * row_bytes
    policy = shared_policy(kv_cache=dict(max_bytes=tight), num_simulations=60)
    roots = Episodes(policy, range(ROWS)).run(3)
    manager = world_model_of(policy).kv_cache_manager
    assert manager.tree_bytes == 0 and manager.bytes <= tight
    verdict = judge_nodes(policy, roots[-ROWS:], 'rebuild')
    assert verdict.wrong == 0, str(verdict)


@pytest.mark.parametrize('most', [60, 400])
def test_bytes_stay_under_their_bound(always_shared: None, most: int) -> None:
    row_bytes = world_model_of(shared_policy()).kv_cache_manager.layout.row_bytes
    policy = shared_policy(kv_cache=dict(max_bytes=most * row_bytes))
    Episodes(policy, range(ROWS), record=False).run(6)
    manager = world_model_of(policy).kv_cache_manager
    assert 0 < manager.tree_bytes < manager.bytes <= most * row_bytes
    summary = manager.get_stats_summary()
    assert summary['total']['bytes'] == manager.bytes


def test_evicted_windows_are_computed_again(always_shared: None) -> None:
    policy = shared_policy(
        infer_context_length=3, num_simulations=24, kv_cache=dict(recurrent_slots=ROWS, policy='fifo')
    )
    roots = Episodes(policy, range(ROWS)).run(4)
    verdict = judge_nodes(policy, roots, 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    assert nodes_of(policy)['evictions'] > 0 and nodes_of(policy)['rebuilt_tokens'] > 0


@pytest.mark.parametrize('where', ['clear_recur_cache', 'clear_init_caches', 'clear_caches'])
def test_a_clear_within_a_search_changes_no_answer(always_shared: None, where: str) -> None:
    expected = Episodes(shared_policy(), range(ROWS), record=False).run(4)
    policy = shared_policy()
    model = world_model_of(policy)

    class Clearing(Observer):
        def nodes_expanded(self, event: NodesExpanded) -> None:
            if event.simulation in (2, 5, 9):
                getattr(model, where)()

    model.observers.append(Clearing())
    roots = Episodes(policy, range(ROWS), record=False).run(4)
    assert_same_play(roots, expected)


def test_nan_leaves_no_trace_in_the_trees(always_shared: None) -> None:
    policy, undisturbed = shared_policy(), shared_policy()
    fail_with_nan(policy, range(ROWS))
    roots = Episodes(policy, range(ROWS)).run(4)
    assert_same_play(roots, Episodes(undisturbed, range(ROWS)).run(4))


def test_shared_and_separate_histories_play_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plays = []
    for shared_from in (1, 1000):
        monkeypatch.setattr(flights, 'SHARED_FROM', shared_from)
        policy = shared_policy(num_simulations=50)
        plays.append(
            Episodes(policy, range(ROWS), lengths={0: [2, 5]}).run([{0, 1, 2}, {1}, {0, 2}, {0, 1, 2}])
        )
        assert (world_model_of(policy).kv_cache_manager.tree_bytes > 0) == (shared_from == 1)
    assert_same_play(*plays)


def test_memory_grows_with_what_is_new() -> None:
    """Of LightZero's memory shape: at least ten times less than a slot for every node."""
    policy = make_policy(
        'memory', kv=True, collector_env_num=ROWS, evaluator_env_num=1, infer_context_length=81
    )
    Episodes(policy, range(ROWS), record=False).run(2)
    manager = world_model_of(policy).kv_cache_manager
    nodes = ROWS * manager.layout.row_bytes * (world_model_of(policy)._num_simulations + 1)
    trees = nodes_of(policy)['bytes']
    assert engine.MOVED_NODES < 5
    # a node's two tokens once, and room for a path of all simulations beside each root
    assert trees < nodes / 4 and manager.tree_bytes < nodes / 20
