"""Slow and obvious twins of pool and manager: cloned tensors in a list, and a scan for every question.

They answer what the fast ones must answer, with nothing in common but the layout, the keys and the counters.
Tests and comparisons are made against them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from lzero_kv.cache.keys import RootKey
from lzero_kv.cache.layout import KVBatch, KVLayout
from lzero_kv.cache.stats import CacheStats
from lzero_kv.config import KVCacheConfig


@dataclass
class Record:
    """One cached history and everything that any policy or counter may ask about it."""

    key: Hashable
    first_store: int
    """Stores of the pool up to and with the one that made this record."""
    blocks: list[torch.Tensor] = field(default_factory=list)
    """Keys and values of each layer in turn: ``2 * layers`` clones ``[heads, tokens, head_dim]``, oldest
    token first."""
    length: int = 0
    next_position: int = 0
    last_access: int = 0
    """Queries of the pool up to and with the last access."""
    stored: int = 0
    """Time of the last store."""
    used: int = 0
    """Time of the last store or hit."""
    uses: int = 0
    """Stores and hits."""
    priority: float = 0.0


SORT_KEYS = {
    'fifo': lambda record: record.stored,
    'lru': lambda record: record.used,
    'lfu': lambda record: (record.uses, record.used),
    'priority': lambda record: (record.priority, record.stored),
}
"""What each policy evicts first: the record for which this is least."""


class ReferencePool:
    """The twin of :class:`lzero_kv.cache.pool.KVCachePool`.

    Arguments:
        pool_size: number of histories.
        policy: 'fifo', 'lru', 'lfu' or 'priority'.
        layout: shape of a history.
    """

    def __init__(self, pool_size: int, policy: str, layout: KVLayout) -> None:
        self.pool_size = pool_size
        self.policy = policy
        self.layout = layout
        self.stats = CacheStats()
        self._records: list[Record] = []
        self._time = 0
        self._queries = 0
        self._stores = 0

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: Hashable) -> bool:
        return self._record(key) is not None

    def keys(self) -> list[Hashable]:
        """The cached keys."""
        return [record.key for record in self._records]

    def find(self, key: Hashable) -> bool:
        """One query: whether ``key`` is cached."""
        self.stats.total_queries += 1
        record = self._record(key)
        if record is None:
            self.stats.misses += 1
        else:
            self.stats.hits += 1
            self.stats.reuse_distance.add(self._queries - record.last_access)
            record.last_access = self._queries + 1
            record.used = self._now()
            record.uses += 1
        self._queries += 1
        return record is not None

    def lookup(self, keys: Iterable[Hashable]) -> list[bool]:
        """One query for each key."""
        return [self.find(key) for key in keys]

    def evictions_for(self, keys: list[Hashable]) -> int:
        """How many records must go for a store of ``keys``; raises as the pool's ``reserve``."""
        if len(set(keys)) != len(keys):
            raise ValueError('a key is there twice')
        new = [key for key in keys if self._record(key) is None]
        needed = len(self._records) + len(new) - self.pool_size
        if needed > len(self._candidates(keys)):
            raise RuntimeError('not enough entries may be evicted')
        return max(needed, 0)

    def store(self, keys: list[Hashable], batch: KVBatch) -> None:
        """Keep clones of a batch of histories; raises as the pool's ``store`` for keys that do not fit."""
        for _ in range(self.evictions_for(keys)):
            victim = min(self._candidates(keys), key=SORT_KEYS[self.policy])
            self._remove(victim)
            self.stats.evictions += 1
        for row, key in enumerate(keys):
            self._stores += 1
            self.stats.stores += 1
            record = self._record(key)
            if record is None:
                record = Record(key, first_store=self._stores)
                self._records.append(record)
            else:
                self.stats.overwrites += 1
            record.length = int(batch.lengths[row])
            record.blocks = self._clone(batch.kv[row : row + 1], record.length)
            record.next_position = int(batch.next_positions[row])
            record.last_access = self._queries
            record.stored = record.used = self._now()
            record.uses += 1

    def blocks(self, key: Hashable) -> list[torch.Tensor]:
        """Keys and values of each layer in turn: ``2 * layers`` tensors ``[heads, tokens, head_dim]``, oldest
        token first; nothing is counted."""
        return self._known(key).blocks

    def length(self, key: Hashable) -> int:
        """Tokens of a cached history."""
        return self._known(key).length

    def next_position(self, key: Hashable) -> int:
        """Logical position of the next token of a cached history."""
        return self._known(key).next_position

    def load(self, keys: list[Hashable]) -> KVBatch:
        """Whole rows of cached histories with zeros in unused columns; each is one query, KeyError for a
        miss."""
        for key in keys:
            self._known(key)
        self.lookup(keys)
        layout = self.layout
        kv = torch.zeros(layout.batch_shape(len(keys)), dtype=layout.dtype, device=layout.device)
        for row, key in enumerate(keys):
            for index, block in enumerate(self.blocks(key)):
                kv[row, index, :, layout.tokens - self.length(key) :] = block
        lengths = np.array([self.length(key) for key in keys], np.int64)
        return KVBatch(kv, lengths, np.array([self.next_position(key) for key in keys], np.int64))

    def discard(self, keys: Iterable[Hashable]) -> int:
        """Forget these; returns how many were there."""
        gone = 0
        for key in keys:
            record = self._record(key)
            if record is not None:
                self._remove(record)
                gone += 1
        return gone

    def clear(self) -> None:
        """Forget everything."""
        self.discard(self.keys())

    def set_priorities(self, keys: Iterable[Hashable], values: Iterable[float]) -> None:
        """Give priorities; KeyError for a miss."""
        for record, value in zip([self._known(key) for key in keys], values, strict=True):
            record.priority = value

    def resize(self, pool_size: int) -> None:
        """Change the size; RuntimeError when a pool that is not empty would shrink."""
        if self._records and pool_size < self.pool_size:
            raise RuntimeError('the pool is not empty')
        self.pool_size = pool_size

    def _clone(self, row: torch.Tensor, length: int) -> list[torch.Tensor]:
        columns = row.shape[3]
        return [block[:, columns - length :].detach().clone() for block in row[0]]

    def _now(self) -> int:
        self._time += 1
        return self._time

    def _record(self, key: Hashable) -> Record | None:
        for record in self._records:
            if record.key == key:
                return record
        return None

    def _known(self, key: Hashable) -> Record:
        record = self._record(key)
        if record is None:
            raise KeyError(key)
        return record

    def _candidates(self, batch: list[Hashable]) -> list[Record]:
        return [record for record in self._records if record.key not in batch]

    def _remove(self, record: Record) -> None:
        self._records.remove(record)
        self.stats.lifetime.add(self._stores - record.first_store)


