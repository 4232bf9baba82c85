"""A bounded set of cached histories: keys, slots of a storage, and eviction."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from lzero_kv.cache.entry import KVEntry, check_finite, layout_of, row_from_keys_values
from lzero_kv.cache.eviction import EvictionOrder, EvictionStrategy
from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.layout import KVBatch, KVLayout, positive
from lzero_kv.cache.stats import CacheStats
from lzero_kv.cache.storage import KVStorage


class KVCachePool:
    """Up to ``pool_size`` histories by key, in slots of one storage. Not thread-safe.

    Arguments:
        pool_size: number of slots.
        eviction_strategy: which entry makes room in a full pool; a member or its value.
        enable_stats: whether events are counted.
        name: name in messages.
        layout: shape of a history; None takes it from the first object given to :meth:`set`.
        storage: a storage shared with other pools; this pool owns its slots ``first_slot`` to
            ``first_slot + pool_size - 1``.
        first_slot: see ``storage``.

    Raises:
        ValueError: a size is out of range, the strategy is unknown, or ``layout`` is not that of ``storage``.
    """

    def __init__(
        self,
        pool_size: int,
        eviction_strategy: EvictionStrategy | str = EvictionStrategy.FIFO,
        enable_stats: bool = True,
        name: str = 'default',
        *,
        layout: KVLayout | None = None,
        storage: KVStorage | None = None,
        first_slot: int = 0,
    ) -> None:
        pool_size = positive('pool_size', pool_size)
        if storage is None:
            if first_slot:
                raise ValueError(f'first_slot={first_slot} needs the storage that it counts in: storage=')
            storage = KVStorage(layout, pool_size)
        elif not 0 <= first_slot <= storage.slots - pool_size:
            raise ValueError(
                f"slots [{first_slot}, {first_slot + pool_size}) are not all in the storage's "
                f'[0, {storage.slots})'
            )
        elif layout not in (None, storage.known_layout):
            raise ValueError(
                f'expected the layout of the storage, {storage.known_layout}, got {layout}; leave layout out'
            )
        self.storage = storage
        """The tensor behind the pool."""
        self.pool_size = pool_size
        self.eviction_strategy = EvictionStrategy(eviction_strategy)
        self.enable_stats = enable_stats
        self.name = name
        self.first_slot = first_slot
        self.stats = CacheStats()
        """Counters; all zero where ``enable_stats`` is False."""
        self._order = EvictionOrder(self.eviction_strategy, first_slot + self.pool_size)
        self._queries = 0
        self._stores = 0
        self._forget()

    def _forget(self) -> None:
        self._key_to_index: dict[Hashable, int] = {}  # LightZero's world model reads it under this name
        self._key_of: dict[int, Hashable] = {}
        self._stored_at: dict[int, int] = {}
        self._accessed_at: dict[int, int] = {}
        self._returned: list[int] = []
        self._unused = self.first_slot

    def __len__(self) -> int:
        return len(self._key_to_index)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._key_to_index

    def keys(self) -> list[Hashable]:
        """The cached keys, in the order of their first stores."""
        return list(self._key_to_index)

    def peek(self, key: Hashable) -> int:
        """The slot of ``key`` or ``NO_SLOT``; not counted, and no use of the entry."""
        return self._key_to_index.get(key, NO_SLOT)

    @property
    def capacity(self) -> int:
        """The same as ``pool_size``."""
        return self.pool_size

    @property
    def occupancy(self) -> float:
        """Share of the slots that hold a history, 0.0 to 1.0."""
        return len(self) / self.pool_size

    @property
    def bytes(self) -> int:
        """Bytes of this pool's slots; 0 until the storage is allocated."""
        return self.pool_size * self.storage.layout.row_bytes if self.storage.bytes else 0

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[slots]``: tokens of the history in each slot of the storage, indexed by absolute slot."""
        return self.storage.lengths

    @property
    def next_positions(self) -> np.ndarray:
        """int64 ``[slots]``: logical position of the next token of each slot of the storage."""
        return self.storage.next_positions

    def describe(self) -> dict[str, int | float]:
        """Counters and sizes as numbers, by name."""
        return {
            **self.stats.as_dict(),
            'entries': len(self),
            'capacity': self.pool_size,
            'occupancy': self.occupancy,
            'bytes': self.bytes,
        }

    def lookup(self, keys: Iterable[Hashable]) -> np.ndarray:
        """Absolute slots (int64 ``[B]``) or ``NO_SLOT``: one query for each key; a hit is a use of its
        entry."""
        return np.array(self.find(list(keys)), np.int64)

    def find(self, keys: Sequence[Hashable]) -> list[int]:
        """As :meth:`lookup`, as a list."""
        slot_of = self._key_to_index.get
        slots = [slot_of(key, NO_SLOT) for key in keys]
        hits = slots if NO_SLOT not in slots else [slot for slot in slots if slot != NO_SLOT]
        self._order.hit(hits)
        if self.enable_stats:
            stats, accessed_at, distances = self.stats, self._accessed_at, []
            for query, slot in enumerate(slots, self._queries):
                if slot != NO_SLOT:
                    distances.append(query - accessed_at[slot])
                    accessed_at[slot] = query + 1
            self._queries += len(slots)
            stats.total_queries += len(slots)
            stats.hits += len(hits)
            stats.misses += len(slots) - len(hits)
            stats.reuse_distance.add_all(distances)
        return slots

    def reserve(self, keys: Iterable[Hashable]) -> np.ndarray:
        """Slots (absolute, int64 ``[B]``) for a batch of stores, counted as such.

        A known key keeps its slot, another gets a free one or that of a victim; an entry of this batch is no
        victim.

        Raises:
            ValueError: a key is there twice.
            RuntimeError: the batch is larger than the pool. Nothing is changed.
        """
        keys = list(keys)
        return self.commit(keys, self.plan(keys))

    def plan(self, keys: Sequence[Hashable]) -> list[int]:
        """The slots that known keys of a store have, ``NO_SLOT`` for others; raises as :meth:`reserve`.
        Changes nothing."""
        if len(set(keys)) != len(keys):
            twice = sorted({str(key) for key in keys if list(keys).count(key) > 1})
            raise ValueError(
                f"pool '{self.name}': every key of a batch must be there once, got {twice} repeatedly"
            )
        if len(keys) > self.pool_size:
            raise RuntimeError(
                f"pool '{self.name}': {len(keys)} histories do not fit into {self.pool_size} slots; "
                f'store fewer at once, or make the pool larger'
            )
        slot_of = self._key_to_index.get
        return [slot_of(key, NO_SLOT) for key in keys]

    def commit(self, keys: Sequence[Hashable], slots: list[int]) -> np.ndarray:
        """Carry out what :meth:`plan` answered with ``slots``; returns the slots as :meth:`reserve`."""
        new = slots.count(NO_SLOT)
        missing = new - self.pool_size + len(self._key_to_index)
        if missing > 0:
            self._remove(self._order.victims(missing, [slot for slot in slots if slot != NO_SLOT]))
            if self.enable_stats:
                self.stats.evictions += missing
        taken = list(slots)
        for place, slot in enumerate(slots):
            if slot == NO_SLOT:
                if self._returned:
                    slot = self._returned.pop()
                else:
                    slot, self._unused = self._unused, self._unused + 1
                taken[place] = slot
                self._key_to_index[keys[place]], self._key_of[slot] = slot, keys[place]
        self._order.store(taken)
        if self.enable_stats:
            for store, (before, slot) in enumerate(zip(slots, taken, strict=True), self._stores + 1):
                self._accessed_at[slot] = self._queries
                if before == NO_SLOT:
                    self._stored_at[slot] = store
            self._stores += len(taken)
            self.stats.stores += len(taken)
            self.stats.overwrites += len(taken) - new
        return np.array(taken, np.int64)

    def _remove(self, slots: list[int]) -> None:
        for slot in slots:
            del self._key_to_index[self._key_of.pop(slot)]
        self._returned += slots
        self._order.remove(slots)
        self._count_lifetimes(slots)

    def _count_lifetimes(self, slots: Iterable[int]) -> None:
        if self.enable_stats:
            self.stats.lifetime.add_all([self._stores - self._stored_at[slot] for slot in slots])

    def discard(self, keys: Iterable[Hashable]) -> int:
        """Forget these keys; returns how many were there. Not counted as evictions."""
        known = [self._key_to_index[key] for key in dict.fromkeys(keys) if key in self._key_to_index]
        self._remove(known)
        return len(known)

    def clear(self) -> None:
        """Forget all keys; the tensor and the counters stay."""
        self._count_lifetimes(self._key_of)
        self._order.remove(slice(None))
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
        if any(map(math.isnan, numbers)):
            raise ValueError(f'priorities must be numbers, got NaN among {numbers}')
        self._order.set_priorities(self._slots_of(keys), numbers)

    def load(self, keys: Iterable[Hashable]) -> KVBatch:
        """Copies of the histories of ``keys``; each is one query, a hit.

        Raises:
            KeyError: names the keys that are not cached. Nothing is counted.
        """
        keys = list(keys)
        storage, slots = self.storage, self._slots_of(keys)
        self.find(keys)
        return KVBatch(storage.load(slots), storage.lengths[slots], storage.next_positions[slots])

    def store(self, keys: Iterable[Hashable], batch: KVBatch) -> np.ndarray:
        """Write a batch of histories; returns their absolute slots, int64 ``[B]``.

        Raises:
            ValueError, RuntimeError: as :meth:`reserve`, the shape or a length does not fit the layout, or a
                number is not finite.
            TypeError: the batch has another dtype. Nothing is changed.
        """
        keys, storage = list(keys), self.storage
        check_finite(batch.kv)
        numbers = storage.check_batch(len(keys), batch.kv, batch.lengths, batch.next_positions)
        planned = self.plan(keys)
        storage.allocate()
        slots = self.commit(keys, planned)
        storage.write(slots, batch.kv, *numbers)
        return slots

    def get(self, key: Hashable) -> KVEntry | None:
        """A private copy of the history of ``key``, or None; one query."""
        slot = self.find([key])[0]
        if slot == NO_SLOT:
            return None
        storage = self.storage
        size, next_position = int(storage.lengths[slot]), int(storage.next_positions[slot])
        return KVEntry.from_row(storage.layout, storage.load([slot], newest=size), size, next_position)

    def set(self, key: Hashable, kv: Any) -> int:
        """Store a copy of one history; returns its absolute slot.

        Arguments:
            kv: a :class:`KVEntry` or a ``KeysValues``-like object of one sample.

        Raises:
            TypeError: ``kv`` looks different or has another dtype.
            ValueError: layers, heads or head_dim differ, it has too many tokens, or a number is not finite.
            RuntimeError: there is no memory. Nothing is changed.
        """
        storage = self.storage
        layout = storage.known_layout or layout_of(kv)
        row, size, next_position = row_from_keys_values(kv, layout)
        storage.allocate(layout)
        slots = self.reserve([key])
        storage.write(slots, row, np.array([size]), np.array([next_position]))
        return int(slots[0])

    def resize(self, pool_size: int) -> None:
        """Change the number of slots of a pool that is the last one of its storage. Entries keep their slots.

        Raises:
            TypeError, ValueError: ``pool_size`` is no integer or not positive.
            RuntimeError: a pool that is not empty would shrink, another pool's slots follow, or there is no
                memory. Nothing is changed.
        """
        pool_size = positive('pool_size', pool_size)
        if self._key_to_index and pool_size < self.pool_size:
            raise RuntimeError(f"pool '{self.name}' holds {len(self)} entries; call clear() before resize()")
        end = self.first_slot + pool_size
        if self.first_slot + self.pool_size != self.storage.slots:
            raise RuntimeError(
                f"pool '{self.name}' cannot change its size: other slots follow in its storage"
            )
        self.storage.resize(end, keep=self.storage.slots if self._key_to_index else self.first_slot)
        if not self._key_to_index:
            self._forget()
        self.pool_size = pool_size
        self._order.resize(end)

    def _slots_of(self, keys: list[Hashable]) -> list[int]:
        missing = [key for key in keys if key not in self._key_to_index]
        if missing:
            raise KeyError(f"pool '{self.name}': not cached: {missing}")
        return [self._key_to_index[key] for key in keys]

    def __repr__(self) -> str:
        return (
            f"KVCachePool(name='{self.name}', entries={len(self)}/{self.pool_size}, "
            f'strategy={self.eviction_strategy.value}, hit_rate={self.stats.hit_rate:.3f})'
        )
