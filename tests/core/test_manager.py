"""The manager's own promises, one by one; the comparison with the reference is in test_machines.py."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from easydict import EasyDict

from lzero_kv import KVCacheConfig, KVCacheManager, KVLayout
from lzero_kv.cache.keys import NO_SLOT, LatentKey, NodeKey, RootKey
from lzero_kv.cache.stats import CacheStats

from .comparing import UNIFORM, Histories

WORLD_MODEL = EasyDict(num_layers=3, num_heads=2, embed_dim=10, context_length=7, num_simulations=11)
KEYS = [RootKey(2, 5), NodeKey(0, 4), RootKey(0, 5), LatentKey(1, 9)]


def manager(env_num: int = 4, **kv_cache: object) -> KVCacheManager:
    return KVCacheManager({**WORLD_MODEL, 'kv_cache': kv_cache}, env_num)


def filled() -> tuple[KVCacheManager, torch.Tensor]:
    """A manager with the histories of KEYS, and their keys and values (5 columns)."""
    made = manager()
    batch = Histories(UNIFORM, 0).batch([5, 3, 1, 4], [25, 23, 21, 24])
    made.store(KEYS, batch.kv, batch.lengths, batch.next_positions)
    return made, batch.kv


def test_sizes_follow_the_world_model():
    made = KVCacheManager(WORLD_MODEL, 4)
    assert made.layout == UNIFORM
    assert [pool.capacity for pool in made.init_pools] == [1] * 4
    assert made.recur_pool.capacity == 4 * (11 + 1)
    assert (made.slab.slots, made.bytes, made.env_num) == (52, 0, 4)
    assert KVCacheManager(WORLD_MODEL, 4, num_simulations=100).recur_pool.capacity == 404
    assert manager(recurrent_slots=17, root_slots=3).slab.slots == 4 * 3 + 17


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
        lambda: made.store([NodeKey(9, 9), RootKey(env_id, 5)], torch.zeros(2, 6, 7, 10), [1, 2], [1, 2]),
        lambda: made.get_init_cache(env_id, 5),
        lambda: made.set_init_cache(env_id, 5, Histories(UNIFORM, 0).entry(4)),
        lambda: made.hierarchical_get(env_id, 5),
        lambda: made.count_rebuilt(3, roots=True, env_id=env_id if env_id is not None else 99),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    assert made.get_stats_summary() == before


def test_unknown_kinds_of_keys_are_refused():
    made, _ = filled()
    before = made.get_stats_summary()
    with pytest.raises(TypeError, match='RootKey, NodeKey or LatentKey, got 7'):
        made.lookup([KEYS[0], 7])  # type: ignore[list-item]
    assert made.get_stats_summary() == before


def test_a_store_is_all_or_nothing():
    made, kv = filled()
    before = made.get_stats_summary()
    rows = torch.randn(3, 6, 7, 10)
    with pytest.raises(RuntimeError, match="'init_env1'"):
        made.store([NodeKey(9, 9), RootKey(1, 1), RootKey(1, 2)], rows, [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match='lengths must be one integer for each of the 3 keys'):
        made.store([NodeKey(9, 9), RootKey(1, 1), NodeKey(9, 8)], rows, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r'rows must have the shape \[3, 6, 4, 10\]'):
        made.store([NodeKey(9, 9), RootKey(1, 1), NodeKey(9, 8)], rows, [1, 2, 3], [1, 2, 3], newest=4)
    assert made.get_stats_summary() == before
    assert torch.equal(made.load(made.slots(KEYS), newest=5), kv)


def test_names_of_lightzeros_manager():
    made = manager()
    entry = Histories(UNIFORM, 0).entry(4)
    made.set_init_cache(2, 77, entry)
    made.set_recur_cache(77, entry)
    made.set_recur_cache(78, entry)
    made.set_wm_cache(79, entry)
    for found in (made.get_init_cache(2, 77), made.get_recur_cache(78), made.get_wm_cache(79)):
        assert found is not None
        assert torch.equal(found[1]._v_cache._cache, entry[1]._v_cache._cache)
    assert [made.get_init_cache(1, 77), made.get_recur_cache(79), made.get_wm_cache(78)] == [None] * 3
    assert (len(made.init_pools[2]), len(made.recur_pool), len(made.wm_pool)) == (1, 2, 1)
    made.clear_recur_cache()
    assert (len(made.init_pools[2]), len(made.recur_pool), len(made.wm_pool)) == (1, 0, 1)
    made.clear_init_caches()
    assert (len(made.init_pools[2]), len(made.wm_pool)) == (0, 1)
    made.clear_all()
    assert len(made.wm_pool) == 0


def test_a_lookup_in_two_pools_is_one_query():
    made = manager()
    entry = Histories(UNIFORM, 0).entry(4)
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
    made.set_environments(3)
    assert (entries, sizes) == (['batch'], [4])
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
    assert set(summary) == {'init_pools', 'recur_pool', 'wm_pool', 'roots', 'nodes', 'total'}
    assert set(summary['init_pools']) == {'env_0', 'env_1', 'env_2', 'env_3'}
    assert all(type(number) in (int, float) for number in numbers_in(summary))
    assert summary['nodes'] == summary['recur_pool']
    assert [summary[name]['rebuilt_tokens'] for name in ('roots', 'nodes', 'total')] == [9, 5, 14]
    assert [summary[name]['window_tokens'] for name in ('roots', 'nodes', 'total')] == [8, 7, 15]
    assert [summary[name]['entries'] for name in ('roots', 'nodes', 'total')] == [2, 2, 4]
    assert [summary[name]['capacity'] for name in ('roots', 'nodes', 'total')] == [4, 48, 52]
    assert [summary[name]['bytes'] for name in ('roots', 'nodes', 'total')] == [
        4 * 1680,
        48 * 1680,
        52 * 1680,
    ]
    assert summary['total']['occupancy'] == 4 / 52
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


def test_the_recurrent_pool_grows_with_the_search_and_keeps_the_roots():
    made, kv = filled()
    assert made.reserve_recurrent(40) == 48
    assert len(made.recur_pool) == 0
    assert made.reserve_recurrent(90) == 90
    assert (made.recur_pool.capacity, made.slab.slots) == (90, 94)
    roots = made.lookup([KEYS[0], KEYS[2]])
    assert torch.equal(made.load(roots, newest=1), kv[[0, 2], :, 4:])
    assert made.lengths(roots).tolist() == [5, 1]


def test_the_bound_of_bytes_is_kept():
    # 4 roots twice while the slab is resized, 4 single histories, 50 nodes
    made = manager(max_bytes=(8 + 4 + 50) * 1680 + 1679)
    assert made.recur_pool.capacity == 48
    assert made.reserve_recurrent(90) == 50
    made.set_wm_cache(1, Histories(UNIFORM, 0).entry(4))
    made.set_init_cache(1, 1, Histories(UNIFORM, 0).entry(4))
    assert made.bytes == (4 + 4 + 50) * 1680
    with pytest.raises(
        RuntimeError, match=r'at least 51 nodes at once, the cache can hold 50 \(1,680 bytes each\)'
    ):
        made.reserve_recurrent(90, minimum=51)
    assert made.get_init_cache(1, 1) is not None


def test_bounds_too_small_are_refused_with_the_bytes_they_need():
    with pytest.raises(
        ValueError, match=f'max_bytes={15 * 1680:,} is too small.*at least {16 * 1680:,} bytes'
    ):
        manager(max_bytes=15 * 1680)
    assert manager(max_bytes=16 * 1680).recur_pool.capacity == 4
    with pytest.raises(ValueError, match=f'and 17 nodes need at least {29 * 1680:,} bytes'):
        manager(max_bytes=28 * 1680, recurrent_slots=17)


def test_explicit_recurrent_slots_stay():
    made = manager(recurrent_slots=17)
    assert made.reserve_recurrent(90) == 17
    with pytest.raises(RuntimeError, match=r'kv_cache\.recurrent_slots'):
        made.reserve_recurrent(90, minimum=18)


def test_whether_a_search_would_fit_is_known_beforehand():
    made = manager(max_bytes=(8 + 4 + 50) * 1680)
    assert made.can_reserve(50) and not made.can_reserve(51)
    assert made.recur_pool.capacity == 48, 'nothing changed'
    assert manager(recurrent_slots=17).can_reserve(17) and not manager(recurrent_slots=17).can_reserve(18)
    assert manager(max_bytes=None).can_reserve(10_000)


def test_reserved_slots_are_stored_nodes_whose_numbers_the_caller_writes():
    made, _ = filled()
    keys = [NodeKey(3, 7), NodeKey(0, 4)]
    slots = made.reserve(keys, np.array([2, 6]), np.array([12, 16]))
    assert made.slots(keys).tolist() == slots.tolist()
    assert made.lengths(slots).tolist() == [2, 6] and made.next_positions(slots).tolist() == [12, 16]
    assert slots[1] == made.slots([KEYS[1]])[0], 'a known key keeps its slot'
    nodes = made.get_stats_summary()['nodes']
    assert (nodes['stores'], nodes['overwrites']) == (4, 1)
    full = manager(recurrent_slots=4)
    with pytest.raises(RuntimeError, match='do not fit'):
        full.reserve([NodeKey(0, number) for number in range(5)], np.ones(5, int), np.ones(5, int))
    assert len(full.recur_pool) == 0


def test_the_scratch_row_counts_towards_the_bound():
    bound = (8 + 4 + 50) * 1680
    plain, scratched = (
        KVCacheManager({**WORLD_MODEL, 'kv_cache': dict(max_bytes=bound)}, 4, scratch=scratch)
        for scratch in (False, True)
    )
    assert (plain.reserve_recurrent(90), scratched.reserve_recurrent(90)) == (50, 49)
    scratched.set_wm_cache(1, Histories(UNIFORM, 0).entry(4))
    scratched.set_init_cache(1, 1, Histories(UNIFORM, 0).entry(4))
    assert scratched.bytes == (4 + 4 + 49 + 1) * 1680 <= bound
    assert copy.deepcopy(scratched).scratch and pickle.loads(pickle.dumps(scratched)).scratch


def test_no_bound():
    assert manager(max_bytes=None).reserve_recurrent(10_000) == 10_000


def test_environments_can_be_set_before_the_first_use():
    made = manager()
    made.set_environments(6)
    assert (made.env_num, len(made.init_pools), made.recur_pool.capacity) == (6, 6, 72)
    assert made.store([RootKey(5, 1)], torch.zeros(1, 6, 7, 10), [3], [3]).tolist() == [5]
    with pytest.raises(RuntimeError, match=r'fixed at 6 .*call set_environments\(4\) before'):
        made.set_environments(4)
    assert len(made.init_pools) == 6
    with pytest.raises(ValueError, match='env_num must be at least 1, got 0'):
        manager(env_num=0)


def test_a_rejected_number_of_environments_changes_nothing():
    made = manager(max_bytes=16 * 1680)
    with pytest.raises(ValueError, match='max_bytes'):
        made.set_environments(5)
    assert (made.env_num, len(made.init_pools), made.recur_pool.capacity) == (4, 4, 4)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_is_empty_and_of_the_same_configuration(duplicate):
    made = KVCacheManager(
        WORLD_MODEL, 4, cache_config=KVCacheConfig(policy='lfu', root_slots=3), num_simulations=13
    )
    made.set_environments(6)
    entry = Histories(UNIFORM, 0).entry(4)
    made.set_init_cache(5, 77, entry)
    twin = duplicate(made)
    assert (twin.env_num, twin.layout, twin.cache_config) == (6, made.layout, made.cache_config)
    assert (twin.recur_pool.capacity, twin.bytes) == (6 * 14, 0)
    assert twin.get_init_cache(5, 77) is None
    twin.set_init_cache(5, 77, Histories(UNIFORM, 1).entry(6))
    found = made.get_init_cache(5, 77)
    assert found is not None
    assert torch.equal(found[2]._k_cache._cache, entry[2]._k_cache._cache)
    assert made.stats_snapshot()['roots'].queries == 1


def test_a_copied_pickle_carries_no_tensor():
    made, _ = filled()
    made.reserve_recurrent(5000)
    made.slab.allocate()
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
    assert made.recur_pool.capacity == 28


def test_clears_are_logged_now_and_then(caplog):
    made = KVCacheManager(WORLD_MODEL, 4, True, 3, 0)
    with caplog.at_level(logging.DEBUG, logger='lzero_kv'):
        for _ in range(7):
            made.clear_recur_cache()
            made.clear_all()
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f'recurrent cache cleared ({calls} times so far, logged every 3)' for calls in (3, 6)]
    assert all(record.levelno == logging.DEBUG for record in caplog.records)


HOST_MODULES = "import sys, lzero_kv; print([m for m in sys.modules if m.split('.')[0] in ('lzero', 'ding')])"


def test_importing_the_library_loads_no_host():
    ran = subprocess.run([sys.executable, '-c', HOST_MODULES], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == '[]'
    with_host = HOST_MODULES.replace('import sys, lzero_kv', "import sys; sys.modules['ding.fake'] = sys")
    ran = subprocess.run([sys.executable, '-c', with_host], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['ding.fake']"
