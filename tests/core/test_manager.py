"""The manager's own promises, one by one; the comparison with the reference is in test_machines.py."""

from __future__ import annotations

import copy
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
from easydict import EasyDict

from lzero_kv import KVCacheConfig, KVCacheManager, KVLayout
from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey
from lzero_kv.cache.stats import CacheStats

from .comparing import LAYOUT, Histories, same, tensors_of

WORLD_MODEL = EasyDict(num_layers=3, num_heads=2, embed_dim=10, context_length=7, num_simulations=11)
KEYS = [RootKey(2, 5), NodeKey(0, 4), RootKey(0, 5), NodeKey(1, 9)]


def manager(env_num: int = 4, **kv_cache: object) -> KVCacheManager:
    return KVCacheManager({**WORLD_MODEL, 'kv_cache': kv_cache}, env_num)


def filled() -> tuple[KVCacheManager, torch.Tensor]:
    """A manager with the histories of KEYS, and their keys and values (5 columns)."""
    made = manager()
    batch = Histories(LAYOUT, 0).batch([5, 3, 1, 4], [25, 23, 21, 24])
    made.store(KEYS, batch.kv, batch.lengths, batch.next_positions)
    return made, batch.kv


def test_sizes_follow_the_world_model():
    made = KVCacheManager(WORLD_MODEL, 4)
    assert made.layout == LAYOUT
    assert [pool.capacity for pool in made.init_pools] == [1] * 4
    assert made.recur_pool.capacity == 4, 'one window for each environment'
    assert (made.storage.slots, made.bytes, made.env_num) == (8, 0, 4)
    assert manager(window_slots=17, root_slots=3).storage.slots == 4 * 3 + 17


def test_a_batch_of_roots_and_nodes():
    made, kv = filled()
    slots = made.lookup([*KEYS, RootKey(1, 5), NodeKey(4, 0)])
    assert slots.dtype == np.int64
    assert slots[4:].tolist() == [NO_SLOT, NO_SLOT]
    assert (slots[0], slots[2]) == (2, 0)
    assert made.lengths(slots[:4]).tolist() == [5, 3, 1, 4]
    assert made.next_positions(slots[:4]).tolist() == [25, 23, 21, 24]
    assert torch.equal(made.load(slots[:4], newest=5), kv)
    summary = made.get_stats_summary()
    assert [summary[name]['queries'] for name in ('roots', 'nodes', 'total')] == [3, 3, 6]
    assert [summary[name]['hits'] for name in ('roots', 'nodes', 'total')] == [2, 2, 4]
    assert made.slots(KEYS).tolist() == slots[:4].tolist()
    assert made.get_stats_summary() == summary


@pytest.mark.parametrize('question', ['lengths', 'next_positions', 'load'])
def test_a_miss_has_no_length_and_no_position(question):
    made, _ = filled()
    with pytest.raises(ValueError, match='a negative one means a miss'):
        getattr(made, question)([3, NO_SLOT])


