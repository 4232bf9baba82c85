"""Pool and manager beside their slow references: each operation is done to both, then all is compared.

The state machines of hypothesis and ``tools/fuzz.py`` choose the operations; what is compared stands here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.config import KVCacheConfig
from testing.reference import ReferenceManager, ReferencePool

from .comparing import (
    BROKEN,
    LAYOUT,
    HeldCopies,
    Histories,
    blocks_of,
    check,
    check_equal,
    compare_pool,
    outcome,
    row_batch,
    same,
    spoil,
    tensors_of,
)


class PoolTwins:
    """A pool beside its reference."""

    def __init__(self, policy: str, pool_size: int = 4, layout: KVLayout = LAYOUT, seed: int = 0) -> None:
        self.layout = layout
        self.pool = KVCachePool(pool_size, policy, layout=layout)
        self.reference = ReferencePool(pool_size, policy, layout)
        self.histories = Histories(layout, seed)
        self.held = HeldCopies()

    def compare(self) -> None:
        """Raise a :class:`Difference` unless both agree in everything."""
        compare_pool(self.pool, self.reference)
        self.held.compare()

    def lookup(self, keys: Sequence[Hashable]) -> None:
        slots = self.pool.lookup(keys)
        check_equal('hits', (slots != NO_SLOT).tolist(), self.reference.lookup(keys))
        check_equal('slots', slots.tolist(), [self.pool.peek(key) for key in keys])

    def store(self, keys: Sequence[Hashable], lengths: Sequence[int], spare: int = 0) -> None:
        batch = self.histories.batch(lengths, [length + row for row, length in enumerate(lengths)], spare)
        before = {key: self.pool.peek(key) for key in keys}
        expected, _ = outcome(lambda: self.reference.store(list(keys), batch))
        got, slots = outcome(lambda: self.pool.store(keys, batch))
        check_equal('error of store', got, expected)
        if slots is not None:
            kept = [before[key] in (NO_SLOT, slot) for key, slot in zip(keys, slots.tolist(), strict=True)]
            check(all(kept), 'slots of known keys', slots, before)
        spoil(batch)

    def load(self, keys: Sequence[Hashable]) -> None:
        expected, theirs = outcome(lambda: self.reference.load(list(keys)))
        got, ours = outcome(lambda: self.pool.load(keys))
        check_equal('error of load', got, expected)
        if ours is None or theirs is None:
            return
        check_equal('lengths', ours.lengths.tolist(), theirs.lengths.tolist())
        check_equal('next positions', ours.next_positions.tolist(), theirs.next_positions.tolist())
        for row, length in enumerate(theirs.lengths.tolist()):
            left, right = (blocks_of(batch.kv, row, length) for batch in (ours, theirs))
            check(same(left, right), f'row {row} of a load', left, right)
        spoil(ours)

    def get(self, key: Hashable) -> None:
        entry, found = self.pool.get(key), self.reference.find(key)
        check_equal('get finds', entry is not None, found)
        if entry is not None:
            check_equal('size', entry.size, self.reference.length(key))
            check_equal('next position', entry.next_position, self.reference.next_position(key))
            got = blocks_of(row_batch(entry, self.layout).kv, 0, entry.size)
            check(same(got, self.reference.blocks(key)), 'entry', got, self.reference.blocks(key))
            self.held.hold(entry)

    def set(self, key: Hashable, length: int) -> None:
        entry = self.histories.entry(length)
        expected, _ = outcome(lambda: self.reference.store([key], row_batch(entry, self.layout)))
        got, slot = outcome(lambda: self.pool.set(key, entry))
        check_equal('error of set', got, expected)
        if slot is not None:
            check_equal('slot of set', slot, self.pool.peek(key))
        for tensor in tensors_of(entry):
            tensor.fill_(float('nan'))

    def both(self, name: str, *arguments: Any) -> None:
        """An operation without tensors that both have under one name: discard, clear, resize, ..."""
        expected = outcome(lambda: getattr(self.reference, name)(*arguments))
        check_equal(f'outcome of {name}', outcome(lambda: getattr(self.pool, name)(*arguments)), expected)

    def rejected_store(self, keys: Sequence[Hashable], mistake: str) -> None:
        """A store with a mistake: an error, and (as :meth:`compare` sees) nothing changed."""
        batch = self.histories.batch([1 + row % 4 for row in range(len(keys))], [9] * len(keys))
        broken = BROKEN[mistake](batch)
        error, _ = outcome(lambda: self.pool.store(keys, broken))
        check(bool(error), f'a store with {mistake}', 'no error', 'an error')


class ManagerTwins:
    """A manager beside its reference: 3 environments with 2 root slots each, and at most 9 nodes."""

    ENVIRONMENTS = 3
    MOST_NODES = 9

    def __init__(self, policy: str, layout: KVLayout = LAYOUT, seed: int = 0) -> None:
        # root slots twice: a resize holds them twice
        self.max_bytes = layout.row_bytes * (2 * 2 * self.ENVIRONMENTS + self.MOST_NODES)
        choices = KVCacheConfig(policy=policy, root_slots=2, max_bytes=self.max_bytes)  # type: ignore[arg-type]
        self.layout = layout
        self.manager = KVCacheManager(
            {}, self.ENVIRONMENTS, layout=layout, cache_config=choices, num_simulations=1
        )
        self.reference = ReferenceManager(layout, self.ENVIRONMENTS, 1, choices)
        self.histories = Histories(layout, seed)
        self.held = HeldCopies()
        self._rebuilt = 0

    def compare(self) -> None:
        """Raise a :class:`Difference` unless both agree in everything."""
        pairs = zip(self.manager.init_pools, self.reference.roots, strict=True)
        for pool, reference in [*pairs, (self.manager.recur_pool, self.reference.nodes)]:
            compare_pool(pool, reference)
        check(self.manager.bytes <= self.max_bytes, 'bytes', self.manager.bytes, f'at most {self.max_bytes}')
        roots = self.reference.roots
        total = self.manager.get_stats_summary()['total']
        for name in ('queries', 'hits', 'misses', 'stores', 'overwrites', 'evictions'):
            expected = sum(getattr(pool.stats, name) for pool in [*roots, self.reference.nodes])
            check_equal(f'total {name}', total[name], expected)
        check_equal('rebuilt tokens', total['rebuilt_tokens'], self._rebuilt)
        self.held.compare()

    def lookup(self, keys: Sequence[Any]) -> None:
        expected = outcome(lambda: self.reference.lookup(list(keys)))
        error, slots = outcome(lambda: self.manager.lookup(keys))
        check_equal(
            'outcome of lookup', (error, None if slots is None else (slots != NO_SLOT).tolist()), expected
        )
        if slots is not None:
            check_equal('slots', slots.tolist(), self.manager.slots(keys).tolist())

    def store(self, keys: Sequence[Any], lengths: Sequence[int], spare: int = 0) -> None:
        batch = self.histories.batch(lengths, [length + 2 * row for row, length in enumerate(lengths)], spare)
        expected, _ = outcome(lambda: self.reference.store(list(keys), batch))
        numbers = batch.lengths, batch.next_positions
        got, slots = outcome(lambda: self.manager.store(keys, batch.kv, *numbers))
        check_equal('error of store', got, expected)
        if slots is not None:
            check_equal('slots', slots.tolist(), self.manager.slots(keys).tolist())
        spoil(batch)

    def load(self, keys: Sequence[Any], spare: int, into_buffer: bool) -> None:
        """Load the cached ones of ``keys``, the columns that the longest needs and ``spare`` more."""
        keys = [key for key in keys if key in self.reference.pool_of(key)]
        slots = self.manager.slots(keys)
        lengths = [self.reference.pool_of(key).length(key) for key in keys]
        check_equal('lengths', self.manager.lengths(slots).tolist(), lengths)
        newest = min(max([1, *lengths]) + spare, self.layout.tokens)
        if into_buffer:
            *shape, _, head_dim = self.layout.batch_shape(len(keys))
            buffer = torch.full((*shape, newest + 2, head_dim), 0.25)
            self.manager.load(slots, newest=newest, out=buffer[:, :, :, 1 : newest + 1])
            check(bool((buffer[:, :, :, [0, -1]] == 0.25).all()), 'columns beside out', buffer, 'untouched')
            rows = buffer[:, :, :, 1 : newest + 1]
        else:
            rows = self.manager.load(slots, newest=newest)
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            expected = self.reference.pool_of(key).blocks(key)
            got = blocks_of(rows, row, length)
            check(same(got, expected), f'row {row} of a load', got, expected)
        rows.fill_(float('nan'))

    def set(self, key: Any, length: int) -> None:
        entry = self.histories.entry(length)
        expected, _ = outcome(lambda: self.reference.store([key], row_batch(entry, self.layout)))
        if isinstance(key, RootKey):
            got, _ = outcome(lambda: self.manager.set_init_cache(key.env_id, key, entry))
        else:
            got, _ = outcome(lambda: self.manager.set_recur_cache(key, entry))
        check_equal('error of set', got, expected)

    def get(self, env_id: int, key: Any) -> None:
        """``hierarchical_get``: the environment's roots, then the nodes, in one query."""
        entry, found = (
            self.manager.hierarchical_get(env_id, key),
            self.reference.hierarchical_find(env_id, key),
        )
        check_equal('hierarchical_get finds', entry is not None, found)
        if entry is not None:
            roots = self.reference.roots[env_id]
            reference = roots if key in roots else self.reference.nodes
            got = blocks_of(row_batch(entry, self.layout).kv, 0, entry.size)
            check(same(got, reference.blocks(key)), 'entry', got, reference.blocks(key))
            self.held.hold(entry)

    def begin_search(self, least: int, more: int, upfront: bool) -> None:
        """A search of at least ``least`` windows and at most ``more`` more."""
        sizes = least, least + more
        expected = outcome(lambda: self.reference.begin_search(*sizes, upfront=upfront))
        got = outcome(lambda: self.manager.begin_search(*sizes, upfront=upfront))
        check_equal('outcome of begin_search', got, expected)

    def reserve(self, keys: Sequence[NodeKey], lengths: Sequence[int]) -> None:
        """A store of nodes whose rows are written behind the manager's back."""
        batch = self.histories.batch(lengths, [length + 2 for length in lengths])
        expected, _ = outcome(lambda: self.reference.store(list(keys), batch))
        got, slots = outcome(lambda: self.manager.reserve(list(keys), batch.lengths, batch.next_positions))
        check_equal('error of reserve', got, expected)
        if slots is not None:
            check_equal('slots', slots.tolist(), self.manager.slots(keys).tolist())
            columns = self.layout.tokens - batch.kv.shape[3]
            self.manager.storage.tensor[slots, :, :, columns:] = batch.kv

    def pool_operation(self, name: str, keys: Sequence[Any], *arguments: Any) -> None:
        """discard or set_priorities, on the pool of each key."""
        for key in keys:
            reference = self.reference.pool_of(key)
            pool = (
                self.manager.init_pools[key.env_id] if isinstance(key, RootKey) else self.manager.recur_pool
            )
            expected = outcome(lambda r=reference, k=key: getattr(r, name)([k], *arguments))
            got = outcome(lambda p=pool, k=key: getattr(p, name)([k], *arguments))
            check_equal(f'outcome of {name}', got, expected)

    def clear(self, which: str) -> None:
        """which: 'all', 'roots' or 'nodes'."""
        {
            'all': self.manager.clear_all,
            'roots': self.manager.clear_init_caches,
            'nodes': self.manager.clear_recur_cache,
        }[which]()
        roots, nodes = self.reference.roots, [self.reference.nodes]
        for pool in {'all': [*roots, *nodes], 'roots': roots, 'nodes': nodes}[which]:
            pool.clear()

    def count_rebuilt(self, tokens: int, roots: bool) -> None:
        self.manager.count_rebuilt(tokens, roots=roots)
        self._rebuilt += tokens
        if not roots:
            self.reference.nodes.stats.rebuilt_tokens += tokens
