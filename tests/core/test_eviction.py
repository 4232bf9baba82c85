"""Which entry makes room: the written tie-breaks of every policy."""

from __future__ import annotations

import copy
import random

import pytest

from lzero_kv.cache.eviction import EvictionOrder, EvictionStrategy
from lzero_kv.cache.pool import KVCachePool

from .comparing import LAYOUT

POLICIES = [strategy.value for strategy in EvictionStrategy]


def full_pool(policy: str, keys: str = 'abcd') -> KVCachePool:
    pool = KVCachePool(len(keys), policy, layout=LAYOUT)
    pool.reserve(keys)
    return pool


def eviction_order(pool: KVCachePool) -> str:
    """The keys in the order in which larger and larger batches of others push them out."""
    return ''.join(
        next(key for key in evicted_by(pool, count) if key not in evicted_by(pool, count - 1))
        for count in range(1, len(pool) + 1)
    )


def evicted_by(pool: KVCachePool, count: int) -> list[str]:
    """The keys that a batch of ``count`` others pushes out of a copy of a full pool."""
    twin = copy.deepcopy(pool)
    twin.reserve(range(count))
    return [str(key) for key in set(pool.keys()) - set(twin.keys())]


def test_a_strategy_is_found_by_its_value():
    assert EvictionStrategy('lru') is EvictionStrategy.LRU
    assert POLICIES == ['fifo', 'lru', 'lfu', 'priority']
    with pytest.raises(ValueError, match=r"must be one of \['fifo', 'lru', 'lfu', 'priority'\], got 'mru'"):
        EvictionStrategy('mru')


@pytest.mark.parametrize('policy', POLICIES)
def test_among_equals_the_oldest_goes_first(policy):
    assert eviction_order(full_pool(policy)) == 'abcd'


def orders(fifo: str, lru: str, lfu: str, priority: str) -> pytest.MarkDecorator:
    """The order of eviction expected of each policy."""
    expected = {'fifo': fifo, 'lru': lru, 'lfu': lfu, 'priority': priority}
    return pytest.mark.parametrize(('policy', 'order'), expected.items())


@orders(fifo='abcd', lru='bdac', lfu='bdca', priority='abcd')
def test_hits(policy, order):
    pool = full_pool(policy)
    pool.lookup('aac')
    assert eviction_order(pool) == order


@orders(fifo='bcda', lru='bcda', lfu='bcda', priority='bcda')
def test_storing_again_renews_the_age(policy, order):
    pool = full_pool(policy)
    pool.reserve('a')
    assert eviction_order(pool) == order


@orders(fifo='abcd', lru='abcd', lfu='abcd', priority='bcda')
def test_priorities(policy, order):
    pool = full_pool(policy)
    pool.set_priorities('abcd', [9, 1, 5, 5])
    assert eviction_order(pool) == order


def test_priorities_may_fall_and_are_kept_when_the_entry_is_stored_again():
    pool = full_pool('priority')
    pool.set_priorities('abcd', [9, 8, 7, 6])
    pool.set_priorities('a', [6.5])
    pool.reserve('d')
    assert eviction_order(pool) == 'dacb'


def test_an_evicted_key_that_comes_back_has_no_priority():
    pool = full_pool('priority', 'ab')
    pool.set_priorities('ab', [5, 6])
    pool.reserve('c')
    pool.reserve('a')
    assert pool.keys() == ['b', 'a']
    pool.reserve('d')
    assert pool.keys() == ['b', 'd']


@pytest.mark.parametrize('policy', POLICIES)
def test_a_batch_never_evicts_its_own_entries(policy):
    pool = full_pool(policy)
    pool.lookup('cd')
    pool.set_priorities('cd', [1, 1])
    slots = pool.reserve(['a', 'x', 'b', 'y'])
    assert set(pool.keys()) == {'a', 'b', 'x', 'y'}
    assert len(set(slots.tolist())) == 4


@pytest.mark.parametrize('policy', POLICIES)
def test_victims_of_one_batch_are_those_of_one_after_another(policy):
    draw, order = random.Random(3), EvictionOrder(EvictionStrategy(policy), 12)
    order.store(list(range(12)))
    for _ in range(30):
        order.hit(draw.choices(range(12), k=3))
        order.set_priorities(draw.choices(range(12)), [draw.randint(-2, 2)])
    together, apart = order.victims(5, [3, 7]), []
    for _ in range(5):
        apart += order.victims(1, [3, 7])
        order.remove(apart[-1:])
    assert set(together) == set(apart)
    assert len(set(apart)) == 5


@pytest.mark.parametrize('policy', POLICIES)
def test_empty_slots_and_slots_that_are_held_are_no_victims(policy):
    order = EvictionOrder(EvictionStrategy(policy), 6)
    order.store([1, 2, 4])
    order.set_priorities([1], [float('inf')])
    assert sorted(order.victims(2, [2])) == [1, 4]
    order.resize(9)
    order.store([8])
    order.remove([1])
    assert sorted(order.victims(3, [])) == [2, 4, 8]
