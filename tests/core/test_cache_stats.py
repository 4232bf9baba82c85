"""Counters and histograms."""

from __future__ import annotations

import pytest

from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.stats import CacheStats, Log2Histogram

from .comparing import LAYOUT


def histogram(*values: int) -> Log2Histogram:
    made = Log2Histogram()
    for value in values:
        made.add(value)
    return made


@pytest.mark.parametrize(
    ('value', 'bucket'), [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (1023, 10), (1024, 11)]
)
def test_buckets_end_at_powers_of_two(value, bucket):
    made = histogram(value)
    assert made.counts == [0] * bucket + [1]
    assert made.limits == [2**power for power in range(bucket + 1)]
    assert value < made.limits[bucket]
    assert bucket == 0 or value >= made.limits[bucket - 1]


def test_negative_values_are_refused():
    made = histogram(3)
    with pytest.raises(ValueError, match='integers from 0, got -1'):
        made.add(-1)
    assert made == histogram(3)


def test_sum_and_difference():
    left, right = histogram(0, 3, 3), histogram(5)
    both = left + right
    assert both == histogram(5, 3, 0, 3)
    assert left == histogram(0, 3, 3) and right == histogram(5)
    assert both - left == right
    assert (both.total, both.counts) == (4, [1, 0, 2, 1])
    assert histogram() == left - left
    assert left != both


def test_rates_before_and_after_the_first_query():
    stats = CacheStats()
    assert (stats.hit_rate, stats.miss_rate, stats.total_queries) == (0.0, 1.0, 0)
    stats = CacheStats(total_queries=8, hits=6, misses=2)
    assert (stats.hit_rate, stats.miss_rate, stats.total_queries) == (0.75, 0.25, 8)


def test_queries_can_be_counted_from_outside():
    stats = CacheStats(hits=10, misses=5, evictions=2, total_queries=15)
    stats.total_queries += 5
    assert (stats.queries, stats.hit_rate, stats.as_dict()['queries']) == (20, 0.5, 20)
    stats.reset()
    assert (stats.total_queries, stats.miss_rate) == (0, 1.0)


def test_snapshots_do_not_change_and_can_be_subtracted():
    stats = CacheStats(total_queries=8, hits=6, misses=2, lifetime=histogram(3))
    before = stats.snapshot()
    stats.total_queries += 5
    stats.misses += 5
    stats.lifetime.add(9)
    assert before == CacheStats(total_queries=8, hits=6, misses=2, lifetime=histogram(3))
    assert stats - before == CacheStats(total_queries=5, misses=5, lifetime=histogram(9))
    assert before + (stats - before) == stats
    stats.reset()
    assert stats == CacheStats()


def test_as_dict_has_numbers_only():
    numbers = CacheStats(total_queries=8, hits=6, misses=2, rebuilt_tokens=11).as_dict()
    assert set(numbers) == {
        *('queries', 'hits', 'misses', 'hit_rate', 'miss_rate'),
        *('stores', 'overwrites', 'evictions', 'rebuilt_tokens', 'window_tokens'),
        *('new_tokens', 'served_tokens', 'computed_tokens', 'saved_tokens'),
    }
    assert all(type(value) in (int, float) for value in numbers.values())


def test_saved_tokens_are_a_part_of_what_a_pass_without_a_cache_computes():
    assert CacheStats().saved_tokens == 0.0
    stats = CacheStats(new_tokens=2, window_tokens=3, rebuilt_tokens=5, served_tokens=30)
    assert (stats.computed_tokens, stats.saved_tokens) == (10, 0.75)


def test_lifetime_is_stores_between_and_reuse_distance_is_queries_between():
    pool = KVCachePool(3, 'fifo', layout=LAYOUT)
    pool.reserve('abc')
    pool.lookup('a')  # no query since it was stored
    pool.lookup('xyza')  # three queries between
    pool.reserve('a')
    pool.lookup('a')  # none since it was stored again
    assert pool.stats.reuse_distance == histogram(0, 3, 0)
    pool.reserve('d')  # evicts b, after the stores of c and a
    pool.discard('c')  # after the stores of a and d
    pool.clear()  # a: b, c, a and d; d: none
    assert pool.stats.lifetime == histogram(2, 2, 4, 0)


def test_nothing_is_counted_when_switched_off():
    pool = KVCachePool(2, 'lru', enable_stats=False, layout=LAYOUT)
    pool.reserve('abc'[:2])
    pool.lookup('axb')
    pool.reserve('c')
    pool.discard('c')
    pool.clear()
    assert pool.stats == CacheStats()
    assert pool.describe()['queries'] == 0