class ReferenceManager:
    """The twin of :class:`lzero_kv.cache.manager.KVCacheManager`: a reference pool of roots for each
    environment, and one of nodes.

    Arguments:
        layout: shape of a history.
        env_num: number of environments.
        num_simulations: simulations of a search.
        cache_config: the user's choices.
    """

    def __init__(
        self, layout: KVLayout, env_num: int, num_simulations: int, cache_config: KVCacheConfig
    ) -> None:
        self.layout = layout
        self.cache_config = cache_config
        policy, root_slots = cache_config.policy, cache_config.root_slots
        self.roots = [ReferencePool(root_slots, policy, layout) for _ in range(env_num)]
        self.nodes = ReferencePool(cache_config.window_slots or env_num, policy, layout)
        self._most = env_num * (num_simulations + 1)
        self._wanted_more = False

    def _fits(self, nodes: int, kept: int) -> bool:
        """Whether so many nodes fit into the bound while all roots and ``kept`` nodes exist twice."""
        bound, roots = self.cache_config.max_bytes, sum(pool.pool_size for pool in self.roots)
        return bound is None or (2 * roots + nodes + kept) * self.layout.row_bytes <= bound

    def _largest(self, wanted: int, kept: int = 0) -> int:
        """The largest size from the present one to ``wanted`` that fits."""
        size = self.nodes.pool_size
        while wanted > size and not self._fits(wanted, kept):
            wanted -= 1
        return max(size, wanted)

    def _make_room(self, keys: list[Hashable]) -> None:
        """Double the nodes where they do not suffice, or make them as many as is allowed."""
        size = self.nodes.pool_size
        needed = len({*self.nodes.keys(), *keys})
        if self.cache_config.window_slots is not None or needed <= size:
            return
        wanted = min(self._most, max(2 * size, needed))
        self.nodes.pool_size = self._largest(wanted, kept=size if len(self.nodes) else 0)
        self._wanted_more = self.nodes.pool_size < min(needed, self._most)

    def pool_of(self, key: Hashable) -> ReferencePool:
        """The pool that a key belongs to; ValueError for an unknown environment."""
        if not isinstance(key, RootKey):
            return self.nodes
        if not 0 <= key.env_id < len(self.roots):
            raise ValueError('unknown environment')
        return self.roots[key.env_id]

    def lookup(self, keys: list[Hashable]) -> list[bool]:
        """One query for each key."""
        pools = [self.pool_of(key) for key in keys]
        return [pool.find(key) for pool, key in zip(pools, keys, strict=True)]

    def store(self, keys: list[Hashable], batch: KVBatch) -> None:
        """Keep clones of a batch of roots and nodes; all or nothing."""
        pools = [*self.roots, self.nodes]
        rows_of = [[row for row, key in enumerate(keys) if self.pool_of(key) is pool] for pool in pools]
        self._make_room([keys[row] for row in rows_of[-1]])
        for pool, rows in zip(pools, rows_of, strict=True):
            pool.evictions_for([keys[row] for row in rows])
        for pool, rows in zip(pools, rows_of, strict=True):
            part = KVBatch(batch.kv[rows], batch.lengths[rows], batch.next_positions[rows])
            pool.store([keys[row] for row in rows], part)

    def hierarchical_find(self, env_id: int, key: Hashable) -> bool:
        """One query: on the environment's roots when it is there, else on the nodes."""
        roots = self.roots[env_id]
        return roots.find(key) if key in roots else self.nodes.find(key)

    def begin_search(self, least: int, most: int, *, upfront: bool = False) -> None:
        """Forget the nodes and make room for the next search; RuntimeError when not even ``least`` fit."""
        size = self.nodes.pool_size
        if self.cache_config.window_slots is None:
            if upfront:
                wanted = most
            elif self._wanted_more:
                wanted = max(least, min(2 * size, most))
            else:
                wanted = least
            size = self._largest(wanted)
        if size < least:
            raise RuntimeError('the least does not fit')
        self.nodes.clear()
        self.nodes.resize(size)
        self._most, self._wanted_more = most, False

    def clear_all(self) -> None:
        """Forget everything."""
        for pool in [*self.roots, self.nodes]:
            pool.clear()
