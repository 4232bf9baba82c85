"""Who makes room: the written tie-breaks of every policy, and the work it takes."""

from __future__ import annotations

import gc
import math
import sys
from types import FrameType

import pytest

from lzero_kv.cache.eviction import STRATEGIES, EvictionStrategy, LowestPriority
from lzero_kv.cache.pool import KVCachePool

from .comparing import UNIFORM

POLICIES = [strategy.value for strategy in EvictionStrategy]


def full_pool(policy: str, keys: str = 'abcd') -> KVCachePool:
    pool = KVCachePool(len(keys), policy, layout=UNIFORM)
    pool.reserve(keys)
    return pool


def eviction_order(pool: KVCachePool) -> str:
    """The keys in the order in which new stores push them out."""
    evicted = ''
    while remaining := set(map(str, pool.keys())) - set(map(str, pool.pinned)):
        newcomer = f'newcomer {len(evicted)}'
        pool.reserve([newcomer])
        pool.pin([newcomer])
        evicted += ''.join(remaining - set(map(str, pool.keys())))
    return evicted


def test_a_strategy_is_found_by_its_value():
    assert EvictionStrategy('lru') is EvictionStrategy.LRU
    assert [strategy.value for strategy in STRATEGIES] == ['fifo', 'lru', 'lfu', 'priority']
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
def test_a_pinned_entry_stays_and_comes_back_as_the_newest_of_its_equals(policy):
    pool = full_pool(policy)
    pool.pin('ab')
    pool.unpin('a')
    assert eviction_order(pool) == 'cda'
    assert pool.keys()[0] == 'b'


def test_a_pinned_entry_keeps_counting_its_uses():
    pool = full_pool('lfu')
    pool.pin('a')
    pool.lookup('aa')
    pool.unpin('a')
    pool.lookup('bcd')
    assert eviction_order(pool) == 'bcda'


@pytest.mark.parametrize('policy', POLICIES)
def test_a_batch_never_evicts_its_own_entries(policy):
    pool = full_pool(policy)
    pool.lookup('cd')
    pool.set_priorities('cd', [1, 1])
    slots = pool.reserve(['a', 'x', 'b', 'y'])
    assert set(pool.keys()) == {'a', 'b', 'x', 'y'}
    assert len(set(slots.tolist())) == 4


class CountedKey:
    """A key that counts how often any key is hashed or compared."""

    calls = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        CountedKey.calls += 1
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        CountedKey.calls += 1
        return isinstance(other, CountedKey) and self.number == other.number


def steps_of_insertions(policy: str, size: int, insertions: int = 64) -> tuple[int, int]:
    """Lines of Python executed, and keys hashed or compared, by insertions into a full and busy pool."""
    pool = KVCachePool(size, policy, enable_stats=False, layout=UNIFORM)
    keys = [CountedKey(number) for number in range(size + insertions)]
    pool.reserve(keys[:size])
    pool.pin(keys[: size // 4])
    pool.lookup(keys[size // 2 : size])
    pool.set_priorities(keys[: size // 2], range(size // 2))
    lines = 0

    def count(frame: FrameType, event: str, argument: object):
        nonlocal lines
        lines += event == 'line'
        return count

    CountedKey.calls = 0
    gc.collect()
    gc.disable()  # a finalizer of somebody else's garbage would be counted
    sys.settrace(count)
    try:
        for key in keys[size:]:
            pool.reserve([key])
    finally:
        sys.settrace(None)
        gc.enable()
    return lines, CountedKey.calls


@pytest.mark.parametrize('policy', ['fifo', 'lru'])
def test_an_insertion_takes_the_same_steps_in_a_pool_of_any_size(policy):
    assert (
        steps_of_insertions(policy, 128)
        == steps_of_insertions(policy, 512)
        == steps_of_insertions(policy, 4096)
    )


@pytest.mark.parametrize('policy', ['lfu', 'priority'])
def test_an_insertion_takes_hardly_more_steps_in_a_large_pool(policy):
    small, large = steps_of_insertions(policy, 512, 1024), steps_of_insertions(policy, 4096, 1024)
    # a heap drops each stale item once and is rebuilt when half of it is stale: constant on average
    assert large[0] <= 1.5 * small[0]
    assert large[1] <= 1.5 * small[1]


class CountedPriority(float):
    """A priority that counts how often any is compared."""

    calls = 0

    def __lt__(self, other: float) -> bool:
        CountedPriority.calls += 1
        return float(self) < float(other)

    def __eq__(self, other: object) -> bool:
        CountedPriority.calls += 1
        return isinstance(other, float) and float(self) == float(other)

    __hash__ = float.__hash__


@pytest.mark.parametrize('size', [128, 1024, 8192])
def test_an_insertion_by_priority_compares_a_logarithm_of_the_entries(size):
    order = LowestPriority()
    for number in range(size):
        order.insert(number)
        order.set_priority(number, CountedPriority(number * 37 % size))
    CountedPriority.calls = 0
    for number in range(size, 2 * size):
        order.remove(order.victim())
        order.insert(number)
        order.set_priority(number, CountedPriority(number * 37 % size + size))
    assert CountedPriority.calls <= 8 * math.log2(size) * size


@pytest.mark.parametrize('policy', POLICIES)
def test_the_order_keeps_no_memory_of_what_was_changed_often(policy):
    order = STRATEGIES[EvictionStrategy(policy)]()
    for number in range(8):
        order.insert(number)
    for repetition in range(1000):
        order.touch(3)
        order.set_priority(5, float(repetition % 7))
        order.insert(4)
        order.hold(6)
        order.release(6)
    assert len(order) == 8
    assert len(getattr(order, '_heap', [])) <= 2 * 8 + 32
    order.clear()
    with pytest.raises(LookupError, match='every entry is pinned'):
        order.victim()
