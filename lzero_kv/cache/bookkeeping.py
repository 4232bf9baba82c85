"""Which key is in which slot, who makes room, and how often: the part of a pool that needs no tensor."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from lzero_kv.cache.eviction import STRATEGIES, EvictionStrategy
from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.stats import CacheStats


class SlotBook:
    """Up to ``pool_size`` keys in the slots ``[first_slot, first_slot + pool_size)``.

    Arguments:
        pool_size: number of slots.
        eviction_strategy: who makes room; a member or its value.
        enable_stats: whether events are counted.
        name: name in messages.
        first_slot: number of the first slot.

    Raises:
        ValueError: ``pool_size`` is not positive, or the strategy is unknown.
    """

    def __init__(
        self,
        pool_size: int,
        eviction_strategy: EvictionStrategy | str,
        enable_stats: bool,
        name: str,
        first_slot: int,
    ) -> None:
        if pool_size <= 0:
            raise ValueError(f'pool_size must be at least 1, got {pool_size}')
        self.pool_size = int(pool_size)
        self.eviction_strategy = EvictionStrategy(eviction_strategy)
        self.enable_stats = enable_stats
        self.name = name
        self.stats = CacheStats()
        """Counters; they stay zero when ``enable_stats`` is off."""
        self.first_slot = first_slot
        self._order = STRATEGIES[self.eviction_strategy]()
        self._pinned: set[Hashable] = set()
        self._query_clock = 0
        self._store_clock = 0
        self._forget()

    def _forget(self) -> None:
        self._slot_of: dict[Hashable, int] = {}
        # handed out from the end: the first slots first
        self._free = list(range(self.first_slot + self.pool_size - 1, self.first_slot - 1, -1))
        self._stored_at = [0] * self.pool_size
        self._accessed_at = [0] * self.pool_size
        self._pinned.clear()
        self._order.clear()

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slot_of

    def keys(self) -> list[Hashable]:
        """The cached keys, in the order of their first stores."""
        return list(self._slot_of)

    def peek(self, key: Hashable) -> int:
        """The slot of ``key`` or ``NO_SLOT``; counts nothing and touches nothing."""
        return self._slot_of.get(key, NO_SLOT)

    @property
    def capacity(self) -> int:
        """The same as ``pool_size``."""
        return self.pool_size

    @property
    def occupancy(self) -> float:
        """Share of the slots that hold a history, 0.0 to 1.0."""
        return len(self._slot_of) / self.pool_size

    @property
    def pinned(self) -> frozenset[Hashable]:
        """Keys that eviction passes over."""
        return frozenset(self._pinned)

    def find(self, key: Hashable) -> int:
        """The absolute slot of ``key`` or ``NO_SLOT``: one query, and a hit touches the entry."""
        slot = self._slot_of.get(key, NO_SLOT)
        if slot != NO_SLOT:
            self._order.touch(key)
        if self.enable_stats:
            stats, clock = self.stats, self._query_clock
            self._query_clock = clock + 1
            stats.queries += 1
            if slot == NO_SLOT:
                stats.misses += 1
            else:
                stats.hits += 1
                local = slot - self.first_slot
                stats.reuse_distance.add(clock - self._accessed_at[local])
                self._accessed_at[local] = clock + 1
        return slot

    def lookup(self, keys: Iterable[Hashable]) -> np.ndarray:
        """Absolute slots (int64 ``[B]``) or ``NO_SLOT``: one query for each key; a hit touches its entry."""
        return np.array([self.find(key) for key in keys], np.int64)

    def reserve(self, keys: Iterable[Hashable]) -> np.ndarray:
        """Slots (absolute, int64 ``[B]``) for a batch of stores, counted as such.

        A known key keeps its slot, another gets a free one or that of a victim; neither a pinned entry nor
        one of this batch makes room.

        Raises:
            ValueError: a key is there twice.
            RuntimeError: not enough entries may be evicted. Nothing is changed.
        """
        keys = list(keys)
        return self.commit(keys, self.plan(keys))

    def plan(self, keys: Sequence[Hashable]) -> int:
        """How many evictions a store of ``keys`` takes; raises as :meth:`reserve`, changes nothing."""
        index = self._slot_of
        if len(set(keys)) != len(keys):
            twice = sorted({str(key) for key in keys if list(keys).count(key) > 1})
            raise ValueError(
                f"pool '{self.name}': every key of a batch must be there once, got {twice} repeatedly"
            )
        known = [key for key in keys if key in index]
        wanted = len(keys) - len(known) - len(self._free)
        if wanted <= 0:
            return 0
        evictable = len(self._order) - sum(key not in self._pinned for key in known)
        if wanted > evictable:
            raise RuntimeError(
                f"pool '{self.name}': {len(keys)} histories, {len(keys) - len(known)} new, do not fit: "
                f'of {self.pool_size} slots {len(self._free)} are free, {len(self._pinned)} pinned, and '
                f'{evictable} others may be evicted; store fewer at once, unpin, or make the pool larger'
            )
        return wanted

    def commit(self, keys: Sequence[Hashable], evictions: int) -> np.ndarray:
        """Carry out what :meth:`plan` found possible; returns the slots as :meth:`reserve`."""
        index, order = self._slot_of, self._order
        if evictions:
            held = [key for key in keys if key in index and key not in self._pinned]
            for key in held:
                order.hold(key)
            for _ in range(evictions):
                self._remove(order.victim())
            for key in held:
                order.release(key)
            if self.enable_stats:
                self.stats.evictions += evictions
        slots = [self._place(key) for key in keys]
        return np.array(slots, np.int64)

    def _place(self, key: Hashable) -> int:
        slot = self._slot_of.get(key, NO_SLOT)
        known = slot != NO_SLOT
        if not known:
            slot = self._slot_of[key] = self._free.pop()
        self._order.insert(key)
        if self.enable_stats:
            self._store_clock += 1
            self.stats.stores += 1
            local = slot - self.first_slot
            if known:
                self.stats.overwrites += 1
            else:
                self._stored_at[local] = self._store_clock
            self._accessed_at[local] = self._query_clock
        return slot

    def _remove(self, key: Hashable) -> None:
        slot = self._slot_of.pop(key)
        self._order.remove(key)
        self._pinned.discard(key)
        self._free.append(slot)
        if self.enable_stats:
            self.stats.lifetime.add(self._store_clock - self._stored_at[slot - self.first_slot])

    def pin(self, keys: Iterable[Hashable]) -> None:
        """Keep these entries until :meth:`unpin`; KeyError, and no change, when one is not cached."""
        keys = list(keys)
        self._require(keys)
        for key in keys:
            if key not in self._pinned:
                self._pinned.add(key)
                self._order.hold(key)

    def unpin(self, keys: Iterable[Hashable]) -> None:
        """Let these entries be evicted again; keys that are not pinned are passed over."""
        for key in keys:
            if key in self._pinned:
                self._pinned.remove(key)
                self._order.release(key)

    def discard(self, keys: Iterable[Hashable]) -> int:
        """Forget these keys, pinned or not; returns how many were there. Not counted as evictions."""
        known = [key for key in dict.fromkeys(keys) if key in self._slot_of]
        for key in known:
            self._remove(key)
        return len(known)

    def clear(self) -> None:
        """Forget all keys and pins; the tensor and the counters stay."""
        if self.enable_stats:
            clock, stored_at, first = self._store_clock, self._stored_at, self.first_slot
            self.stats.lifetime.add_all([clock - stored_at[slot - first] for slot in self._slot_of.values()])
        self._forget()

    def set_priorities(self, keys: Iterable[Hashable], values: Iterable[float]) -> None:
        """Give entries priorities, such as visit counts; only the strategy PRIORITY reads them.

        Raises:
            KeyError: a key is not cached.
            ValueError: the numbers of keys and values differ, or a value is not a number. Nothing is changed.
        """
        keys, numbers = list(keys), [float(value) for value in values]
        if len(keys) != len(numbers):
            raise ValueError(
                f'expected one priority for each key, got {len(keys)} keys and {len(numbers)} values'
            )
        if any(math.isnan(number) for number in numbers):
            raise ValueError(f'priorities must be numbers, got NaN among {numbers}')
        self._require(keys)
        for key, number in zip(keys, numbers, strict=True):
            self._order.set_priority(key, number)

    def _require(self, keys: list[Hashable]) -> None:
        missing = [key for key in keys if key not in self._slot_of]
        if missing:
            raise KeyError(f"pool '{self.name}': not cached: {missing}")
