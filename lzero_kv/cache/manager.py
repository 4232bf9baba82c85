"""The caches of one world model: root histories of each environment and the nodes of the running search."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.compat import NamedAccess
from lzero_kv.cache.entry import layout_of
from lzero_kv.cache.keys import NodeKey, RootKey
from lzero_kv.cache.layout import CPU, KVLayout, positive
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.storage import KVStorage, Slots
from lzero_kv.config import KVCacheConfig, read_field

Key = RootKey | NodeKey

DEFAULT_SIMULATIONS = 50
"""Simulations of a search where neither the caller nor ``config`` says; the host's own default."""


class KVCacheManager(NamedAccess):
    """One root pool per environment and one recurrent pool in one storage.

    A batch of keys may mix roots and nodes: one lookup counts one query for each key, one ``index_select``
    loads and one ``index_copy_`` stores whatever the number of rows and layers. The recurrent pool grows when
    it is full, and evicts only where ``max_bytes`` or ``window_slots`` keeps it from growing.

    Arguments:
        config: the world model's configuration (attributes or items): ``num_layers``, ``num_heads``,
            ``embed_dim`` and ``context_length``, and ``device``, ``num_simulations`` and ``kv_cache`` where
            it has them. Without any of the first four the layout is that of the first history that is stored.
        env_num: number of environments.
        enable_stats: whether events are counted.
        clear_recur_log_freq: log every that many calls of :meth:`clear_recur_cache`; 0 for never.
        clear_all_log_freq: the same for :meth:`clear_all`.
        layout: shape of a history; None derives it from ``config``.
        cache_config: the user's choices; None reads ``config.kv_cache``.
        num_simulations: simulations of a search, the bound of growth until :meth:`begin_search` states one;
            None reads ``config.num_simulations``.
        scratch: whether the storage has a scratch row: see :class:`KVStorage`.

    Raises:
        TypeError: a number is no integer, or ``cache_config`` is no mapping.
        ValueError: a number is out of range, ``config`` lacks a field, or ``max_bytes`` is too small for one
            window per environment.
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
        cache_config: KVCacheConfig | dict[str, Any] | None = None,
        num_simulations: int | None = None,
        scratch: bool = False,
    ) -> None:
        super().__init__(clear_recur_log_freq, clear_all_log_freq)
        self.config = config
        choices = config if cache_config is None else {'kv_cache': cache_config}
        self.cache_config = KVCacheConfig.from_world_model_cfg(choices)
        self.enable_stats = enable_stats and self.cache_config.enable_stats
        layout = _layout_from(config) if layout is None else layout
        if num_simulations is None:
            given = read_field(config, 'num_simulations', None)
            num_simulations = DEFAULT_SIMULATIONS if given is None else given
        self.num_simulations = num_simulations = positive('num_simulations', num_simulations)
        self.scratch = scratch
        self.env_num = env_num = positive('env_num', env_num)
        self._search: torch.Tensor | None = None
        self._most = env_num * (num_simulations + 1)
        self._short_of_room = False
        self._build(layout)

    def _build(self, layout: KVLayout | None) -> None:
        choices, env_num = self.cache_config, self.env_num
        if layout is not None:
            self._check_bound(layout)
        roots, windows = env_num * choices.root_slots, choices.window_slots or env_num
        self.storage = KVStorage(layout, roots + windows, scratch=self.scratch)
        self.init_pools = [
            self._pool(choices.root_slots, f'init_env{env_id}', env_id * choices.root_slots)
            for env_id in range(env_num)
        ]
        self.recur_pool = self._pool(windows, 'recurrent', roots)

    def _check_bound(self, layout: KVLayout) -> None:
        choices, env_num = self.cache_config, self.env_num
        windows = choices.window_slots or env_num
        least = 2 * env_num * choices.root_slots + windows + int(self.scratch)
        if choices.max_bytes is not None and least * layout.row_bytes > choices.max_bytes:
            lower = 'root_slots' if choices.window_slots is None else 'root_slots, window_slots'
            raise ValueError(
                f'kv_cache.max_bytes={choices.max_bytes:,} is too small: {env_num} environments with '
                f'{choices.root_slots} root slot(s) each and {windows} windows need at least '
                f'{least * layout.row_bytes:,} bytes ({layout.row_bytes:,} for each history); raise '
                f'max_bytes, or lower {lower} or the number of environments'
            )

    @property
    def layout(self) -> KVLayout:
        """Shape of a history; RuntimeError before it is known."""
        return self.storage.layout

    def _admit(self, keys_values: Any) -> None:
        if self.storage.known_layout is None:
            self._check_bound(layout_of(keys_values))

    def _pool(self, size: int, name: str, first_slot: int) -> KVCachePool:
        options = self.cache_config.policy, self.enable_stats, name
        return KVCachePool(size, *options, storage=self.storage, first_slot=first_slot)

    def _window_limit(self, kept: int = 0) -> int:
        """Windows that fit into ``max_bytes`` beside everything else, while the roots and ``kept`` windows
        are held twice because the storage is resized."""
        bound, layout = self.cache_config.max_bytes, self.storage.known_layout
        if bound is None or layout is None:
            return sys.maxsize
        rows = (bound - self.search_bytes - self.record_bytes) // layout.row_bytes
        return rows - 2 * self.env_num * self.cache_config.root_slots - kept - int(self.scratch)

    def _make_room(self, keys: Sequence[Any]) -> None:
        """Double the recurrent pool where these nodes do not fit, as far as the bounds allow."""
        pool, size = self.recur_pool, self.recur_pool.pool_size
        if len(pool) + len(keys) <= size or self.cache_config.window_slots is not None:
            return
        needed = min(len(pool) + sum(key not in pool for key in set(keys)), self._most)
        if needed > size:
            limit = self._window_limit(size if len(pool) else 0)
            larger = min(max(2 * size, needed), self._most, limit)
            if larger > size:
                pool.resize(larger)
            self._short_of_room = pool.pool_size < needed

    def begin_search(self, least: int, most: int, *, upfront: bool = False) -> None:
        """Forget the nodes of the last search and make room for those of the next.

        Arguments:
            least: windows that must fit at once.
            most: windows that the search can have: the bound of the pool's growth.
            upfront: whether room for ``most`` is taken now, as far as ``max_bytes`` allows, so that the
                storage does not move during the search.

        Raises:
            ValueError: not ``0 <= least <= most``.
            RuntimeError: not even ``least`` windows fit, or there is no memory. Nothing is changed, except
                that the nodes of the last search are forgotten when the memory is missing.
        """
        if not 0 <= least <= most:
            raise ValueError(f'expected 0 <= least <= most, got least={least} and most={most}')
        size = self.recur_pool.pool_size
        if self.cache_config.window_slots is None:
            # without windows to keep the pool may grow further than it could during the last search
            wanted = most if upfront else min(2 * size, most) if self._short_of_room else least
            size = max(size, min(max(least, wanted), self._window_limit()))
        if size < least:
            bound = 'max_bytes' if self.cache_config.window_slots is None else 'window_slots'
            raise RuntimeError(
                f'a search needs at least {least} windows at once, the cache can hold {size} '
                f'({self.layout.row_bytes:,} bytes each); raise kv_cache.{bound}'
            )
        self.recur_pool.clear()
        if size > self.recur_pool.pool_size:
            self.recur_pool.resize(size)
        self._most, self._short_of_room = most, False

    @property
    def window_bound(self) -> int:
        """Windows that the recurrent pool may come to hold during the running search."""
        size = self.recur_pool.pool_size
        return size if self.cache_config.window_slots else max(size, min(self._most, self._window_limit()))

    @property
    def spare_bytes(self) -> int:
        """Bytes that ``max_bytes`` leaves beside the pools of this moment, and what is in use already."""
        return max(0, self._window_limit() - self.recur_pool.pool_size) * self.layout.row_bytes

    def search_memory(self, elements: int) -> torch.Tensor | None:
        """Memory for what one search keeps beside the pools; the next search gets it again.

        Arguments:
            elements: numbers that the search needs. When a later search needs more, a quarter more is taken,
                so that memory is not taken anew whenever histories grow by a step.

        Returns:
            ``[elements]``, finite numbers of no meaning; None where they do not fit into ``max_bytes`` beside
            the pools.
        """
        if self._search is None or self._search.numel() < elements:
            before, self._search = self._search, None
            taken = elements if before is None else elements + elements // 4
            spare = self.spare_bytes // self.layout.dtype.itemsize
            if elements > spare:
                self._search = before  # else the pool would take its room
                return None
            del before
            with torch.inference_mode(False):
                self._search = torch.zeros(
                    min(taken, spare), dtype=self.layout.dtype, device=self.layout.device
                )
        return self._search[:elements]

    def forget_search_memory(self) -> None:
        """Free the memory of :meth:`search_memory`."""
        self._search = None

    @property
    def search_bytes(self) -> int:
        """Bytes of :meth:`search_memory`."""
        return 0 if self._search is None else self._search.nbytes

    def lookup(self, keys: Iterable[Key]) -> np.ndarray:
        """Absolute slots (int64 ``[B]``) or ``NO_SLOT``; one query for each key, counted on the pool of its
        kind.

        Raises:
            TypeError: a key is neither a RootKey nor a NodeKey.
            ValueError: a RootKey names an environment that does not exist. Nothing is counted.
        """
        keys = list(keys)
        if set(map(type, keys)) == {NodeKey}:  # those of a search, without a call for each
            return self.recur_pool.lookup(keys)
        pools = [self._pool_of(key) for key in keys]
        return np.array([pool.find([key])[0] for pool, key in zip(pools, keys, strict=True)], np.int64)

    def slots(self, keys: Iterable[Key]) -> np.ndarray:
        """As :meth:`lookup`, but not counted, and no use of the entries."""
        return np.array([self._pool_of(key).peek(key) for key in keys], np.int64)

    def load(
        self, slots: Slots, *, newest: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Copy histories out of the storage: :meth:`KVStorage.load`."""
        return self.storage.load(slots, newest=newest, out=out)

    def store(
        self,
        keys: Iterable[Key],
        kv: torch.Tensor,
        lengths: Sequence[int] | np.ndarray,
        next_positions: Sequence[int] | np.ndarray,
    ) -> np.ndarray:
        """Write a batch of histories of roots and nodes.

        Arguments:
            keys: ``B`` different keys.
            kv: ``[B, 2 * layers, heads, n, head_dim]``, right-aligned, strided or not.
            lengths: ``B`` numbers of tokens, at most ``n``.
            next_positions: ``B`` logical positions of the next tokens.

        The numbers of ``kv`` are not looked at: on a GPU the search would wait for each look.

        Returns:
            Absolute slots, int64 ``[B]``.

        Raises:
            ValueError: a shape, a length, a device or an environment is wrong, or a key is there twice.
            TypeError: a dtype or a key is of the wrong type.
            RuntimeError: a pool is too small for the batch, or there is no memory. Nothing is changed, except
                that the recurrent pool may have grown.
        """
        keys = list(keys)
        groups = self._groups(keys)
        numbers = self.storage.check_batch(len(keys), kv, lengths, next_positions)
        if groups and groups[-1][0] is self.recur_pool:
            self._make_room(groups[-1][2])
        plans = [pool.plan(own) for pool, _, own in groups]
        self.storage.allocate()
        slots = np.empty(len(keys), np.int64)
        for (pool, rows, own), planned in zip(groups, plans, strict=True):
            slots[rows] = pool.commit(own, planned)
        self.storage.write(slots, kv, *numbers)
        return slots

    def reserve(self, keys: Sequence[NodeKey], lengths: np.ndarray, next_positions: np.ndarray) -> np.ndarray:
        """Slots for windows of nodes that the caller writes to :attr:`storage` itself; counted as stores.

        Arguments:
            keys: ``B`` different keys of nodes.
            lengths, next_positions: int64 ``[B]``, of the histories that will stand there.

        Returns:
            Absolute slots, int64 ``[B]``.

        Raises:
            ValueError: a key is there twice.
            RuntimeError: the pool is too small for the batch. Nothing is changed, except that it may have
                grown.
        """
        self._make_room(keys)
        slots = self.recur_pool.reserve(keys)
        self.storage.lengths[slots], self.storage.next_positions[slots] = lengths, next_positions
        return slots

    def lengths(self, slots: Slots) -> np.ndarray:
        """int64 ``[B]``: tokens of the histories in these slots; ValueError when one is a miss."""
        return self.storage.lengths[self.storage.check_slots(slots)]

    def next_positions(self, slots: Slots) -> np.ndarray:
        """int64 ``[B]``: logical positions of their next tokens; ValueError when one is a miss."""
        return self.storage.next_positions[self.storage.check_slots(slots)]

    def _pool_of(self, key: Key) -> KVCachePool:
        if isinstance(key, RootKey):
            return self.init_pools[self._env(key.env_id)]
        if isinstance(key, NodeKey):
            return self.recur_pool
        raise TypeError(f'a key must be a RootKey or a NodeKey, got {key!r}')

    def _groups(self, keys: list[Key]) -> list[tuple[KVCachePool, list[int], list[Key]]]:
        """The pools that a batch goes to, the recurrent pool last, each with its rows of the batch and its
        keys."""
        groups: dict[str, tuple[KVCachePool, list[int], list[Key]]] = {}
        for row, key in enumerate(keys):
            pool = self._pool_of(key)
            _, rows, own = groups.setdefault(pool.name, (pool, [], []))
            rows.append(row)
            own.append(key)
        return sorted(groups.values(), key=lambda group: group[0] is self.recur_pool)

    def __getstate__(self) -> dict[str, Any]:
        return {
            'config': self.config,
            'env_num': self.env_num,
            'enable_stats': self.enable_stats,
            'clear_recur_log_freq': self.clear_recur_log_freq,
            'clear_all_log_freq': self.clear_all_log_freq,
            'layout': self.storage.known_layout,
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


def _layout_from(config: Any) -> KVLayout | None:
    names = ('num_layers', 'num_heads', 'embed_dim', 'context_length')
    values = [read_field(config, name, None) for name in names]
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise ValueError(
            f"the world model's configuration lacks {', '.join(missing)}; add them or pass layout="
        )
    layers, heads, embed_dim, tokens = map(positive, names, values)
    if embed_dim % heads:
        raise ValueError(f'embed_dim={embed_dim} must be a multiple of num_heads={heads}')
    return KVLayout(layers, heads, embed_dim // heads, tokens, device=read_field(config, 'device', CPU))
