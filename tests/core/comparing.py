"""What the comparison of pool and manager with the slow references is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.entry import KVEntry
from lzero_kv.cache.layout import KVBatch, KVLayout
from lzero_kv.cache.pool import KVCachePool
from testing.reference import ReferencePool

# Every dimension is another number, so that a swapped axis cannot pass.
LAYOUT = KVLayout(layers=3, heads=2, head_dim=5, tokens=7)


class Difference(Exception):
    """Pool or manager and reference do not agree."""


def check(agree: bool, what: str, got: Any, expected: Any) -> None:
    """Raise a :class:`Difference` unless ``agree``."""
    if not agree:
        raise Difference(f'{what}: got {got}, the reference says {expected}')


def check_equal(what: str, got: Any, expected: Any) -> None:
    """Raise a :class:`Difference` unless both are equal."""
    check(got == expected, what, got, expected)


def outcome(action: Callable[[], Any]) -> tuple[str, Any]:
    """The name of the error that an action raises (KeyError, ValueError, ...) or '', and its result."""
    try:
        return '', action()
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        return type(error).__name__, None


def blocks_of(rows: torch.Tensor, row: int, length: int) -> list[torch.Tensor]:
    """Keys and values of each layer of one row, its newest ``length`` tokens: ``[heads, tokens, head_dim]``
    each."""
    return list(rows[row, :, :, rows.shape[3] - length :])


def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal to the last bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def compare_pool(pool: KVCachePool, reference: ReferencePool, tensors: bool = True) -> None:
    """Raise a :class:`Difference` unless keys, counters, lengths and contents agree."""
    keys = reference.keys()
    check_equal('keys', set(pool.keys()), set(keys))
    check_equal('number of entries', len(pool), len(keys))
    check_equal('capacity', pool.capacity, reference.pool_size)
    check_equal('counters', pool.stats, reference.stats)
    slots = [pool.peek(key) for key in keys]
    own = range(pool.first_slot, pool.first_slot + pool.capacity)
    check(
        len(set(slots)) == len(slots) and all(slot in own for slot in slots),
        'slots',
        slots,
        f'different, in {own}',
    )
    if not keys or not tensors:
        return
    storage = pool.storage
    if storage is None:
        raise Difference(f'{len(keys)} entries without a storage')
    check_equal('lengths', storage.lengths[slots].tolist(), [reference.length(key) for key in keys])
    check_equal(
        'next positions',
        storage.next_positions[slots].tolist(),
        [reference.next_position(key) for key in keys],
    )
    rows = storage.load(slots)
    for row, key in enumerate(keys):
        got, expected = blocks_of(rows, row, reference.length(key)), reference.blocks(key)
        check(same(got, expected), f'contents of {key}', got, expected)


class HeldCopies:
    """The latest entries handed out, with clones of them: an entry must never change under its holder."""

    def __init__(self, limit: int = 5) -> None:
        self._limit = limit
        self._held: list[tuple[KVEntry, KVEntry]] = []

    def hold(self, entry: KVEntry) -> None:
        """Watch one more entry, and the oldest no more."""
        self._held = [*self._held, (entry, entry.clone())][-self._limit :]

    def compare(self) -> None:
        """Raise a :class:`Difference` when a held entry has changed."""
        for entry, clone in self._held:
            check(same(tensors_of(entry), tensors_of(clone)), 'a held entry', entry, clone)


def tensors_of(entry: KVEntry) -> list[torch.Tensor]:
    """All tensors of an entry, with their padding."""
    layers = [entry[layer] for layer in range(len(entry))]
    return [cache._cache for layer in layers for cache in (layer._k_cache, layer._v_cache)]


class Histories:
    """Makes histories of random numbers, right-aligned in a strided buffer."""

    def __init__(self, layout: KVLayout, seed: int) -> None:
        self.layout = layout
        self._generator = torch.Generator().manual_seed(seed)

    def batch(self, lengths: Sequence[int], next_positions: Sequence[int], spare: int = 0) -> KVBatch:
        """A batch whose kv is a view of a wider buffer; ``spare`` columns more than the longest history
        needs."""
        numbers = np.array(lengths, np.int64), np.array(next_positions, np.int64)
        count = len(lengths)
        width = min(max([1, *lengths]) + spare, self.layout.tokens)
        layout = self.layout
        shape = (count, 2 * layout.layers, layout.heads, width + 2, layout.head_dim)
        buffer = torch.randn(shape, generator=self._generator)
        return KVBatch(buffer[:, :, :, 1 : width + 1], *numbers)

    def entry(self, length: int) -> KVEntry:
        """One history as the object that ``get`` hands out."""
        batch = self.batch([length], [length + 3])
        return KVEntry.from_row(self.layout, batch.kv, length, length + 3)


def spoil(batch: KVBatch) -> None:
    """Overwrite a batch that was handed over or handed out: no pool may change with it."""
    batch.kv.fill_(float('nan'))
    batch.lengths.fill(-5)
    batch.next_positions.fill(-5)


def row_batch(entry: KVEntry, layout: KVLayout) -> KVBatch:
    """What the reference keeps of a stored entry, built from its tensors one by one."""
    kv = torch.zeros(layout.batch_shape(1))
    for layer in range(layout.layers):
        for index, cache in enumerate((entry[layer]._k_cache, entry[layer]._v_cache)):
            for token in range(cache._size):
                column = layout.tokens - cache._size + token
                kv[0, 2 * layer + index, :, column] = cache._cache[0, :, token]
    return KVBatch(kv, np.array([entry.size]), np.array([entry.next_position]))


BROKEN: dict[str, Callable[[KVBatch], KVBatch]] = {
    'a missing row': lambda batch: KVBatch(batch.kv[1:], batch.lengths, batch.next_positions),
    'a missing length': lambda batch: KVBatch(batch.kv, batch.lengths[1:], batch.next_positions),
    'a missing position': lambda batch: KVBatch(batch.kv, batch.lengths, batch.next_positions[1:]),
    'too long a length': lambda batch: KVBatch(batch.kv, batch.lengths + 10, batch.next_positions),
    'a negative length': lambda batch: KVBatch(batch.kv, batch.lengths - 9, batch.next_positions),
    'a negative position': lambda batch: KVBatch(batch.kv, batch.lengths, batch.next_positions - 10),
    'another dtype': lambda batch: KVBatch(batch.kv.double(), batch.lengths, batch.next_positions),
    'another width': lambda batch: KVBatch(batch.kv[..., 1:], batch.lengths, batch.next_positions),
    'a swapped axis': lambda batch: KVBatch(batch.kv.mT, batch.lengths, batch.next_positions),
}
"""Ways to break a batch."""
