"""Faults that a cache may have, planted one at a time: the comparison with the reference must find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz
import numpy as np
import pytest
import torch

from lzero_kv.cache.compat import NamedAccess
from lzero_kv.cache.entry import KVEntry
from lzero_kv.cache.eviction import EvictionOrder
from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.stats import CacheStats
from lzero_kv.cache.storage import KVStorage

OPERATIONS = 1200


def keys_and_values_swapped(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVStorage, index: np.ndarray, rows: torch.Tensor) -> None:
        original(self, index, rows.unflatten(1, (-1, 2)).flip(2).flatten(1, 2))

    original = KVStorage._scatter
    patch.setattr(KVStorage, '_scatter', scatter)


def heads_swapped(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVStorage, index: np.ndarray, rows: torch.Tensor) -> None:
        original(self, index, rows.flip(2))

    original = KVStorage._scatter
    patch.setattr(KVStorage, '_scatter', scatter)


def first_columns_loaded(patch: pytest.MonkeyPatch) -> None:
    def columns(self: KVStorage, newest: int) -> torch.Tensor:
        return self.allocate()[:, :, :, :newest]

    patch.setattr(KVStorage, '_columns', columns)


def one_column_too_few_stored(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVStorage, index: np.ndarray, rows: torch.Tensor) -> None:
        original(self, index, rows[:, :, :, 1:] if rows.shape[3] > 1 else rows)

    original = KVStorage._scatter
    patch.setattr(KVStorage, '_scatter', scatter)


def rows_stored_in_another_order(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVStorage, index: np.ndarray, rows: torch.Tensor) -> None:
        original(self, np.sort(index), rows)

    original = KVStorage._scatter
    patch.setattr(KVStorage, '_scatter', scatter)


def live_slot_handed_out(patch: pytest.MonkeyPatch) -> None:
    def load(
        self: KVStorage, slots: Any, *, newest: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        index = self.check_slots(slots)
        if out is None and len(index) == 1:
            return self._columns(self.layout.tokens if newest is None else newest)[index[0] : index[0] + 1]
        return original(self, slots, newest=newest, out=out)

    original = KVStorage.load
    patch.setattr(KVStorage, 'load', load)


def entry_shares_its_row(patch: pytest.MonkeyPatch) -> None:
    handed: list[KVEntry] = []

    def get(self: KVCachePool, key: Any) -> KVEntry | None:
        entry = original(self, key)
        if entry is not None:
            for old in handed[-1:]:
                old[0]._k_cache._cache[:] = entry[0]._k_cache._cache
            handed.append(entry)
        return entry

    original = KVCachePool.get
    patch.setattr(KVCachePool, 'get', get)


def lengths_forgotten(patch: pytest.MonkeyPatch) -> None:
    def write(self: KVStorage, slots: Any, rows: torch.Tensor, lengths: Any, next_positions: Any) -> None:
        original(self, slots, rows, np.maximum(lengths, self.lengths[slots]), next_positions)

    original = KVStorage.write
    patch.setattr(KVStorage, 'write', write)


def positions_forgotten(patch: pytest.MonkeyPatch) -> None:
    def write(self: KVStorage, slots: Any, rows: torch.Tensor, lengths: Any, next_positions: Any) -> None:
        original(self, slots, rows, lengths, lengths)

    original = KVStorage.write
    patch.setattr(KVStorage, 'write', write)


def stale_key_after_an_eviction(patch: pytest.MonkeyPatch) -> None:
    def remove(self: KVCachePool, slots: Any) -> None:
        keys = {self._key_of[slot]: slot for slot in slots}
        original(self, slots)
        self._key_to_index.update(keys)

    original = KVCachePool._remove
    patch.setattr(KVCachePool, '_remove', remove)


def slot_given_twice(patch: pytest.MonkeyPatch) -> None:
    def remove(self: KVCachePool, slots: Any) -> None:
        original(self, slots)
        self._returned += self._returned[-1:]

    original = KVCachePool._remove
    patch.setattr(KVCachePool, '_remove', remove)


def slot_lost_after_a_discard(patch: pytest.MonkeyPatch) -> None:
    def discard(self: KVCachePool, keys: Any) -> int:
        count = original(self, keys)
        del self._returned[1:]
        return count

    original = KVCachePool.discard
    patch.setattr(KVCachePool, 'discard', discard)


def batch_evicts_its_own(patch: pytest.MonkeyPatch) -> None:
    def victims(self: EvictionOrder, count: int, held: Any) -> list[int]:
        return original(self, count, [])

    original = EvictionOrder.victims
    patch.setattr(EvictionOrder, 'victims', victims)


def duplicates_accepted(patch: pytest.MonkeyPatch) -> None:
    def plan(self: KVCachePool, keys: Any) -> list[int]:
        slots = dict(zip(dict.fromkeys(keys), original(self, list(dict.fromkeys(keys))), strict=True))
        return [slots[key] for key in keys]

    original = KVCachePool.plan
    patch.setattr(KVCachePool, 'plan', plan)


def hits_do_not_touch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EvictionOrder, 'hit', lambda self, slots: None)


def hits_touch_the_first_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EvictionOrder, 'hit', EvictionOrder.store)


def age_not_renewed(patch: pytest.MonkeyPatch) -> None:
    def store(self: EvictionOrder, slots: list[int]) -> None:
        original(self, [slot for slot in slots if not self._time[slot]])

    original = EvictionOrder.store
    patch.setattr(EvictionOrder, 'store', store)


def ages_in_another_order(patch: pytest.MonkeyPatch) -> None:
    def store(self: EvictionOrder, slots: list[int]) -> None:
        original(self, slots[::-1])

    original = EvictionOrder.store
    patch.setattr(EvictionOrder, 'store', store)


def uses_not_counted(patch: pytest.MonkeyPatch) -> None:
    def hit(self: EvictionOrder, slots: list[int]) -> None:
        ranks = self._rank.copy()
        original(self, slots)
        self._rank = ranks

    original = EvictionOrder.hit
    patch.setattr(EvictionOrder, 'hit', hit)


def ranks_kept_after_removal(patch: pytest.MonkeyPatch) -> None:
    def remove(self: EvictionOrder, slots: Any) -> None:
        self._time[slots] = 0

    patch.setattr(EvictionOrder, 'remove', remove)


def falling_priorities_ignored(patch: pytest.MonkeyPatch) -> None:
    def set_priorities(self: EvictionOrder, slots: list[int], values: list[float]) -> None:
        original(self, slots, np.maximum(values, self._rank[slots]).tolist())

    original = EvictionOrder.set_priorities
    patch.setattr(EvictionOrder, 'set_priorities', set_priorities)


def empty_slots_chosen(patch: pytest.MonkeyPatch) -> None:
    def victims(self: EvictionOrder, count: int, held: Any) -> list[int]:
        others = np.setdiff1d(np.arange(len(self._time)), held)
        return others[np.argsort(self._time[others])[:count]].tolist()

    patch.setattr(EvictionOrder, 'victims', victims)


def ties_by_slot(patch: pytest.MonkeyPatch) -> None:
    def victims(self: EvictionOrder, count: int, held: Any) -> list[int]:
        others = np.setdiff1d(np.flatnonzero(self._time), held)
        return others[np.argsort(self._rank[others], kind='stable')[:count]].tolist()

    patch.setattr(EvictionOrder, 'victims', victims)


def order_not_cleared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCachePool, 'clear', lambda self: (self._count_lifetimes(self._key_of), self._forget()))


def rejected_store_leaves_its_keys(patch: pytest.MonkeyPatch) -> None:
    def store(self: KVCachePool, keys: Any, batch: Any) -> np.ndarray:
        self.reserve(keys)
        return original(self, keys, batch)

    original = KVCachePool.store
    patch.setattr(KVCachePool, 'store', store)


def rejected_load_counts(patch: pytest.MonkeyPatch) -> None:
    def load(self: KVCachePool, keys: Any) -> Any:
        self.lookup([key for key in keys if key not in self])
        return original(self, keys)

    original = KVCachePool.load
    patch.setattr(KVCachePool, 'load', load)


def clear_forgets_the_counters(patch: pytest.MonkeyPatch) -> None:
    def clear(self: KVCachePool) -> None:
        original(self)
        self.stats = CacheStats()

    original = KVCachePool.clear
    patch.setattr(KVCachePool, 'clear', clear)


def lifetimes_from_the_last_store(patch: pytest.MonkeyPatch) -> None:
    def commit(self: KVCachePool, keys: Any, slots: Any) -> np.ndarray:
        taken = original(self, keys, slots)
        self._stored_at.update(dict.fromkeys(taken.tolist(), self._stores))
        return taken

    original = KVCachePool.commit
    patch.setattr(KVCachePool, 'commit', commit)


def two_queries_for_one(patch: pytest.MonkeyPatch) -> None:
    def hierarchical_get(self: NamedAccess, env_id: int, cache_key: Any) -> KVEntry | None:
        return self.get_init_cache(env_id, cache_key) or self.get_recur_cache(cache_key)

    patch.setattr(NamedAccess, 'hierarchical_get', hierarchical_get)


def nodes_before_roots(patch: pytest.MonkeyPatch) -> None:
    def hierarchical_get(self: NamedAccess, env_id: int, cache_key: Any) -> KVEntry | None:
        nodes = self.recur_pool
        return nodes.get(cache_key) if cache_key in nodes else self.init_pools[env_id].get(cache_key)

    patch.setattr(NamedAccess, 'hierarchical_get', hierarchical_get)


def row_taken_for_environment(patch: pytest.MonkeyPatch) -> None:
    def groups(self: KVCacheManager, keys: Any) -> Any:
        found = original(self, keys)
        pools = self.init_pools
        return [(pools[0] if pool is pools[-1] else pool, rows, own) for pool, rows, own in found]

    original = KVCacheManager._groups
    patch.setattr(KVCacheManager, '_groups', groups)


def roots_lost_when_the_nodes_grow(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVStorage, '_replace', lambda self, slots, keep: setattr(self, '_data', self._new(slots)))


def entries_lost_when_the_pool_grows(patch: pytest.MonkeyPatch) -> None:
    def resize(self: KVCachePool, pool_size: int) -> None:
        if len(self) and pool_size > self.pool_size:
            self.discard(self.keys()[:1])
        original(self, pool_size)

    original = KVCachePool.resize
    patch.setattr(KVCachePool, 'resize', resize)


def order_lost_when_the_pool_grows(patch: pytest.MonkeyPatch) -> None:
    def resize(self: EvictionOrder, slots: int) -> None:
        original(self, slots)
        self._time[:] = self._time[::-1]

    original = EvictionOrder.resize
    patch.setattr(EvictionOrder, 'resize', resize)


def evicted_before_the_pool_grows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, '_make_room', lambda self, keys: None)


def bound_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, '_window_limit', lambda self, kept=0: 10**6)


def copies_of_growth_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, '_window_limit', lambda self, kept=0: original(self))
    original = KVCacheManager._window_limit


def growth_beyond_the_search(patch: pytest.MonkeyPatch) -> None:
    def make_room(self: KVCacheManager, keys: Any) -> None:
        self._most += 1
        original(self, keys)

    original = KVCacheManager._make_room
    patch.setattr(KVCacheManager, '_make_room', make_room)


def nodes_kept_by_the_next_search(patch: pytest.MonkeyPatch) -> None:
    def begin_search(self: KVCacheManager, least: int, most: int, *, upfront: bool = False) -> None:
        if most > self.recur_pool.pool_size:
            original(self, least, most, upfront=upfront)

    original = KVCacheManager.begin_search
    patch.setattr(KVCacheManager, 'begin_search', begin_search)


def misses_found_in_slot_zero(patch: pytest.MonkeyPatch) -> None:
    def find(self: KVCachePool, keys: Any) -> list[int]:
        slots = original(self, keys)
        full = len(self) == self.pool_size
        return [self.first_slot if slot == NO_SLOT and full else slot for slot in slots]

    original = KVCachePool.find
    patch.setattr(KVCachePool, 'find', find)


POOL_FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    keys_and_values_swapped: 'lru',
    heads_swapped: 'lru',
    first_columns_loaded: 'lru',
    one_column_too_few_stored: 'lru',
    rows_stored_in_another_order: 'lru',
    live_slot_handed_out: 'lru',
    entry_shares_its_row: 'lru',
    lengths_forgotten: 'lru',
    positions_forgotten: 'lru',
    stale_key_after_an_eviction: 'fifo',
    slot_given_twice: 'fifo',
    slot_lost_after_a_discard: 'fifo',
    batch_evicts_its_own: 'priority',
    duplicates_accepted: 'lru',
    hits_do_not_touch: 'lru',
    hits_touch_the_first_stored: 'fifo',
    age_not_renewed: 'fifo',
    ages_in_another_order: 'fifo',
    uses_not_counted: 'lfu',
    ranks_kept_after_removal: 'lfu',
    falling_priorities_ignored: 'priority',
    empty_slots_chosen: 'priority',
    ties_by_slot: 'lfu',
    order_not_cleared: 'priority',
    rejected_store_leaves_its_keys: 'lru',
    rejected_load_counts: 'lru',
    clear_forgets_the_counters: 'lru',
    lifetimes_from_the_last_store: 'lru',
    misses_found_in_slot_zero: 'lru',
}
MANAGER_FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    keys_and_values_swapped: 'lru',
    two_queries_for_one: 'lru',
    nodes_before_roots: 'lru',
    row_taken_for_environment: 'lru',
    roots_lost_when_the_nodes_grow: 'lru',
    entries_lost_when_the_pool_grows: 'lru',
    order_lost_when_the_pool_grows: 'lru',
    evicted_before_the_pool_grows: 'lru',
    bound_ignored: 'lru',
    copies_of_growth_not_counted: 'lru',
    growth_beyond_the_search: 'lru',
    nodes_kept_by_the_next_search: 'lru',
    stale_key_after_an_eviction: 'priority',
}


def compare(machine: str, policy: str, operations: int = OPERATIONS) -> str:
    """The first difference that random operations find, or what other error they end in, or ''."""
    twins_of, operation_of = fuzz.MACHINES[machine]
    try:
        return fuzz.run(twins_of, operation_of, policy, operations, seed=5, advance=lambda: None)[2]
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        return f'{type(error).__name__}: {error}'


@pytest.mark.parametrize(
    ('fault', 'policy'), POOL_FAULTS.items(), ids=lambda value: getattr(value, '__name__', value)
)
def test_the_comparison_of_pools_finds(fault, policy, monkeypatch):
    fault(monkeypatch)
    assert compare('pool', policy)


@pytest.mark.parametrize(
    ('fault', 'policy'), MANAGER_FAULTS.items(), ids=lambda value: getattr(value, '__name__', value)
)
def test_the_comparison_of_managers_finds(fault, policy, monkeypatch):
    fault(monkeypatch)
    assert compare('manager', policy)


@pytest.mark.parametrize('policy', ['fifo', 'lru', 'lfu', 'priority'])
@pytest.mark.parametrize('machine', ['pool', 'manager'])
def test_the_comparison_finds_nothing_without_a_fault(machine, policy):
    assert compare(machine, policy, operations=500) == ''