@pytest.mark.parametrize('env_id', [-1, 4, 1.5, None, 'a'])
def test_unknown_environments_are_refused_everywhere(env_id):
    made, _ = filled()
    before = made.get_stats_summary()
    text = r'env_id must be an integer in \[0, 4\)'
    for call in (
        lambda: made.lookup([KEYS[0], RootKey(env_id, 5)]),
        lambda: made.slots([RootKey(env_id, 5)]),
        lambda: made.store([NodeKey(9, 9), RootKey(env_id, 5)], torch.zeros(2, 6, 2, 7, 5), [1, 2], [1, 2]),
        lambda: made.get_init_cache(env_id, 5),
        lambda: made.set_init_cache(env_id, 5, Histories(LAYOUT, 0).entry(4)),
        lambda: made.hierarchical_get(env_id, 5),
        lambda: made.count_rebuilt(3, roots=True, env_id=env_id if env_id is not None else 99),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert made.get_stats_summary() == before


def test_unknown_kinds_of_keys_are_refused():
    made, _ = filled()
    before = made.get_stats_summary()
    with pytest.raises(TypeError, match='a RootKey or a NodeKey, got 7'):
        made.lookup([KEYS[0], 7])  # type: ignore[list-item]
    assert made.get_stats_summary() == before


def test_a_store_is_all_or_nothing():
    made, kv = filled()
    before = made.get_stats_summary()
    rows = torch.randn(3, 6, 2, 7, 5)
    with pytest.raises(RuntimeError, match="'init_env1'"):
        made.store([NodeKey(9, 9), RootKey(1, 1), RootKey(1, 2)], rows, [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match='lengths must be one integer for each of the 3 keys'):
        made.store([NodeKey(9, 9), RootKey(1, 1), NodeKey(9, 8)], rows, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r'rows must have the shape \[3, 6, 2, 7, 5\]'):
        made.store([NodeKey(9, 9), RootKey(1, 1), NodeKey(9, 8)], rows[:2], [1, 2, 3], [1, 2, 3])
    assert made.get_stats_summary() == before
    assert torch.equal(made.load(made.slots(KEYS), newest=5), kv)


def test_names_of_lightzeros_manager():
    made = manager()
    entry = Histories(LAYOUT, 0).entry(4)
    made.set_init_cache(2, 77, entry)
    made.set_recur_cache(77, entry)
    made.set_recur_cache(78, entry)
    for found in (made.get_init_cache(2, 77), made.get_recur_cache(78)):
        assert found is not None
        assert torch.equal(found[1]._v_cache._cache, entry[1]._v_cache._cache)
    assert [made.get_init_cache(1, 77), made.get_recur_cache(79)] == [None] * 2
    assert (len(made.init_pools[2]), len(made.recur_pool)) == (1, 2)
    made.clear_recur_cache()
    assert (len(made.init_pools[2]), len(made.recur_pool)) == (1, 0)
    made.set_recur_cache(77, entry)
    made.clear_init_caches()
    assert (len(made.init_pools[2]), len(made.recur_pool)) == (0, 1)
    made.clear_all()
    assert len(made.recur_pool) == 0


def test_a_configuration_without_shapes_takes_the_layout_of_the_first_history():
    made = KVCacheManager({'num_simulations': 11}, 4)
    assert (made.bytes, made.get_init_cache(2, 5), made.recur_pool.capacity) == (0, None, 4)
    with pytest.raises(RuntimeError, match='no layout yet; pass layout='):
        made.store([RootKey(2, 5)], torch.zeros(1, 6, 2, 7, 5), [1], [1])
    entry = Histories(LAYOUT, 0).entry(4)
    made.set_recur_cache(5, entry)
    found = made.get_recur_cache(5)
    assert found is not None
    assert same(tensors_of(found), tensors_of(entry))
    assert (made.layout, copy.deepcopy(made).layout, made.bytes) == (LAYOUT, LAYOUT, 8 * 1680)
    for key in range(9):
        made.set_recur_cache(key, entry)
    assert (len(made.recur_pool), made.recur_pool.stats.evictions) == (9, 0), 'the pool grows'


def test_the_first_history_is_refused_where_the_bound_does_not_hold_it():
    made = KVCacheManager({'kv_cache': {'max_bytes': 12 * 1680 - 1}}, 4)
    with pytest.raises(ValueError, match='need at least 20,160 bytes'):
        made.set_init_cache(2, 5, Histories(LAYOUT, 0).entry(4))
    assert (made.bytes, len(made.init_pools[2]), made.storage.known_layout) == (0, 0, None)


def test_a_configuration_with_a_part_of_the_shapes_is_refused():
    with pytest.raises(ValueError, match='lacks num_heads, context_length; add them or pass layout='):
        KVCacheManager({'num_layers': 3, 'embed_dim': 10}, 4)


def test_histories_live_on_the_device_of_the_configuration():
    assert KVCacheManager({**WORLD_MODEL, 'device': 'meta'}, 4).layout.device == torch.device('meta')


def test_root_slots_are_root_histories_of_an_environment():
    made = manager(root_slots=3)
    entries = [Histories(LAYOUT, seed).entry(4) for seed in range(5)]
    for key, entry in enumerate(entries):
        made.set_init_cache(2, key, entry)
    found = [made.get_init_cache(2, key) for key in range(5)]
    assert found[:2] == [None, None]
    for got, entry in zip(found[2:], entries[2:], strict=True):
        assert got is not None
        assert same(tensors_of(got), tensors_of(entry))
    assert (made.init_pools[2].stats.evictions, len(made.init_pools[1])) == (2, 0)


def test_a_lookup_in_two_pools_is_one_query():
    made = manager()
    entry = Histories(LAYOUT, 0).entry(4)
    made.set_init_cache(2, 77, entry)
    made.set_recur_cache(78, entry)
    assert made.hierarchical_get(2, 77) is not None
    assert made.hierarchical_get(2, 78) is not None
    assert made.hierarchical_get(2, 79) is None
    assert made.hierarchical_get(1, 77) is None
    summary = made.get_stats_summary()
    assert [summary[name]['queries'] for name in ('roots', 'nodes', 'total')] == [1, 3, 4]
    assert [summary[name]['hits'] for name in ('roots', 'nodes', 'total')] == [1, 1, 2]


def test_the_hosts_lists_are_emptied_and_never_replaced():
    made = manager()
    entries, sizes = made.keys_values_wm_list, made.keys_values_wm_size_list
    entries.append('batch')
    sizes.append(4)
    made.clear_all()
    assert (entries, sizes) == ([], [])
    assert made.keys_values_wm_list is entries
    assert made.keys_values_wm_size_list is sizes


def numbers_in(summary: dict) -> list:
    return [
        n for value in summary.values() for n in (numbers_in(value) if isinstance(value, dict) else [value])
    ]


def test_the_summary_has_numbers_only():
    made, _ = filled()
    made.lookup(KEYS)
    made.count_rebuilt(6, roots=True)
    made.count_rebuilt(3, roots=True, env_id=1)
    made.count_rebuilt(5, roots=False)
    made.count_window(8, env_id=2)
    made.count_window(7)
    summary = made.get_stats_summary()
    assert summary.pop('stats_enabled') is True
    assert set(summary) == {'init_pools', 'recur_pool', 'roots', 'nodes', 'total'}
    assert set(summary['init_pools']) == {'env_0', 'env_1', 'env_2', 'env_3'}
    assert all(type(number) in (int, float) for number in numbers_in(summary))
    assert summary['nodes'] == summary['recur_pool']
    assert [summary[name]['rebuilt_tokens'] for name in ('roots', 'nodes', 'total')] == [9, 5, 14]
    assert [summary[name]['window_tokens'] for name in ('roots', 'nodes', 'total')] == [8, 7, 15]
    assert [summary[name]['entries'] for name in ('roots', 'nodes', 'total')] == [2, 2, 4]
    assert [summary[name]['capacity'] for name in ('roots', 'nodes', 'total')] == [4, 4, 8]
    assert [summary[name]['bytes'] for name in ('roots', 'nodes', 'total')] == [
        4 * 1680,
        4 * 1680,
        8 * 1680,
    ]
    assert summary['total']['occupancy'] == 4 / 8
    assert summary['total']['hit_rate'] == 1.0
    snapshot = made.stats_snapshot()
    assert (snapshot['roots'].rebuilt_tokens, snapshot['nodes'].hits) == (9, 2)
    made.reset_stats()
    assert made.stats_snapshot() == {'roots': CacheStats(), 'nodes': CacheStats()}
    assert snapshot['nodes'].hits == 2
    with pytest.raises(ValueError, match='at least 0'):
        made.count_rebuilt(-1, roots=True)


@pytest.mark.parametrize('made', [KVCacheManager(WORLD_MODEL, 4, False), manager(enable_stats=False)])
def test_statistics_switched_off(made):
    made.lookup(KEYS)
    made.count_rebuilt(6, roots=True)
    assert made.get_stats_summary() == {'stats_enabled': False}
    assert made.stats_snapshot() == {'roots': CacheStats(), 'nodes': CacheStats()}


def nodes(count: int, simulation: int = 3) -> list[NodeKey]:
    return [NodeKey(row, simulation) for row in range(count)]


def reserve(made: KVCacheManager, keys: list[NodeKey]) -> np.ndarray:
    return made.reserve(keys, np.ones(len(keys), np.int64), np.ones(len(keys), np.int64))


def test_a_search_forgets_the_nodes_and_keeps_the_roots():
    made, kv = filled()
    made.begin_search(3, 90)
    assert (len(made.recur_pool), made.recur_pool.capacity) == (0, 4), 'no more than is needed at once'
    made.begin_search(9, 90)
    assert (made.recur_pool.capacity, made.storage.slots) == (9, 13)
    made.begin_search(5, 90, upfront=True)
    assert made.recur_pool.capacity == 90
    made.begin_search(5, 20)
    assert made.recur_pool.capacity == 90, 'a pool never shrinks'
    roots = made.lookup([KEYS[0], KEYS[2]])
    assert torch.equal(made.load(roots, newest=1), kv[[0, 2], :, :, 4:])
    assert made.lengths(roots).tolist() == [5, 1]


def test_a_full_pool_grows_before_it_evicts_and_keeps_its_entries():
    made, kv = filled()
    before = made.slots(KEYS)
    made.reserve([NodeKey(row, 1) for row in range(3)], np.ones(3, int), np.ones(3, int))
    assert made.recur_pool.capacity == 8, 'twice as many'
    assert made.slots(KEYS).tolist() == before.tolist(), 'slots keep their numbers'
    assert torch.equal(made.load(before, newest=5), kv)
    assert made.lengths(before).tolist() == [5, 3, 1, 4]
    made.begin_search(4, 7)
    for count in (5, 7, 8):
        reserve(made, nodes(count, count))
    assert (made.recur_pool.capacity, made.stats_snapshot()['nodes'].evictions) == (8, 12)


def test_a_search_evicts_nothing_by_default():
    made = manager()
    made.begin_search(4, 4 * 12)
    for simulation in range(12):
        reserve(made, nodes(4, simulation))
    assert (len(made.recur_pool), made.recur_pool.capacity) == (48, 48)
    for row in range(20):
        made.set_recur_cache((row, 'by another name'), Histories(LAYOUT, 0).entry(4))
    assert made.stats_snapshot()['nodes'].evictions == 20, 'more than the search may have'


def test_growth_is_bounded_by_the_search_until_which_num_simulations_says():
    made = manager()
    made.store(nodes(48), torch.zeros(48, 6, 2, 7, 5), [1] * 48, [1] * 48)
    with pytest.raises(RuntimeError, match='49 histories do not fit into 48 slots'):
        reserve(made, nodes(49))
    made.begin_search(1, 49)
    assert len(reserve(made, nodes(49))) == 49


def test_the_bound_of_bytes_is_kept_also_while_the_pool_grows():
    # 4 roots twice while the storage is resized, and 50 windows
    made = manager(max_bytes=(8 + 50) * 1680 + 1679)
    made.begin_search(16, 90)
    reserve(made, nodes(16))
    reserve(made, nodes(16, 4))
    assert made.recur_pool.capacity == 32
    reserve(made, nodes(16, 5))
    assert made.recur_pool.capacity == 32, 'twice 32 while they are copied would be too many'
    assert made.stats_snapshot()['nodes'].evictions == 16
    made.begin_search(16, 90)
    assert made.recur_pool.capacity == 50, 'without windows to copy there is room'
    made.set_init_cache(1, 1, Histories(LAYOUT, 0).entry(4))
    assert made.bytes == (4 + 50) * 1680
    with pytest.raises(RuntimeError, match=r'at least 51 windows at once, .* hold 50 \(1,680 bytes each\)'):
        made.begin_search(51, 90)
    assert made.get_init_cache(1, 1) is not None
    with pytest.raises(ValueError, match='0 <= least <= most, got least=5 and most=4'):
        made.begin_search(5, 4)


def test_bounds_too_small_are_refused_with_the_bytes_they_need():
    with pytest.raises(
        ValueError, match=f'max_bytes={11 * 1680:,} is too small.*at least {12 * 1680:,} bytes'
    ):
        manager(max_bytes=11 * 1680)
    assert manager(max_bytes=12 * 1680).recur_pool.capacity == 4
    with pytest.raises(ValueError, match=f'and 17 windows need at least {25 * 1680:,} bytes'):
        manager(max_bytes=24 * 1680, window_slots=17)


def test_explicit_window_slots_stay():
    made = manager(window_slots=17)
    made.begin_search(17, 90, upfront=True)
    reserve(made, nodes(17))
    reserve(made, nodes(9, 4))
    assert (made.recur_pool.capacity, made.stats_snapshot()['nodes'].evictions) == (17, 9)
    with pytest.raises(RuntimeError, match=r'kv_cache\.window_slots'):
        made.begin_search(18, 90)
    assert len(made.recur_pool) == 17


def test_the_memory_of_a_search_is_used_again_and_counts():
    made = manager(max_bytes=(8 + 10) * 1680)
    first = made.search_memory(420)
    assert first is not None
    assert (first.shape, made.search_bytes, made.bytes) == ((420,), 1680, 1680)
    again = made.search_memory(400)
    assert again is not None and again.data_ptr() == first.data_ptr()
    made.search_memory(840)
    assert made.search_bytes == 840 * 5, 'a quarter more than a growing search needs'
    assert made.search_memory(6 * 420 + 1) is None, 'beside 4 windows there is room for 6'
    assert made.search_memory(6 * 420) is not None
    with pytest.raises(RuntimeError, match='can hold 4'):
        made.begin_search(5, 90)
    made.forget_search_memory()
    assert made.search_bytes == 0
    made.begin_search(5, 90)


def test_reserved_slots_are_stored_nodes_whose_numbers_the_caller_writes():
    made, _ = filled()
    keys = [NodeKey(3, 7), NodeKey(0, 4)]
    slots = made.reserve(keys, np.array([2, 6]), np.array([12, 16]))
    assert made.slots(keys).tolist() == slots.tolist()
    assert made.lengths(slots).tolist() == [2, 6] and made.next_positions(slots).tolist() == [12, 16]
    assert slots[1] == made.slots([KEYS[1]])[0], 'a known key keeps its slot'
    nodes = made.get_stats_summary()['nodes']
    assert (nodes['stores'], nodes['overwrites']) == (4, 1)
    full = manager(window_slots=4)
    with pytest.raises(RuntimeError, match='do not fit'):
        full.reserve([NodeKey(0, number) for number in range(5)], np.ones(5, int), np.ones(5, int))
    assert len(full.recur_pool) == 0


def test_the_scratch_row_counts_towards_the_bound():
    bound = (8 + 50) * 1680
    plain, scratched = (
        KVCacheManager({**WORLD_MODEL, 'kv_cache': dict(max_bytes=bound)}, 4, scratch=scratch)
        for scratch in (False, True)
    )
    for made, windows in ((plain, 50), (scratched, 49)):
        made.begin_search(4, 90, upfront=True)
        assert made.recur_pool.capacity == windows
    scratched.set_init_cache(1, 1, Histories(LAYOUT, 0).entry(4))
    assert scratched.bytes == (4 + 49 + 1) * 1680 <= bound
    assert copy.deepcopy(scratched).scratch and pickle.loads(pickle.dumps(scratched)).scratch


def test_no_bound():
    made = manager(max_bytes=None)
    made.begin_search(10_000, 10_000)
    assert made.recur_pool.capacity == 10_000


def test_there_is_at_least_one_environment():
    with pytest.raises(ValueError, match='env_num must be at least 1, got 0'):
        manager(env_num=0)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_is_empty_and_of_the_same_configuration(duplicate):
    made = KVCacheManager(
        WORLD_MODEL, 6, cache_config=KVCacheConfig(policy='lfu', root_slots=3), num_simulations=13
    )
    entry = Histories(LAYOUT, 0).entry(4)
    made.set_init_cache(5, 77, entry)
    twin = duplicate(made)
    assert (twin.env_num, twin.layout, twin.cache_config) == (6, made.layout, made.cache_config)
    assert (twin.num_simulations, twin.recur_pool.capacity, twin.bytes) == (13, 6, 0)
    assert twin.get_init_cache(5, 77) is None
    twin.set_init_cache(5, 77, Histories(LAYOUT, 1).entry(6))
    found = made.get_init_cache(5, 77)
    assert found is not None
    assert torch.equal(found[2]._k_cache._cache, entry[2]._k_cache._cache)
    assert made.stats_snapshot()['roots'].queries == 1


def test_a_copied_pickle_carries_no_tensor():
    made, _ = filled()
    made.begin_search(5000, 5000)
    made.storage.allocate()
    assert len(pickle.dumps(made)) < 4000


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        ({'embed_dim': None}, 'lacks embed_dim; add them or pass layout='),
        ({'embed_dim': 11}, 'embed_dim=11 must be a multiple of num_heads=2'),
        ({'num_simulations': -2}, 'num_simulations must be at least 1, got -2'),
        ({'kv_cache': {'polcy': 'lru'}}, "did you mean 'policy'"),
    ],
)
def test_impossible_configurations_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        KVCacheManager({**WORLD_MODEL, **change}, 4)


