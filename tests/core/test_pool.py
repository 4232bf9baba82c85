"""The pool's own promises, one by one; the comparison with the reference is in test_machines.py."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.layout import KVBatch
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.stats import CacheStats
from lzero_kv.cache.storage import KVStorage

from .comparing import LAYOUT, Histories


def batch(*lengths: int, seed: int = 0) -> KVBatch:
    return Histories(LAYOUT, seed).batch(lengths, [length + 20 for length in lengths])


def test_queries_hits_and_misses():
    pool = KVCachePool(3, layout=LAYOUT)
    pool.store('ab', batch(4, 2))
    slots = pool.lookup('xba')
    assert slots.dtype == np.int64
    assert slots.tolist() == [NO_SLOT, pool.peek('b'), pool.peek('a')]
    stats = pool.stats
    assert (stats.queries, stats.hits, stats.misses, stats.hit_rate) == (3, 2, 1, 2 / 3)
    assert pool.lookup([]).shape == (0,)
    assert ('a' in pool, 'x' in pool, pool.peek('x'), stats.queries) == (True, False, NO_SLOT, 3)


def test_describe_has_numbers_only():
    pool = KVCachePool(4, layout=LAYOUT)
    pool.store('abc', batch(4, 2, 7))
    pool.lookup('ax')
    assert pool.describe() == {
        **{'queries': 2, 'hits': 1, 'misses': 1, 'hit_rate': 0.5, 'miss_rate': 0.5},
        **{'stores': 3, 'overwrites': 0, 'evictions': 0, 'rebuilt_tokens': 0, 'window_tokens': 0},
        **{'new_tokens': 0, 'served_tokens': 0, 'computed_tokens': 0, 'saved_tokens': 0.0},
        **{'entries': 3, 'capacity': 4, 'occupancy': 0.75, 'bytes': 4 * 1680},
    }


def test_lengths_and_positions_are_kept_by_slot():
    pool = KVCachePool(3, layout=LAYOUT)
    slots = pool.store('ab', batch(4, 2))
    assert pool.lengths[slots].tolist() == [4, 2]
    assert pool.next_positions[slots].tolist() == [24, 22]


def test_memory_stays_when_the_pool_is_cleared():
    pool = KVCachePool(3, layout=LAYOUT)
    assert pool.bytes == 0
    pool.store('ab', batch(4, 2))
    assert pool.storage is not None
    address = pool.storage._data.data_ptr()  # type: ignore[union-attr]
    pool.clear()
    assert (len(pool), pool.bytes, pool.keys()) == (0, 3 * 1680, [])
    pool.store('cd', batch(3, 5))
    assert pool.storage._data.data_ptr() == address  # type: ignore[union-attr]


def test_a_key_keeps_its_slot_when_it_is_stored_again():
    pool = KVCachePool(3, layout=LAYOUT)
    first = pool.store('ab', batch(4, 2))
    second = pool.store('cb', batch(3, 5))
    assert second[1] == first[1]
    assert (pool.stats.stores, pool.stats.overwrites, pool.stats.evictions) == (4, 1, 0)


def test_a_batch_larger_than_the_pool_is_refused():
    pool = KVCachePool(2, layout=LAYOUT)
    with pytest.raises(RuntimeError, match='3 histories do not fit into 2 slots'):
        pool.reserve('abc')
    with pytest.raises(ValueError, match=r"once, got \['b'\] repeatedly"):
        pool.reserve('bb')
    assert (len(pool), pool.stats) == (0, CacheStats())


def test_discard_counts_no_evictions():
    pool = KVCachePool(3, layout=LAYOUT)
    pool.store('abc', batch(4, 2, 7))
    assert pool.discard('axba') == 2
    assert (pool.keys(), pool.stats.evictions) == (['c'], 0)


def test_priorities_need_known_keys_and_numbers():
    pool = KVCachePool(2, 'priority', layout=LAYOUT)
    pool.store('ab', batch(4, 2))
    pool.set_priorities('ab', np.array([5, 3]))
    with pytest.raises(KeyError, match='not cached'):
        pool.set_priorities('ax', [0, 0])
    with pytest.raises(ValueError, match='2 keys and 1 values'):
        pool.set_priorities('ab', [0])
    with pytest.raises(ValueError, match='NaN'):
        pool.set_priorities('ab', [0, float('nan')])
    pool.store('c', batch(3))
    assert pool.keys() == ['a', 'c']


def test_load_names_the_missing_keys_and_counts_nothing_then():
    pool = KVCachePool(3, layout=LAYOUT)
    pool.store('ab', batch(4, 2))
    with pytest.raises(KeyError, match=r"not cached: \['x', 'y'\]"):
        pool.load('axy')
    assert pool.stats.queries == 0


def test_pools_of_one_slab_do_not_touch_each_other():
    storage = KVStorage(LAYOUT, 5)
    left = KVCachePool(2, storage=storage, name='left')
    right = KVCachePool(3, storage=storage, name='right', first_slot=2)
    left.store('ab', batch(4, 2))
    right.store('abc', batch(3, 5, 7, seed=1))
    expected = batch(4, 2).kv
    for key in 'defgh':
        right.store(key, batch(6, seed=2))
    assert torch.equal(storage.load(left.lookup('ab'), newest=4), expected)
    assert left.lengths is right.lengths
    assert (left.bytes, right.bytes, storage.bytes) == (2 * 1680, 3 * 1680, 5 * 1680)


def test_resize():
    storage = KVStorage(LAYOUT, 5)
    left, right = KVCachePool(2, storage=storage), KVCachePool(3, storage=storage, first_slot=2)
    left.store('ab', batch(4, 2))
    kept = left.load('ab').kv
    right.resize(9)
    assert (right.capacity, storage.slots) == (9, 11)
    assert torch.equal(left.load('ab').kv, kept)
    assert right.store('abcdefghi', batch(*range(1, 8), 3, 4)).tolist() == list(range(2, 11))
    with pytest.raises(RuntimeError, match='call clear'):
        right.resize(4)
    kept = right.load('abcdefghi').kv
    right.resize(12)
    assert right.lookup('abcdefghi').tolist() == list(range(2, 11)), 'slots keep their numbers'
    assert torch.equal(right.load('abcdefghi').kv, kept)
    assert right.store('jkl', batch(3, 2, 1)).tolist() == [11, 12, 13]
    assert right.stats.evictions == 0
    left.clear()
    with pytest.raises(RuntimeError, match='other slots follow'):
        left.resize(4)
    right.clear()
    with pytest.raises(ValueError, match='at least 1'):
        right.resize(0)
    right.resize(1)
    assert storage.slots == 3


def test_a_resize_without_memory_changes_nothing():
    pool = KVCachePool(3, layout=LAYOUT)
    kept = pool.store('ab', batch(4, 2)) is not None and pool.load('ab').kv
    with pytest.raises(RuntimeError, match='no memory'):
        pool.resize(2**50)
    assert pool.capacity == 3
    assert torch.equal(pool.load('ab').kv, kept)
    assert pool.store('c', batch(7)).tolist() == [2]


def test_a_store_without_memory_changes_nothing(monkeypatch):
    pool = KVCachePool(5, layout=LAYOUT)
    monkeypatch.setattr('lzero_kv.cache.storage._available', lambda device: 4 * 1680)
    with pytest.raises(RuntimeError, match='no memory for 5 slots'):
        pool.store('a', batch(4))
    assert (len(pool), pool.stats, pool.bytes) == (0, CacheStats(), 0)


def test_a_copy_of_a_pool_is_independent():
    pool = KVCachePool(3, layout=LAYOUT)
    pool.store('ab', batch(4, 2))
    twin = copy.deepcopy(pool)
    twin.store('a', batch(6, seed=1))
    assert torch.equal(pool.load('ab').kv[:, :, :, 3:], batch(4, 2).kv)


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ({'pool_size': 0}, 'pool_size must be at least 1, got 0'),
        ({'pool_size': 3, 'eviction_strategy': 'mru'}, 'eviction strategy must be one of'),
        ({'pool_size': 3, 'first_slot': 2}, 'needs the storage'),
        (
            {'pool_size': 3, 'first_slot': 3, 'storage': KVStorage(LAYOUT, 5)},
            r'\[3, 6\) are not all in .* \[0, 5\)',
        ),
        (
            {
                'pool_size': 3,
                'layout': dataclasses.replace(LAYOUT, tokens=9),
                'storage': KVStorage(LAYOUT, 5),
            },
            'leave layout out',
        ),
    ],
)
def test_impossible_pools_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        KVCachePool(**arguments)


def test_a_pool_without_layout_says_what_it_needs():
    pool = KVCachePool(3)
    assert pool.lookup('ab').tolist() == [NO_SLOT, NO_SLOT]
    with pytest.raises(RuntimeError, match='no layout yet; pass layout=, or store a single history'):
        pool.store('a', batch(4))
    assert repr(pool) == "KVCachePool(name='default', entries=0/3, strategy=fifo, hit_rate=0.000)"


@pytest.mark.parametrize(('size', 'error'), [(2.7, TypeError), (True, TypeError), (0, ValueError)])
def test_a_size_that_is_no_number_of_slots_is_refused(size, error):
    with pytest.raises(error, match='pool_size must be'):
        KVCachePool(size)
    pool = KVCachePool(3)
    with pytest.raises(error, match='pool_size must be'):
        pool.resize(size)
    assert pool.pool_size == 3


def test_a_batch_that_is_not_finite_is_refused_as_one_history_is():
    pool, given = KVCachePool(3, layout=LAYOUT), batch(4, 5)
    given.kv[1, 2, 1, 4] = float('nan')
    with pytest.raises(ValueError, match='expected finite keys and values, got NaN or infinity'):
        pool.store('ab', given)
    assert (len(pool), pool.storage.bytes) == (0, 0)


def test_more_slots_than_memory_are_refused_before_a_layout_is_known():
    with pytest.raises(RuntimeError, match='no memory for 200000000 slots of the KV cache: 102,400,000,000'):
        KVCachePool(200_000_000)
