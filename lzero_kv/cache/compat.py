"""The manager's names for single histories, clearing and statistics: those of LightZero's own manager."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

from lzero_kv.cache.entry import KVEntry
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.stats import CacheStats
from lzero_kv.cache.storage import KVStorage

logger = logging.getLogger('lzero_kv')


class NamedAccess:
    """Access to the pools one history at a time, under the names that LightZero's callers use."""

    storage: KVStorage
    """Slots of all root pools, then those of the recurrent pool."""
    init_pools: list[KVCachePool]
    """The root pool of each environment."""
    recur_pool: KVCachePool
    """Derived windows of the running search, of all environments, and what callers of
    :meth:`set_recur_cache` store."""
    env_num: int
    """Number of environments."""
    enable_stats: bool
    """Whether events are counted."""
    search_bytes: int
    """Bytes of the memory of one search, beside the pools."""
    record_bytes: int = 0
    """Bytes of what is remembered of the roots' tokens to choose among them; set by its owner."""
    _make_room: Callable[[Sequence[Any]], None]
    _admit: Callable[[Any], None]

    def __init__(self, clear_recur_log_freq: int, clear_all_log_freq: int) -> None:
        self.clear_recur_log_freq = clear_recur_log_freq
        self.clear_all_log_freq = clear_all_log_freq
        self.keys_values_wm_list: list[Any] = []
        """The host's list of the batch in progress, for its old callers; :meth:`clear_all` empties it."""
        self.keys_values_wm_size_list: list[int] = []
        """Sizes beside :attr:`keys_values_wm_list`."""
        self._clear_recur_calls = 0
        self._clear_all_calls = 0
        self._rebuilt_roots = 0

    def get_init_cache(self, env_id: int, cache_key: Any) -> KVEntry | None:
        """A copy of a root history of an environment, or None; ValueError for an unknown environment."""
        return self.init_pools[self._env(env_id)].get(cache_key)

    def set_init_cache(self, env_id: int, cache_key: Any, kv_cache: Any) -> int:
        """Store a root history of an environment; returns the slot.

        Raises:
            ValueError, TypeError, RuntimeError: as :meth:`KVCachePool.set`, or the first history shows that
                ``max_bytes`` is too small.
        """
        pool = self.init_pools[self._env(env_id)]
        self._admit(kv_cache)
        return pool.set(cache_key, kv_cache)

    def get_recur_cache(self, cache_key: Any) -> KVEntry | None:
        """A copy of a node's history, or None."""
        return self.recur_pool.get(cache_key)

    def set_recur_cache(self, cache_key: Any, kv_cache: Any) -> int:
        """Store a node's history; returns the slot. Raises as :meth:`set_init_cache`."""
        self._admit(kv_cache)
        self._make_room([cache_key])
        return self.recur_pool.set(cache_key, kv_cache)

    def hierarchical_get(self, env_id: int, cache_key: Any) -> KVEntry | None:
        """A copy from the environment's root pool, else from the recurrent pool, else None.

        One query: a root hit counts on the root pool, anything else on the recurrent pool.
        """
        roots = self.init_pools[self._env(env_id)]
        return roots.get(cache_key) if cache_key in roots else self.recur_pool.get(cache_key)

    def clear_all(self) -> None:
        """Forget everything; memory and counters stay."""
        for pool in self._pools():
            pool.clear()
        self.keys_values_wm_list.clear()
        self.keys_values_wm_size_list.clear()
        self._clear_all_calls += 1
        _log_now_and_then('all caches cleared', self._clear_all_calls, self.clear_all_log_freq)

    def clear_init_caches(self) -> None:
        """Forget the root histories of all environments."""
        for pool in self.init_pools:
            pool.clear()
        logger.debug('root caches cleared')

    def clear_recur_cache(self) -> None:
        """Forget the nodes of the last search."""
        self.recur_pool.clear()
        self._clear_recur_calls += 1
        _log_now_and_then('recurrent cache cleared', self._clear_recur_calls, self.clear_recur_log_freq)

    @property
    def bytes(self) -> int:
        """Bytes allocated for all pools, for the memory of a search and for the record of roots' tokens."""
        return self.storage.bytes + self.search_bytes + self.record_bytes

    def count_rebuilt(self, tokens: int, *, roots: bool, env_id: int | None = None) -> None:
        """Count tokens that were recomputed after misses.

        Arguments:
            tokens: how many.
            roots: whether the histories were roots (else nodes).
            env_id: the environment, where it is one; else the count stands under all roots together.
        """
        if tokens < 0:
            raise ValueError(f'tokens must be at least 0, got {tokens}')
        if not self.enable_stats:
            return
        if not roots:
            self.recur_pool.stats.rebuilt_tokens += tokens
        elif env_id is not None:
            self.init_pools[self._env(env_id)].stats.rebuilt_tokens += tokens
        else:
            self._rebuilt_roots += tokens

    def count_window(self, tokens: int, *, env_id: int | None = None) -> None:
        """Count tokens that were recomputed because a full window moved: of a root of an environment, else of
        nodes."""
        if self.enable_stats:
            pool = self.recur_pool if env_id is None else self.init_pools[self._env(env_id)]
            pool.stats.window_tokens += tokens

    def count_step(self, new: int, served: int, *, env_id: int | None = None) -> None:
        """Count new tokens, and tokens of the histories behind them that were there: of a root of an
        environment, else of nodes."""
        if self.enable_stats:
            pool = self.recur_pool if env_id is None else self.init_pools[self._env(env_id)]
            pool.stats.new_tokens += new
            pool.stats.served_tokens += served

    def stats_snapshot(self) -> dict[str, CacheStats]:
        """Copies of the counters of all root pools together ('roots') and of the recurrent pool ('nodes')."""
        roots = sum((pool.stats for pool in self.init_pools), CacheStats(rebuilt_tokens=self._rebuilt_roots))
        return {'roots': roots, 'nodes': self.recur_pool.stats.snapshot()}

    def get_stats_summary(self) -> dict[str, Any]:
        """Counters and sizes of every pool as numbers.

        Returns:
            ``stats_enabled``, ``init_pools`` (by ``env_0``, ``env_1``, ...), ``recur_pool``, ``roots`` (all
            root pools together, and :attr:`record_bytes`), ``nodes`` (the recurrent pool, and
            :attr:`search_bytes`) and ``total`` (both), each as :meth:`KVCachePool.describe`; only
            ``{'stats_enabled': False}`` when events are not counted.
        """
        if not self.enable_stats:
            return {'stats_enabled': False}
        counters = self.stats_snapshot()
        both = counters['roots'] + counters['nodes']
        return {
            'stats_enabled': True,
            'init_pools': {f'env_{env_id}': pool.describe() for env_id, pool in enumerate(self.init_pools)},
            'recur_pool': self.recur_pool.describe(),
            'roots': _with(self.record_bytes, _describe_together(counters['roots'], self.init_pools)),
            'nodes': _with(self.search_bytes, self.recur_pool.describe()),
            'total': _with(
                self.record_bytes + self.search_bytes,
                _describe_together(both, [*self.init_pools, self.recur_pool]),
            ),
        }

    def reset_stats(self) -> None:
        """Set all counters to zero."""
        for pool in self._pools():
            pool.stats.reset()
        self._rebuilt_roots = 0

    def _pools(self) -> list[KVCachePool]:
        return [*self.init_pools, self.recur_pool]

    def _env(self, env_id: int) -> int:
        try:
            number = operator.index(env_id)
        except TypeError:
            number = -1
        if not 0 <= number < self.env_num:
            raise ValueError(f'env_id must be an integer in [0, {self.env_num}), got {env_id!r}')
        return number


def _describe_together(stats: CacheStats, pools: list[KVCachePool]) -> dict[str, int | float]:
    entries, capacity = sum(map(len, pools)), sum(pool.pool_size for pool in pools)
    return {
        **stats.as_dict(),
        'entries': entries,
        'capacity': capacity,
        'occupancy': entries / capacity,
        'bytes': sum(pool.bytes for pool in pools),
    }


def _with(more_bytes: int, described: dict[str, int | float]) -> dict[str, int | float]:
    return {**described, 'bytes': described['bytes'] + more_bytes}


def _log_now_and_then(what: str, calls: int, every: int) -> None:
    if every > 0 and calls % every == 0:
        logger.debug('%s (%d times so far, logged every %d)', what, calls, every)