def test_a_given_layout_needs_no_configuration():
    made = KVCacheManager(None, 4, layout=KVLayout(2, 3, 4, 5), num_simulations=6)
    assert (made.layout.tokens, made.recur_pool.capacity) == (5, 4)


def test_clears_are_logged_now_and_then(caplog):
    made = KVCacheManager(WORLD_MODEL, 4, True, 3, 0)
    with caplog.at_level(logging.DEBUG, logger='lzero_kv'):
        for _ in range(7):
            made.clear_recur_cache()
            made.clear_all()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f'recurrent cache cleared ({calls} times so far, logged every 3)' for calls in (3, 6)]
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


def test_a_dropped_manager_is_freed_at_once():
    made, _ = filled()
    gone = weakref.ref(made)
    del made
    assert gone() is None, 'a cycle would keep its memory until the garbage collector runs'


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (dict(num_simulations=0), 'num_simulations must be at least 1, got 0'),
        (dict(num_simulations=2.5), 'num_simulations must be an integer, got 2.5 of type float'),
        (dict(num_heads=0), 'num_heads must be at least 1, got 0'),
        (dict(num_heads='3'), "num_heads must be an integer, got '3' of type str"),
        (dict(num_layers=0), 'num_layers must be at least 1, got 0'),
    ],
)
def test_numbers_of_the_world_model_that_cannot_be_are_refused(change, text):
    sizes = dict(num_layers=2, num_heads=3, embed_dim=12, context_length=8)
    with pytest.raises((ValueError, TypeError), match=text):
        KVCacheManager(sizes | change, 4)


def test_choices_may_be_a_dict_and_nothing_else():
    made = KVCacheManager(WORLD_MODEL, 4, cache_config=dict(policy='lfu'))
    assert made.cache_config == KVCacheConfig(policy='lfu')
    with pytest.raises(TypeError, match=r"kv_cache must be a dict such as dict.policy='lru'., got str"):
        KVCacheManager(WORLD_MODEL, 4, cache_config='lfu')
    with pytest.raises(TypeError, match=r'env_num must be an integer, got 2\.5'):
        KVCacheManager(WORLD_MODEL, 2.5)
