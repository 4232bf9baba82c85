"""Faults that a cache may have, planted one at a time: the comparison with the reference must find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz
import numpy as np
import pytest
import torch

from lzero_kv.cache.bookkeeping import SlotBook
from lzero_kv.cache.compat import NamedAccess
from lzero_kv.cache.entry import KVEntry
from lzero_kv.cache.eviction import FirstInFirstOut, LeastFrequentlyUsed, LeastRecentlyUsed, LowestPriority
from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.stats import CacheStats
from lzero_kv.cache.storage import KVSlab

OPERATIONS = 1200


def keys_and_values_swapped(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVSlab, index: np.ndarray, rows: torch.Tensor, width: int | None) -> None:
        if rows.ndim == 4:
            rows = rows.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
        original(self, index, rows, width)

    original = KVSlab._scatter
    patch.setattr(KVSlab, '_scatter', scatter)


def first_columns_loaded(patch: pytest.MonkeyPatch) -> None:
    def columns(self: KVSlab, newest: int | None) -> torch.Tensor:
        data = original(self, None)
        return data if newest is None else data[:, :, :newest]

    original = KVSlab._columns
    patch.setattr(KVSlab, '_columns', columns)


def one_column_too_few_stored(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVSlab, index: np.ndarray, rows: torch.Tensor, width: int | None) -> None:
        narrow = rows.ndim == 4 and rows.shape[2] > 1
        original(self, index, rows[:, :, 1:] if narrow else rows, rows.shape[2] - 1 if narrow else width)

    original = KVSlab._scatter
    patch.setattr(KVSlab, '_scatter', scatter)


def rows_stored_in_another_order(patch: pytest.MonkeyPatch) -> None:
    def scatter(self: KVSlab, index: np.ndarray, rows: torch.Tensor, width: int | None) -> None:
        original(self, np.sort(index), rows, width)

    original = KVSlab._scatter
    patch.setattr(KVSlab, '_scatter', scatter)


def live_slot_handed_out(patch: pytest.MonkeyPatch) -> None:
    def load(
        self: KVSlab, slots: Any, *, newest: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        index = self.check_slots(slots)
        if out is None and len(index) == 1:
            return self._columns(newest)[index[0] : index[0] + 1]
        return original(self, slots, newest=newest, out=out)

    original = KVSlab.load
    patch.setattr(KVSlab, 'load', load)


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
    def write(self: KVSlab, slots: Any, rows: torch.Tensor, lengths: Any, next_positions: Any) -> None:
        original(self, slots, rows, np.maximum(lengths, self.lengths[slots]), next_positions)

    original = KVSlab.write
    patch.setattr(KVSlab, 'write', write)


def positions_forgotten(patch: pytest.MonkeyPatch) -> None:
    def write(self: KVSlab, slots: Any, rows: torch.Tensor, lengths: Any, next_positions: Any) -> None:
        original(self, slots, rows, lengths, lengths)

    original = KVSlab.write
    patch.setattr(KVSlab, 'write', write)


def stale_key_after_an_eviction(patch: pytest.MonkeyPatch) -> None:
    def remove(self: SlotBook, key: Any) -> None:
        slot = self._slot_of[key]
        original(self, key)
        self._slot_of[key] = slot

    original = SlotBook._remove
    patch.setattr(SlotBook, '_remove', remove)


def slot_given_twice(patch: pytest.MonkeyPatch) -> None:
    def remove(self: SlotBook, key: Any) -> None:
        original(self, key)
        if len(self._free) < self.pool_size - len(self._slot_of) + 1:
            self._free.append(self._free[-1])

    original = SlotBook._remove
    patch.setattr(SlotBook, '_remove', remove)


def slot_lost_after_a_discard(patch: pytest.MonkeyPatch) -> None:
    def discard(self: SlotBook, keys: Any) -> int:
        count = original(self, keys)
        del self._free[1:]
        return count

    original = SlotBook.discard
    patch.setattr(SlotBook, 'discard', discard)


def pins_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeastRecentlyUsed, 'hold', lambda self, key: None)
    patch.setattr(LeastRecentlyUsed, 'release', lambda self, key: None)


def pins_forgotten_by_a_store(patch: pytest.MonkeyPatch) -> None:
    def place(self: SlotBook, key: Any) -> int:
        self.unpin([key])
        return original(self, key)

    original = SlotBook._place
    patch.setattr(SlotBook, '_place', place)


def batch_evicts_its_own(patch: pytest.MonkeyPatch) -> None:
    def commit(self: SlotBook, keys: Any, evictions: int) -> np.ndarray:
        return np.concatenate(
            [original(self, [key], self.plan([key])) for key in keys] or [np.empty(0, np.int64)]
        )

    original = SlotBook.commit
    patch.setattr(SlotBook, 'commit', commit)


def duplicates_accepted(patch: pytest.MonkeyPatch) -> None:
    def plan(self: SlotBook, keys: Any) -> int:
        return original(self, list(dict.fromkeys(keys)))

    original = SlotBook.plan
    patch.setattr(SlotBook, 'plan', plan)


def hits_do_not_touch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeastRecentlyUsed, 'touch', lambda self, key: None)


def hits_touch_the_first_stored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FirstInFirstOut, 'touch', LeastRecentlyUsed.touch)


def age_not_renewed(patch: pytest.MonkeyPatch) -> None:
    def insert(self: FirstInFirstOut, key: Any) -> None:
        if key not in self._held:
            self._order.setdefault(key)

    patch.setattr(FirstInFirstOut, 'insert', insert)


def uses_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeastFrequentlyUsed, 'touch', lambda self, key: None)


def uses_kept_after_removal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LeastFrequentlyUsed, 'remove', lambda self, key: self._queued.pop(key, None))


def falling_priorities_ignored(patch: pytest.MonkeyPatch) -> None:
    def set_priority(self: LowestPriority, key: Any, value: float) -> None:
        original(self, key, max(value, self._value[key]))

    original = LowestPriority.set_priority
    patch.setattr(LowestPriority, 'set_priority', set_priority)


def stale_heap_items_believed(patch: pytest.MonkeyPatch) -> None:
    def victim(self: LowestPriority) -> Any:
        while self._heap[0][2] not in self._queued:
            self._heap.pop(0)
        return self._heap[0][2]

    patch.setattr(LowestPriority, 'victim', victim)


def order_not_cleared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LowestPriority, 'clear', lambda self: (self._heap.clear(), self._queued.clear()))


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
    def clear(self: SlotBook) -> None:
        original(self)
        self.stats = CacheStats()

    original = SlotBook.clear
    patch.setattr(SlotBook, 'clear', clear)


def lifetimes_from_the_last_store(patch: pytest.MonkeyPatch) -> None:
    def place(self: SlotBook, key: Any) -> int:
        slot = original(self, key)
        self._stored_at[slot - self.first_slot] = self._store_clock
        return slot

    original = SlotBook._place
    patch.setattr(SlotBook, '_place', place)


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
    patch.setattr(KVSlab, '_replace', lambda self, slots, keep: setattr(self, '_data', self._new(slots)))


def bound_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCacheManager, '_recurrent_limit', lambda self, env_num: None)


def nodes_kept_by_the_next_search(patch: pytest.MonkeyPatch) -> None:
    def reserve(self: KVCacheManager, entries: int, *, minimum: int = 1) -> int:
        if max(entries, minimum) <= self.recur_pool.pool_size:
            return self.recur_pool.pool_size
        return original(self, entries, minimum=minimum)

    original = KVCacheManager.reserve_recurrent
    patch.setattr(KVCacheManager, 'reserve_recurrent', reserve)


def misses_found_in_slot_zero(patch: pytest.MonkeyPatch) -> None:
    def find(self: SlotBook, key: Any) -> int:
        slot = original(self, key)
        return self.first_slot if slot == NO_SLOT and len(self) == self.pool_size else slot

    original = SlotBook.find
    patch.setattr(SlotBook, 'find', find)


POOL_FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    keys_and_values_swapped: 'lru',
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
    pins_ignored: 'lru',
    pins_forgotten_by_a_store: 'lfu',
    batch_evicts_its_own: 'priority',
    duplicates_accepted: 'lru',
    hits_do_not_touch: 'lru',
    hits_touch_the_first_stored: 'fifo',
    age_not_renewed: 'fifo',
    uses_not_counted: 'lfu',
    uses_kept_after_removal: 'lfu',
    falling_priorities_ignored: 'priority',
    stale_heap_items_believed: 'priority',
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
    bound_ignored: 'lru',
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
