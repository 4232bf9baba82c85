"""Windows, paths and steps of a search: the keys and values of histories of their own, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.lightzero.inference.events import NodesExpanded, Observer
from lzero_kv.lightzero.inference.expand import Search
from lzero_kv.lightzero.inference.tree import Parents, SearchTree
from testing.episodes import Episodes
from testing.judging import judge_nodes, judge_reanalysis, judge_roots
from testing.models import collect_model, make_policy, world_model_of
from testing.reanalysis import reanalyze

from .plays import assert_same_play, fail_with_nan

ROWS = 3


def search_policy(family: str = 'tiny', **options: Any) -> Any:
    defaults = dict(
        kv=True, num_simulations=14, collector_env_num=ROWS, evaluator_env_num=1, infer_context_length=5,
        dtype=torch.float64,
    )  # fmt: skip
    return make_policy(family, **defaults | options)


def nodes_of(policy: Any) -> dict[str, Any]:
    return world_model_of(policy).kv_cache_manager.get_stats_summary()['nodes']


@pytest.mark.parametrize('context', [1, 2, 4, 12])
@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous'])
def test_every_node_equals_its_recomputation(family: str, context: int) -> None:
    """Short windows overflow at once, one of four steps in the midst of searches, the longest never."""
    policy = search_policy(family, infer_context_length=context)
    roots = Episodes(policy, range(ROWS), lengths={1: [3], 2: [4, 2]}).run(7)
    for verdict in (judge_roots(policy, roots, 'rebuild'), judge_nodes(policy, roots, 'rebuild')):
        assert verdict.wrong == 0, str(verdict)
    found = nodes_of(policy)
    assert found['evictions'] == found['rebuilt_tokens'] == 0
    assert (found['window_tokens'] > 0) == (context < 12)


def test_long_windows_that_fill_evict_nothing_by_default() -> None:
    """28 tokens, of which 25 are kept: full after 12 steps, so that each node of 8 more loses a step."""
    policy = search_policy('tiny', infer_context_length=14)
    Episodes(policy, range(ROWS), record=False).run(20)
    found = nodes_of(policy)
    assert found['evictions'] == found['rebuilt_tokens'] == 0
    assert found['misses'] > 100


def test_a_model_in_bfloat16_is_refused_in_words() -> None:
    policy = search_policy('tiny', dtype=torch.float32)
    collect_model(policy).to(torch.bfloat16)
    with pytest.raises(TypeError, match='the world model is in bfloat16, which LightZero cannot search with'):
        Episodes(policy, range(ROWS), record=False).run(1)
    with pytest.raises(TypeError, match='the world model is in bfloat16, which LightZero cannot search with'):
        search_policy('tiny', dtype=torch.bfloat16)


def _another_path(tree: SearchTree, path: np.ndarray) -> np.ndarray:
    path = path.copy()
    path[1, -1:] = np.where(path[1, -1:] > 1, path[1, -1:] - 1, path[1, -1:])
    return path


def _one_too_few(tree: SearchTree, path: np.ndarray) -> np.ndarray:
    return path[:, -1:]


@pytest.mark.parametrize('wrong', [_another_path, _one_too_few], ids=['another', 'short'])
def test_a_wrong_path_is_seen(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = SearchTree.path
    monkeypatch.setattr(SearchTree, 'path', lambda tree, parents: wrong(tree, right(tree, parents)))
    policy = search_policy(infer_context_length=9)
    roots = Episodes(policy, range(ROWS)).run(1)
    verdict = judge_nodes(policy, roots, 'rebuild')
    assert 0 < verdict.wrong < verdict.total


@pytest.mark.parametrize('what', ['windows', 'below', 'lengths'])
def test_a_wrong_number_of_a_parent_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row looks at the root's window, leaves the path out, or counts a step too few."""
    of = SearchTree.of

    def wrong(tree: SearchTree, parents: np.ndarray) -> Parents:
        right = of(tree, parents)
        changed = getattr(right, what).copy()
        changed[2] = max(changed[2] - 2, 1) if what == 'lengths' else 0
        return right._replace(**{what: changed})

    monkeypatch.setattr(SearchTree, 'of', wrong)
    policy = search_policy(infer_context_length=5)
    roots = Episodes(policy, range(ROWS)).run(4)
    verdict = judge_nodes(policy, roots, 'rebuild')
    assert 0 < verdict.wrong < verdict.total


