"""The caches of one world model: root histories of each environment and the nodes of the running search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.compat import NamedAccess
from lzero_kv.cache.eviction import EvictionStrategy
from lzero_kv.cache.keys import LatentKey, NodeKey, RootKey
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.storage import KVSlab, Slots
from lzero_kv.config import KVCacheConfig, read_field

Key = RootKey | NodeKey | LatentKey

DEFAULT_SIMULATIONS = 50
"""Simulations a search is taken to have until somebody says; the host's own default."""


class KVCacheManager(NamedAccess):
    """One root pool per environment and one recurrent pool in one slab, and a pool for single histories.

    A batch of keys may mix roots and nodes: one lookup counts one query for each key, one ``index_select``
    loads and one ``index_copy_`` stores whatever the number of rows and layers.

    Arguments:
        config: the world model's configuration (attributes or items): ``num_layers``, ``num_heads``,
            ``embed_dim`` and ``context_length`` unless ``layout`` is given, ``num_simulations`` and
            ``kv_cache`` where it has them.
        env_num: number of environments.
        enable_stats: whether events are counted.
        clear_recur_log_freq: log every that many calls of :meth:`clear_recur_cache`; 0 for never.
        clear_all_log_freq: the same for :meth:`clear_all`.
        layout: shape of a history; None derives it from ``config``.
        cache_config: the user's choices; None reads ``config.kv_cache``.
        num_simulations: simulations of a search; None reads ``config.num_simulations``.
        scratch: whether the slab has a scratch row: see :class:`KVSlab`.

    Raises:
        ValueError: a number is out of range, ``config`` lacks a field, or ``max_bytes`` is too small for one
            node per environment.
    """

    def __init__(
        self,
        config: Any,
        env_num: int,
        enable_stats: bool = True,
        clear_recur_log_freq: int = 1000,
        clear_all_log_freq: int = 100,
        *,
        layout: KVLayout | None = None,
        cache_config: KVCacheConfig | None = None,
        num_simulations: int | None = None,
        scratch: bool = False,
    ) -> None:
        super().__init__(clear_recur_log_freq, clear_all_log_freq)
        self.config = config
        self.cache_config = (
            KVCacheConfig.from_world_model_cfg(config) if cache_config is None else cache_config
        )
        self.enable_stats = enable_stats and self.cache_config.enable_stats
        self.layout = _layout_from(config) if layout is None else layout
        if num_simulations is None:
            num_simulations = int(read_field(config, 'num_simulations', None) or DEFAULT_SIMULATIONS)
        if num_simulations < 1:
            raise ValueError(f'num_simulations must be at least 1, got {num_simulations}')
        self.num_simulations = num_simulations
        self.scratch = scratch
        self.init_pools = []
        self._trees: torch.Tensor | None = None
        self._build(env_num)

    def _build(self, env_num: int) -> None:
        if env_num < 1:
            raise ValueError(f'env_num must be at least 1, got {env_num}')
        choices, row_bytes = self.cache_config, self.layout.row_bytes
        limit = self._recurrent_limit(env_num)
        needed = choices.recurrent_slots or env_num
        least = (2 * choices.root_slots + 1) * env_num + needed + int(self.scratch)
        if limit is not None and limit < needed:
            raise ValueError(
                f'kv_cache.max_bytes={choices.max_bytes:,} is too small: {env_num} environments with '
                f'{choices.root_slots} root slot(s) each and {needed} nodes need at least '
                f'{least * row_bytes:,} bytes ({row_bytes:,} for each history); raise max_bytes, or lower '
                f'root_slots, recurrent_slots or the number of environments'
            )
        nodes = choices.recurrent_slots or env_num * (self.num_simulations + 1)
        nodes = nodes if limit is None else min(nodes, limit)
        roots = env_num * choices.root_slots
        beside = env_num + int(self.scratch)
        bound = None if choices.max_bytes is None else choices.max_bytes - beside * row_bytes
        options = EvictionStrategy(choices.policy), self.enable_stats

        self.env_num = env_num
        self.slab = KVSlab(self.layout, roots + nodes, bound, scratch=self.scratch)
        first_slots = range(0, roots, choices.root_slots)
        self.init_pools[:] = [
            KVCachePool(choices.root_slots, *options, f'init_env{env_id}', slab=self.slab, first_slot=first)
            for env_id, first in enumerate(first_slots)
        ]
        self.recur_pool = KVCachePool(nodes, *options, 'recurrent', slab=self.slab, first_slot=roots)
        self.wm_pool = KVCachePool(env_num, *options, 'world_model', slab=KVSlab(self.layout, env_num))

    def _recurrent_limit(self, env_num: int) -> int | None:
        """Nodes that fit into ``max_bytes`` beside the roots, which are held twice while the slab is resized,
        the slots of :attr:`wm_pool` and the scratch row; None without a bound."""
        bound = self.cache_config.max_bytes
        if bound is None:
            return None
        slots = (bound - self.tree_bytes - self.record_bytes) // self.layout.row_bytes
        return slots - 2 * env_num * self.cache_config.root_slots - env_num - int(self.scratch)

    def set_environments(self, env_num: int) -> None:
        """Change the number of environments before the first use.

        Raises:
            ValueError: ``env_num`` is not positive or does not fit into ``max_bytes``.
            RuntimeError: histories are stored or memory is allocated already. Nothing is changed.
        """
        if self.bytes or any(len(pool) for pool in self._pools()):
            raise RuntimeError(
                f'the number of environments is fixed at {self.env_num} once the cache is in use; '
                f'call set_environments({env_num}) before the first store'
            )
        self._build(env_num)

    def reserve_recurrent(self, entries: int, *, minimum: int = 1) -> int:
        """Begin a search: forget the nodes of the last one and make room for ``entries`` nodes.

        The pool grows as far as ``max_bytes`` allows and never shrinks; an explicit ``recurrent_slots`` fixes
        its size.

        Returns:
            Nodes it holds now, which may be fewer than ``entries``: then the policy evicts.

        Raises:
            RuntimeError: not even ``minimum`` nodes fit, or there is no memory. Nothing is changed, except
                that the nodes of the last search are forgotten when the memory is missing.
        """
        limit = self._recurrent_limit(self.env_num)
        capacity = self.recur_pool.pool_size
        if self.cache_config.recurrent_slots is None:
            capacity = max(capacity, entries if limit is None else min(entries, limit))
        if capacity < minimum:
            raise RuntimeError(
                f'a search needs at least {minimum} nodes at once, the cache can hold {capacity} '
                f'({self.layout.row_bytes:,} bytes each); '
                f'raise kv_cache.max_bytes or kv_cache.recurrent_slots'
            )
        self.recur_pool.clear()
        if capacity > self.recur_pool.pool_size:
            self.recur_pool.resize(capacity)
        return capacity

    def can_reserve(self, entries: int) -> bool:
        """Whether :meth:`reserve_recurrent` would make room for so many nodes."""
        most = self.cache_config.recurrent_slots or self._recurrent_limit(self.env_num)
        return most is None or entries <= most

    def tree_memory(self, elements: int, most: int) -> torch.Tensor | None:
        """Memory for one search whose nodes share their roots' histories; the next search gets it again.

        Arguments:
            elements: numbers that the search needs.
            most: numbers that a later search may need; at least ``elements``. Memory is taken for them at
                once, so that it is not taken anew while histories grow.

        Returns:
            ``[elements]``, finite numbers of no meaning; None where they do not fit into ``max_bytes`` beside
            the pools.
        """
        if self._trees is None or self._trees.numel() < elements:
            self._trees = None
            limit = self._recurrent_limit(self.env_num)
            if limit is not None:
                spare = (limit - self.recur_pool.pool_size) * self.layout.row_bytes
                spare //= self.layout.dtype.itemsize
                if elements > spare:
                    return None
                most = min(most, spare)
            with torch.inference_mode(False):
                self._trees = torch.zeros(most, dtype=self.layout.dtype, device=self.layout.device)
        return self._trees[:elements]

    def forget_trees(self) -> None:
        """Free the memory of :meth:`tree_memory`."""
        self._trees = None

    @property
    def tree_bytes(self) -> int:
        """Bytes of :meth:`tree_memory`."""
        return 0 if self._trees is None else self._trees.numel() * self._trees.element_size()

    def lookup(self, keys: Iterable[Key]) -> np.ndarray:
        """Absolute slots (int64 ``[B]``) or ``NO_SLOT``; one query for each key, counted on the pool of its
        kind.

        Raises:
            TypeError: a key is none of RootKey, NodeKey, LatentKey.
            ValueError: a RootKey names an environment that does not exist. Nothing is counted.
        """
        keys = list(keys)
        pools = [self._pool_of(key) for key in keys]
        return np.array([pool.find(key) for pool, key in zip(pools, keys, strict=True)], np.int64)

    def slots(self, keys: Iterable[Key]) -> np.ndarray:
        """As :meth:`lookup`, but nothing is counted and nothing is touched."""
        return np.array([self._pool_of(key).peek(key) for key in keys], np.int64)

    def load(
        self, slots: Slots, *, newest: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Copy histories out of the slab: :meth:`KVSlab.load`."""
        return self.slab.load(slots, newest=newest, out=out)

    def store(
        self,
        keys: Iterable[Key],
        kv: torch.Tensor,
        lengths: Sequence[int] | np.ndarray,
        next_positions: Sequence[int] | np.ndarray,
        *,
        newest: int | None = None,
    ) -> np.ndarray:
        """Write a batch of histories of roots and nodes.

        Arguments:
            keys: ``B`` different keys.
            kv: ``[B, 2 * layers, n, embed_dim]``, right-aligned, strided or not; ``[B, row_elements]`` when
                the layout is not uniform.
            lengths: ``B`` numbers of tokens, at most ``n``.
            next_positions: ``B`` logical positions of the next tokens.
            newest: ``n``, when the caller wants it checked.

        Returns:
            Absolute slots, int64 ``[B]``.

        Raises:
            ValueError: a shape, a length, a device or an environment is wrong, or a key is there twice.
            TypeError: a dtype or a key is of the wrong type.
            RuntimeError: not enough entries may be evicted, or there is no memory. Nothing is changed.
        """
        keys = list(keys)
        groups = self._groups(keys)
        numbers = self.slab.check_batch(len(keys), kv, lengths, next_positions, newest)
        evictions = [pool.plan(own) for pool, _, own in groups]
        self.slab.allocate()
        slots = np.empty(len(keys), np.int64)
        for (pool, rows, own), count in zip(groups, evictions, strict=True):
            slots[rows] = pool.commit(own, count)
        self.slab.write(slots, kv, *numbers)
        return slots

    def reserve(self, keys: Sequence[Key], lengths: np.ndarray, next_positions: np.ndarray) -> np.ndarray:
        """Slots for nodes whose histories the caller writes to :attr:`slab` itself; counted as a store.

        Arguments:
            keys: ``B`` different keys of nodes.
            lengths, next_positions: int64 ``[B]``, of the histories that will stand there.

        Returns:
            Absolute slots, int64 ``[B]``.

        Raises:
            ValueError: a key is there twice.
            RuntimeError: not enough entries may be evicted. Nothing is changed.
        """
        slots = self.recur_pool.reserve(keys)
        self.slab.lengths[slots], self.slab.next_positions[slots] = lengths, next_positions
        return slots

    def lengths(self, slots: Slots) -> np.ndarray:
        """int64 ``[B]``: tokens of the histories in these slots; ValueError when one is a miss."""
        return self.slab.lengths[self.slab.check_slots(slots)]

    def next_positions(self, slots: Slots) -> np.ndarray:
        """int64 ``[B]``: logical positions of their next tokens; ValueError when one is a miss."""
        return self.slab.next_positions[self.slab.check_slots(slots)]

    def _pool_of(self, key: Key) -> KVCachePool:
        if isinstance(key, RootKey):
            return self.init_pools[self._env(key.env_id)]
        if isinstance(key, (NodeKey, LatentKey)):
            return self.recur_pool
        raise TypeError(f'a key must be a RootKey, NodeKey or LatentKey, got {key!r}')

    def _groups(self, keys: list[Key]) -> list[tuple[KVCachePool, list[int], list[Key]]]:
        """The pools that a batch goes to, each with its rows of the batch and its keys."""
        groups: dict[str, tuple[KVCachePool, list[int], list[Key]]] = {}
        for row, key in enumerate(keys):
            pool = self._pool_of(key)
            _, rows, own = groups.setdefault(pool.name, (pool, [], []))
            rows.append(row)
            own.append(key)
        return list(groups.values())

    def __getstate__(self) -> dict[str, Any]:
        return {
            'config': self.config,
            'env_num': self.env_num,
            'enable_stats': self.enable_stats,
            'clear_recur_log_freq': self.clear_recur_log_freq,
            'clear_all_log_freq': self.clear_all_log_freq,
            'layout': self.layout,
            'cache_config': self.cache_config,
            'num_simulations': self.num_simulations,
            'scratch': self.scratch,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCacheManager:
        """An empty manager of the same configuration: a copied model needs caches of its own."""
        twin = type(self)(**self.__getstate__())
        memo[id(self)] = twin
        return twin

    def __repr__(self) -> str:
        return (
            f'KVCacheManager(env_num={self.env_num}, roots={sum(map(len, self.init_pools))}, '
            f'nodes={len(self.recur_pool)}/{self.recur_pool.pool_size}, bytes={self.bytes})'
        )


def _layout_from(config: Any) -> KVLayout:
    names = ('num_layers', 'num_heads', 'embed_dim', 'context_length')
    layers, heads, embed_dim, tokens = values = [read_field(config, name, None) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise ValueError(
            f"the world model's configuration lacks {', '.join(missing)}; add them or pass layout="
        )
    if embed_dim % heads:
        raise ValueError(f'embed_dim={embed_dim} must be a multiple of num_heads={heads}')
    return KVLayout(layers, heads, embed_dim // heads, tokens)
