"""Which entry makes room when a pool is full.

A policy orders the keys of the entries that may be evicted and knows nothing of slots or tensors. Held keys
(pinned entries) leave the order, so that finding a victim costs the same however many are held. A key that is
released comes back as the newest of its equals: it was in use until now.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from enum import Enum
from typing import Any, Protocol


class EvictionStrategy(Enum):
    """Name of an eviction policy; ``EvictionStrategy('lru')`` gives the member of that value."""

    FIFO = 'fifo'
    """The entry stored longest ago; storing a key again renews its age."""
    LRU = 'lru'
    """The entry neither found nor stored for the longest time."""
    LFU = 'lfu'
    """The entry with the fewest hits and stores; among equals the one not used for the longest time."""
    PRIORITY = 'priority'
    """The entry of lowest priority (0.0 until one is given); among equals the one stored longest ago."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise ValueError(
            f'eviction strategy must be one of {[member.value for member in cls]}, got {value!r}'
        )


class EvictionPolicy(Protocol):
    """Order of eviction of a pool's keys. ``len`` is the number of keys that may be evicted."""

    def insert(self, key: Hashable) -> None:
        """A store under ``key``, the first one or again."""
        ...

    def touch(self, key: Hashable) -> None:
        """A hit of a known ``key``."""
        ...

    def set_priority(self, key: Hashable, value: float) -> None:
        """Give a known ``key`` a priority; only the policy PRIORITY reads it."""
        ...

    def hold(self, key: Hashable) -> None:
        """Take a known ``key`` out of the order until it is released."""
        ...

    def release(self, key: Hashable) -> None:
        """Put a held ``key`` back, as the newest of its equals."""
        ...

    def remove(self, key: Hashable) -> None:
        """Forget a known ``key``, held or not."""
        ...

    def victim(self) -> Hashable:
        """The key to evict next; LookupError when every key is held."""
        ...

    def clear(self) -> None:
        """Forget all keys."""
        ...

    def __len__(self) -> int: ...


class FirstInFirstOut:
    """Oldest store first. Every operation is O(1)."""

    def __init__(self) -> None:
        # An OrderedDict is a linked list; to find a plain dict's first key all deleted ones are passed over.
        self._order: OrderedDict[Hashable, None] = OrderedDict()
        self._held: set[Hashable] = set()

    def insert(self, key: Hashable) -> None:
        if key not in self._held:
            self._order[key] = None
            self._order.move_to_end(key)

    def touch(self, key: Hashable) -> None:
        pass

    def set_priority(self, key: Hashable, value: float) -> None:
        pass

    def hold(self, key: Hashable) -> None:
        del self._order[key]
        self._held.add(key)

    def release(self, key: Hashable) -> None:
        self._held.remove(key)
        self._order[key] = None

    def remove(self, key: Hashable) -> None:
        self._order.pop(key, None)
        self._held.discard(key)

    def victim(self) -> Hashable:
        if not self._order:
            raise LookupError('no entry may be evicted: the pool is empty or every entry is pinned')
        return next(iter(self._order))

    def clear(self) -> None:
        self._order.clear()
        self._held.clear()

    def __len__(self) -> int:
        return len(self._order)


class LeastRecentlyUsed(FirstInFirstOut):
    """Longest unused first, where a store and a hit are uses. Every operation is O(1)."""

    def touch(self, key: Hashable) -> None:
        if key not in self._held:
            self._order.move_to_end(key)


class _HeapOrder:
    """Lowest value first, then lowest tick (ticks are unique). A changed entry is pushed again and the stale
    item is dropped when it surfaces; O(log n) amortised, and the heap stays within a constant factor of the
    live entries."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Hashable]] = []
        self._queued: dict[Hashable, tuple[float, int, Hashable]] = {}
        self._value: dict[Hashable, float] = {}
        self._clock = 0

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _push(self, key: Hashable, tick: int) -> None:
        item = (self._value[key], tick, key)
        self._queued[key] = item
        heapq.heappush(self._heap, item)
        if len(self._heap) > 2 * len(self._queued) + 32:
            self._heap = list(self._queued.values())
            heapq.heapify(self._heap)

    def _is_held(self, key: Hashable) -> bool:
        return key in self._value and key not in self._queued

    def hold(self, key: Hashable) -> None:
        del self._queued[key]

    def release(self, key: Hashable) -> None:
        self._push(key, self._tick())

    def remove(self, key: Hashable) -> None:
        self._queued.pop(key, None)
        self._value.pop(key, None)

    def victim(self) -> Hashable:
        while self._heap:
            item = self._heap[0]
            if self._queued.get(item[2]) is item:
                return item[2]
            heapq.heappop(self._heap)
        raise LookupError('no entry may be evicted: the pool is empty or every entry is pinned')

    def clear(self) -> None:
        self._heap.clear()
        self._queued.clear()
        self._value.clear()

    def __len__(self) -> int:
        return len(self._queued)


class LeastFrequentlyUsed(_HeapOrder):
    """Fewest stores and hits first; among equals the one used longest ago. O(log n) amortised."""

    def insert(self, key: Hashable) -> None:
        held = self._is_held(key)
        self._value[key] = self._value.get(key, 0) + 1
        if not held:
            self._push(key, self._tick())

    def touch(self, key: Hashable) -> None:
        self.insert(key)

    def set_priority(self, key: Hashable, value: float) -> None:
        pass


class LowestPriority(_HeapOrder):
    """Lowest priority first, 0.0 until one is given (visit counts are the usual ones); among equals the one
    stored longest ago. Storing a key again keeps its priority. O(log n) amortised."""

    def insert(self, key: Hashable) -> None:
        held = self._is_held(key)
        self._value.setdefault(key, 0.0)
        if not held:
            self._push(key, self._tick())

    def touch(self, key: Hashable) -> None:
        pass

    def set_priority(self, key: Hashable, value: float) -> None:
        self._value[key] = value
        queued = self._queued.get(key)
        if queued is not None and queued[0] != value:
            self._push(key, queued[1])


STRATEGIES: dict[EvictionStrategy, type[EvictionPolicy]] = {
    EvictionStrategy.FIFO: FirstInFirstOut,
    EvictionStrategy.LRU: LeastRecentlyUsed,
    EvictionStrategy.LFU: LeastFrequentlyUsed,
    EvictionStrategy.PRIORITY: LowestPriority,
}
"""The policy class of each strategy."""
