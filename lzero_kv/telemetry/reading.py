"""Takes the numbers of one moment out of the managers: what every sink writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.stats import CacheStats


@dataclass(frozen=True)
class PoolReading:
    """One pool, or several pools added up, at one moment.

    Attributes:
        stats: counters since the start of the training or the last `reset_stats`; a copy that no pool
            changes.
        entries: histories held.
        capacity: histories that fit.
        bytes: memory allocated for tensors.
    """

    stats: CacheStats
    entries: int
    capacity: int
    bytes: int

    @property
    def occupancy(self) -> float:
        """Entries divided by capacity; 0.0 for a pool without capacity."""
        return self.entries / self.capacity if self.capacity else 0.0

    def with_stats(self, stats: CacheStats) -> PoolReading:
        """Return the same gauges with other counters: those of an interval."""
        return replace(self, stats=stats)

    def as_dict(self) -> dict[str, int | float]:
        """Return every metric of METRICS by name, and the miss rate."""
        gauges = {'entries': self.entries, 'occupancy': self.occupancy, 'bytes': self.bytes}
        return {**self.stats.as_dict(), **gauges}

    def __add__(self, other: PoolReading) -> PoolReading:
        return PoolReading(
            stats=self.stats + other.stats,
            entries=self.entries + other.entries,
            capacity=self.capacity + other.capacity,
            bytes=self.bytes + other.bytes,
        )


def read_managers(acting: KVCacheManager, reanalysis: KVCacheManager | None = None) -> dict[str, PoolReading]:
    """Read the pools of a training.

    Args:
        acting: the manager of the model that collects and evaluates: pools `roots` and `nodes`.
        reanalysis: the manager of the target model, where `reanalyze_ratio` is above 0: pool `reanalysis`.

    Returns:
        One reading per pool and their sum `total`; empty when the acting manager keeps no statistics. A
        target model that has not searched yet (it never does where `reanalyze_ratio` is 0) is left out.
    """
    pools = _pools(acting)
    if not pools:
        return {}
    target = _pools(reanalysis) if reanalysis is not None else {}
    if target:
        searched = reduce(add, target.values())
        if searched.stats.queries or searched.stats.stores:
            pools['reanalysis'] = searched
    pools['total'] = reduce(add, pools.values())
    return pools


def _pools(manager: KVCacheManager) -> dict[str, PoolReading]:
    summary = manager.get_stats_summary()
    if not summary['stats_enabled']:
        return {}
    snapshot = manager.stats_snapshot()
    return {
        pool: PoolReading(
            snapshot[pool], summary[pool]['entries'], summary[pool]['capacity'], summary[pool]['bytes']
        )
        for pool in ('roots', 'nodes')
    }