@pytest.mark.parametrize('context', [2, 5, 12])
def test_reanalysis_begins_with_roots_that_nothing_stored(context: int) -> None:
    policy = search_policy(num_simulations=9, infer_context_length=context)
    verdict = judge_reanalysis(policy, reanalyze(policy, 2), 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    manager = policy._target_model.world_model.kv_cache_manager
    assert manager.search_bytes > 0
    assert manager.bytes == manager.storage.bytes + manager.search_bytes


@pytest.mark.parametrize('spare', [0, 5, 9])
def test_nodes_whose_steps_have_no_room_get_windows_of_their_own(spare: int) -> None:
    """What ``max_bytes`` leaves beside the pools holds the rows, and steps of some simulations or none."""
    options = dict(num_simulations=21, infer_context_length=9)
    policy = search_policy(**options)
    session = world_model_of(policy).session
    beside = Search.elements(session, ROWS, 21, 0) * session.manager.layout.dtype.itemsize
    step = ROWS * 2 * session.geometry.column * session.manager.layout.dtype.itemsize
    tight = beside + spare * step + (2 * (ROWS + 1) + ROWS + 4) * session.manager.layout.row_bytes
    small = search_policy(kv_cache=dict(max_bytes=tight), **options)
    roots, expected = (Episodes(one, range(ROWS)).run(4) for one in (small, policy))
    manager = world_model_of(small).kv_cache_manager
    assert manager.bytes <= tight
    assert nodes_of(policy)['queries'] == 0 < nodes_of(small)['queries']
    assert judge_nodes(small, roots[-ROWS:], 'rebuild').wrong == 0
    assert_same_play(roots, expected)


def test_memory_that_cannot_hold_the_rows_is_refused() -> None:
    row_bytes = world_model_of(search_policy()).kv_cache_manager.layout.row_bytes
    policy = search_policy(kv_cache=dict(max_bytes=(2 * (ROWS + 1) + ROWS + 1) * row_bytes))
    with pytest.raises(RuntimeError, match=r'bytes beside the pools; raise kv_cache\.max_bytes='):
        Episodes(policy, range(ROWS)).run(1)


@pytest.mark.parametrize('most', [60, 400])
def test_bytes_stay_under_their_bound(most: int) -> None:
    row_bytes = world_model_of(search_policy()).kv_cache_manager.layout.row_bytes
    policy = search_policy(kv_cache=dict(max_bytes=most * row_bytes))
    Episodes(policy, range(ROWS), record=False).run(6)
    manager = world_model_of(policy).kv_cache_manager
    assert 0 < manager.search_bytes < manager.bytes <= most * row_bytes
    summary = manager.get_stats_summary()
    assert summary['total']['bytes'] == manager.bytes


def test_evicted_windows_are_computed_again() -> None:
    policy = search_policy(
        infer_context_length=3, num_simulations=24, kv_cache=dict(window_slots=ROWS, policy='fifo')
    )
    roots = Episodes(policy, range(ROWS)).run(4)
    verdict = judge_nodes(policy, roots, 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    assert nodes_of(policy)['evictions'] > 0 and nodes_of(policy)['rebuilt_tokens'] > 0


@pytest.mark.parametrize('where', ['clear_recur_cache', 'clear_init_caches', 'clear_caches'])
def test_a_clear_within_a_search_changes_no_answer(where: str) -> None:
    expected = Episodes(search_policy(), range(ROWS), record=False).run(4)
    policy = search_policy()
    model = world_model_of(policy)

    class Clearing(Observer):
        def nodes_expanded(self, event: NodesExpanded) -> None:
            if event.simulation in (2, 5, 9):
                getattr(model, where)()

    model.observers.append(Clearing())
    roots = Episodes(policy, range(ROWS), record=False).run(4)
    assert_same_play(roots, expected)


def test_nan_leaves_no_trace_in_the_memory() -> None:
    policy, undisturbed = search_policy(), search_policy()
    fail_with_nan(policy, range(ROWS))
    roots = Episodes(policy, range(ROWS)).run(4)
    assert_same_play(roots, Episodes(undisturbed, range(ROWS)).run(4))


def test_memory_grows_with_what_is_new() -> None:
    """Of LightZero's memory shape: at least ten times less than a slot for every node."""
    policy = make_policy(
        'memory', kv=True, collector_env_num=ROWS, evaluator_env_num=1, infer_context_length=81
    )
    Episodes(policy, range(ROWS), record=False).run(2)
    manager = world_model_of(policy).kv_cache_manager
    nodes = ROWS * manager.layout.row_bytes * (world_model_of(policy)._num_simulations + 1)
    # a node's two tokens once, and room for a path of all simulations beside each root
    assert nodes_of(policy)['bytes'] < nodes / 10 and manager.search_bytes < nodes / 15
