"""Takes the numbers of one moment out of the managers: what every sink writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

from lzero_kv.budget import BudgetSnapshot, LayerLoss
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.stats import CacheStats
from lzero_kv.telemetry.counters import Timings, ValidationCounters


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


@dataclass(frozen=True)
class RanksReading(PoolReading):
    """The same pool of several processes (ranks): counters, entries, capacity and bytes are sums.

    Attributes:
        ranks: number of processes.
        fullest: occupancy of the fullest of these pools.
        most_bytes: memory of the largest of them.
    """

    ranks: int
    fullest: float
    most_bytes: int

    @classmethod
    def of(cls, readings: Sequence[PoolReading]) -> RanksReading:
        """Combine one reading of each process."""
        return cls(
            **vars(reduce(add, readings)),
            ranks=len(readings),
            fullest=max(reading.occupancy for reading in readings),
            most_bytes=max(reading.bytes for reading in readings),
        )

    @property
    def occupancy(self) -> float:
        """That of the fullest pool: full pools evict, however empty another is."""
        return self.fullest

    def as_dict(self) -> dict[str, int | float]:
        """Every metric of METRICS and of RANK_METRICS by name, and the miss rate."""
        return {**super().as_dict(), 'ranks': self.ranks, 'most_bytes': self.most_bytes}


@dataclass(frozen=True)
class Moment:
    """What one process counted until now; plain numbers, which another process can be sent.

    Attributes:
        pools: as :func:`read_managers` gives it.
        validation: counters since the start of the training; None without validation.
        losses: what each layer of the acting model has dropped; empty without layer budgets.
        timings: of the acting model.
    """

    pools: Mapping[str, PoolReading]
    validation: ValidationCounters | None = None
    losses: tuple[LayerLoss, ...] = ()
    timings: Timings = field(default_factory=Timings)

    @classmethod
    def of(
        cls,
        managers: Mapping[str, KVCacheManager],
        validation: ValidationCounters | None = None,
        budget: BudgetSnapshot | None = None,
        timings: Timings | None = None,
    ) -> Moment:
        """Read the managers of :func:`read_managers`, by its argument names."""
        losses = () if budget is None else budget.losses
        return cls(read_managers(**managers), validation, losses, timings or Timings())

    def with_ranks(self, others: Sequence[Moment]) -> Moment:
        """This moment and those of the other processes as one; the same where there are none."""
        if not others:
            return self
        moments = [self, *others]
        names = dict.fromkeys(name for moment in moments for name in moment.pools)
        pools = {name: [m.pools[name] for m in moments if name in m.pools] for name in names}
        counters = [m.validation for m in moments if m.validation is not None]
        losses = zip(*(m.losses for m in moments if m.losses), strict=True)
        return Moment(
            {name: RanksReading.of(readings) for name, readings in pools.items()},
            reduce(add, counters) if counters else None,
            tuple(LayerLoss(*map(sum, zip(*layer, strict=True))) for layer in losses),
            reduce(add, (m.timings for m in moments)),
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
