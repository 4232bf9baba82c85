"""A bounded set of cached histories: keys, slots of a slab, and eviction."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from lzero_kv.cache.bookkeeping import SlotBook
from lzero_kv.cache.entry import KVEntry, layout_of, row_from_keys_values
from lzero_kv.cache.eviction import EvictionStrategy
from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.layout import KVBatch, KVLayout
from lzero_kv.cache.storage import KVSlab


class KVCachePool(SlotBook):
    """Up to ``pool_size`` histories by key, in slots of one slab. One thread at a time may use it.

    Arguments:
        pool_size: number of slots.
        eviction_strategy: who makes room in a full pool; a member or its value.
        enable_stats: whether events are counted.
        name: name in messages.
        layout: shape of a history; None takes it from the first object given to :meth:`set`.
        slab: a slab shared with other pools; this pool owns its slots ``first_slot`` to
            ``first_slot + pool_size - 1``.
        first_slot: see ``slab``.

    Raises:
        ValueError: a size is out of range, the strategy is unknown, or ``layout`` is not that of ``slab``.
    """

    def __init__(
        self,
        pool_size: int,
        eviction_strategy: EvictionStrategy | str = EvictionStrategy.FIFO,
        enable_stats: bool = True,
        name: str = 'default',
        *,
        layout: KVLayout | None = None,
        slab: KVSlab | None = None,
        first_slot: int = 0,
    ) -> None:
        super().__init__(pool_size, eviction_strategy, enable_stats, name, first_slot)
        if slab is None:
            if first_slot:
                raise ValueError(f'first_slot={first_slot} needs the slab that it counts in; pass slab=')
            slab = None if layout is None else KVSlab(layout, pool_size)
        elif not 0 <= first_slot <= slab.slots - pool_size:
            raise ValueError(
                f"slots [{first_slot}, {first_slot + pool_size}) are not all in the slab's [0, {slab.slots})"
            )
        elif layout is not None and layout != slab.layout:
            raise ValueError(
                f'expected the layout of the slab, {slab.layout}, got {layout}; leave layout out'
            )
        self.slab = slab
        """The tensor behind the pool; None until the layout is known."""

    @property
    def bytes(self) -> int:
        """Bytes of this pool's slots; 0 until the slab is allocated."""
        return self.pool_size * self.slab.layout.row_bytes if self.slab is not None and self.slab.bytes else 0

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[slots]``: tokens of the history in each slot of the slab, indexed by absolute slot."""
        return self._known_slab().lengths

    @property
    def next_positions(self) -> np.ndarray:
        """int64 ``[slots]``: logical position of the next token of each slot of the slab."""
        return self._known_slab().next_positions

    def describe(self) -> dict[str, int | float]:
        """Counters and sizes as numbers, by name."""
        return {
            **self.stats.as_dict(),
            'entries': len(self),
            'capacity': self.pool_size,
            'occupancy': self.occupancy,
            'bytes': self.bytes,
        }

    def load(self, keys: Iterable[Hashable]) -> KVBatch:
        """Copies of the histories of ``keys``; each is one query, a hit.

        Raises:
            KeyError: names the keys that are not cached. Nothing is counted.
        """
        keys = list(keys)
        self._require(keys)
        slab, slots = self._known_slab(), self.lookup(keys)
        return KVBatch(slab.load(slots), slab.lengths[slots], slab.next_positions[slots])

    def store(self, keys: Iterable[Hashable], batch: KVBatch) -> np.ndarray:
        """Write a batch of histories; returns their absolute slots, int64 ``[B]``.

        Raises:
            ValueError, RuntimeError: as :meth:`reserve`, or the shape or a length does not fit the layout.
            TypeError: the batch has another dtype. Nothing is changed.
        """
        keys, slab = list(keys), self._known_slab()
        lengths, next_positions = slab.check_batch(len(keys), batch.kv, batch.lengths, batch.next_positions)
        evictions = self.plan(keys)
        slab.allocate()
        slots = self.commit(keys, evictions)
        slab.write(slots, batch.kv, lengths, next_positions)
        return slots

    def get(self, key: Hashable) -> KVEntry | None:
        """A private copy of the history of ``key``, or None; one query."""
        slot = self.find(key)
        if slot == NO_SLOT:
            return None
        slab = self._known_slab()
        size, next_position = int(slab.lengths[slot]), int(slab.next_positions[slot])
        row = slab.load([slot], newest=size if slab.layout.uniform else None)
        return KVEntry.from_row(slab.layout, row, size, next_position)

    def set(self, key: Hashable, kv: Any) -> int:
        """Store a copy of one history; returns its absolute slot.

        Arguments:
            kv: a :class:`KVEntry` or a ``KeysValues``-like object of one sample.

        Raises:
            TypeError: ``kv`` looks different or has another dtype.
            ValueError: layers, heads or head_dim differ, it has too many tokens, or a number is not finite.
            RuntimeError: every entry is pinned, or there is no memory. Nothing is changed.
        """
        slab = self.slab or KVSlab(layout_of(kv), self.pool_size)
        row, size, next_position = row_from_keys_values(kv, slab.layout)
        evictions = self.plan([key])
        slab.allocate()
        self.slab = slab
        slots = self.commit([key], evictions)
        slab.write(slots, row, np.array([size]), np.array([next_position]))
        return int(slots[0])

    def resize(self, pool_size: int) -> None:
        """Change the number of slots of an empty pool that is the last one of its slab.

        Raises:
            ValueError: ``pool_size`` is not positive.
            RuntimeError: the pool is not empty, another pool's slots follow, or the slab cannot grow. Nothing
                is changed.
        """
        if pool_size <= 0:
            raise ValueError(f'pool_size must be at least 1, got {pool_size}')
        if self._slot_of:
            raise RuntimeError(f"pool '{self.name}' holds {len(self)} entries; call clear() before resize()")
        if self.slab is not None:
            if self.first_slot + self.pool_size != self.slab.slots:
                raise RuntimeError(
                    f"pool '{self.name}' cannot change its size: other slots follow in its slab"
                )
            self.slab.resize(self.first_slot + pool_size, keep=self.first_slot)
        self.pool_size = int(pool_size)
        self._forget()

    def _known_slab(self) -> KVSlab:
        if self.slab is None:
            raise RuntimeError(f"pool '{self.name}' has no layout yet; pass layout= or call set() first")
        return self.slab

    def __repr__(self) -> str:
        return (
            f"KVCachePool(name='{self.name}', entries={len(self)}/{self.pool_size}, "
            f'strategy={self.eviction_strategy.value}, hit_rate={self.stats.hit_rate:.3f})'
        )
