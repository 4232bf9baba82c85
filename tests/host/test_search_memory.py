"""Windows, paths and steps of a search: the keys and values of histories of their own, in bounded memory."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.cache.storage import KVStorage
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


@pytest.mark.parametrize(
    ('family', 'window'), [('tiny', 'rebuild'), ('tiny', 'shift'), ('cartpole', 'shift')]
)
def test_memory_that_cannot_hold_the_rows_is_refused_when_the_policy_is_built(
    family: str, window: str
) -> None:
    """The least that is accepted serves searches; float32, as the host builds its models."""
    options: dict[str, Any] = dict(dtype=torch.float32, num_simulations=6)
    policy = search_policy(family, kv_cache=dict(window=window), **options)
    session = world_model_of(policy).session
    beside = Search.elements(session, ROWS, 6, 0 if window == 'rebuild' else 6) * 4
    least = (2 * (ROWS + 1) + ROWS + 1) * session.manager.layout.row_bytes
    least += -(-beside // session.manager.layout.row_bytes) * session.manager.layout.row_bytes
    with pytest.raises(ValueError, match=rf'a search of 3 environments works with {beside:,} bytes beside'):
        search_policy(family, kv_cache=dict(window=window, max_bytes=least - 1), **options)
    tight = search_policy(family, kv_cache=dict(window=window, max_bytes=least), **options)
    Episodes(tight, range(ROWS), record=False).run(7)


@pytest.mark.parametrize('window', ['rebuild', 'shift'])
def test_fewer_windows_than_rows_are_refused_where_searches_derive_windows(window: str) -> None:
    kv_cache = dict(window=window, window_slots=ROWS - 1)
    if window == 'rebuild':
        with pytest.raises(ValueError, match='window_slots=2: expected at least 3, one window for each'):
            search_policy(kv_cache=kv_cache)
    else:
        Episodes(search_policy(kv_cache=kv_cache), range(ROWS), record=False).run(7)


def test_sizes_that_are_refused_change_nothing() -> None:
    policy, undisturbed = (search_policy(kv_cache=dict(window_slots=ROWS)) for _ in range(2))
    model, plays = world_model_of(policy), []
    for one in (policy, undisturbed):
        episodes = Episodes(one, range(ROWS))
        episodes.run(3)
        plays.append(episodes)
    session = model.session
    for sizes in ((10**8, 5), (ROWS + 1, 14, ROWS + 1)):
        with pytest.raises(ValueError, match='kv_cache'):
            model.expect(*sizes)
    assert model.session is session
    assert_same_play(plays[0].run(3), plays[1].run(3))


@pytest.mark.parametrize('most', [120_000, 150_000, 180_000, 200_000])
def test_bytes_stay_under_their_bound_while_the_pool_grows(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No view of the old tensor outlives it: else the bytes of both would stand beside each other."""
    policy = search_policy(
        infer_context_length=3, num_simulations=50, dtype=torch.float32, collector_env_num=2,
        kv_cache=dict(max_bytes=most),
    )  # fmt: skip
    manager = world_model_of(policy).kv_cache_manager
    new, replace, made, grown, copied = KVStorage._new, KVStorage._replace, [], [], [0]

    def counted_new(storage: KVStorage, slots: int) -> torch.Tensor:
        tensor = new(storage, slots)
        made.append(weakref.ref(tensor.untyped_storage()))
        alive = sum(one.nbytes() for one in (reference() for reference in made) if one is not None)
        grown.append(alive + copied[0] + manager.search_bytes)
        return tensor

    def counted_replace(storage: KVStorage, slots: int, keep: int) -> None:
        copied[0] = keep * manager.layout.row_bytes
        replace(storage, slots, keep)
        copied[0] = 0

    monkeypatch.setattr(KVStorage, '_new', counted_new)
    monkeypatch.setattr(KVStorage, '_replace', counted_replace)
    Episodes(policy, range(2), record=False).run(5)
    assert len(grown) > 2 and max(grown) <= most


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
