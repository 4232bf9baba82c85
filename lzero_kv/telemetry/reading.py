"""Takes the numbers of one moment out of managers, counters and layer budgets, by metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from lzero_kv.budget import BudgetSnapshot, LayerLoss
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.stats import CacheStats
from lzero_kv.telemetry.counters import KINDS, Cause, Counters, Timings, ValidationCounters
from lzero_kv.telemetry.metrics import CAUSE_PREFIX, FAULT_PREFIX, VALIDATION_METRICS


@dataclass(frozen=True)
class PoolReading:
    """One pool, or several pools added up, at one moment.

    Attributes:
        stats: counters since the start of the training or the last `reset_stats`; a copy that no pool
            changes.
        entries: histories held.
        capacity: histories that fit.
        bytes: memory allocated for tensors.
        ranks: of the same pool of so many processes the numbers are sums; None of one process.
        fullest: occupancy of the fullest of their pools: full pools evict, however empty another is.
        most_bytes: memory of the largest of them.
    """

    stats: CacheStats
    entries: int
    capacity: int
    bytes: int
    ranks: int | None = None
    fullest: float = 0.0
    most_bytes: int = 0

    @classmethod
    def of_ranks(cls, readings: Sequence[PoolReading]) -> PoolReading:
        """Combine one reading of each process."""
        return replace(
            reduce(add, readings),
            ranks=len(readings),
            fullest=max(reading.occupancy for reading in readings),
            most_bytes=max(reading.bytes for reading in readings),
        )

    @property
    def occupancy(self) -> float:
        """Entries divided by capacity, 0.0 without capacity; of several processes that of the fullest."""
        if self.ranks is not None:
            return self.fullest
        return self.entries / self.capacity if self.capacity else 0.0

    def with_stats(self, stats: CacheStats) -> PoolReading:
        """Return the same gauges with other counters: those of an interval."""
        return replace(self, stats=stats)

    def as_dict(self) -> dict[str, int | float]:
        """Return every metric of METRICS by name, and the miss rate; of several ranks RANK_METRICS too."""
        gauges = {'entries': self.entries, 'occupancy': self.occupancy, 'bytes': self.bytes}
        ranks = {} if self.ranks is None else {'ranks': self.ranks, 'most_bytes': self.most_bytes}
        return {**self.stats.as_dict(), **gauges, **ranks}

    def __add__(self, other: PoolReading) -> PoolReading:
        return PoolReading(
            stats=self.stats + other.stats,
            entries=self.entries + other.entries,
            capacity=self.capacity + other.capacity,
            bytes=self.bytes + other.bytes,
        )


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
            {name: PoolReading.of_ranks(readings) for name, readings in pools.items()},
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


def validation_numbers(counters: ValidationCounters) -> dict[str, float]:
    """Every metric of VALIDATION_METRICS, all kinds of inference together.

    A mean is left out where nothing moved, and a fault where it did not happen.
    """
    return {'searches': counters.searches, 'validated': counters.validated, **counter_numbers(counters.total)}


def counter_numbers(counters: Counters) -> dict[str, float]:
    """The metrics of one kind of inference, as :func:`validation_numbers` has them."""
    numbers: dict[str, float] = {
        name: getattr(counters, name) for name in VALIDATION_METRICS if hasattr(counters, name)
    }
    numbers |= {f'{CAUSE_PREFIX}{cause.value}': counters.causes[cause] for cause in Cause}
    numbers |= {f'{FAULT_PREFIX}{fault.value}': count for fault, count in counters.faults.items() if count}
    for name, movement in (('policy', counters.policy), ('value', counters.value)):
        numbers[f'{name}_rows'] = movement.count
        numbers[f'{name}_moved_most'] = movement.largest
        if movement.count:
            numbers[f'{name}_moved'] = movement.mean
    return numbers


def columns_of(counters: ValidationCounters) -> dict[str, dict[str, float]]:
    """Columns of a table: each kind of inference that was compared, and all together."""
    kinds = {name: getattr(counters, name) for name in KINDS}
    columns = {name: counter_numbers(kind) for name, kind in kinds.items() if kind.compared}
    return {**columns, 'total': validation_numbers(counters)}


def layer_numbers(snapshot: BudgetSnapshot) -> list[dict[str, float]]:
    """For each layer every metric of BUDGET_METRICS that has a value."""
    numbers: list[dict[str, float]] = []
    for layer, (slots, loss) in enumerate(zip(snapshot.slots, snapshot.losses, strict=True)):
        found: dict[str, float] = {'slots': slots, 'dropped_tokens': loss.dropped_tokens}
        if snapshot.preferences:
            found |= snapshot.preferences[layer]._asdict()
        if loss.lost_mass is not None:
            found['lost_mass'] = loss.lost_mass
        numbers.append(found)
    return numbers


def layer_histograms(snapshot: BudgetSnapshot) -> list[dict[str, dict[str, Any]]]:
    """For each layer the histograms of BUDGET_HISTOGRAMS that hold a value, as arguments of
    `add_histogram_raw`; a bucket for each token of a window."""
    parts = {'kept_positions': snapshot.kept, 'kept_tokens': snapshot.root}
    counts = {
        name: [np.bincount(places, minlength=snapshot.context).tolist() for places in layers]
        for name, layers in parts.items()
    }
    return [
        {
            name: raw_histogram(range(1, len(of[layer]) + 1), of[layer])
            for name, of in counts.items()
            if any(of[layer])
        }
        for layer in range(len(snapshot.slots))
    ]


def raw_histogram(limits: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of `add_histogram_raw` for a histogram that holds at least one value.

    Bucket i goes to TensorBoard with its upper edge `limits[i]`. The first bucket that is drawn begins at
    `min` and the last ends at `max`, so both are edges of the buckets and not values. The two sums, which no
    chart shows, are those of the lower edges: the buckets do not hold the values themselves.

    Raises:
        ValueError: the histogram is empty.
    """
    filled = [bucket for bucket, count in enumerate(counts) if count]
    if not filled:
        raise ValueError('histogram must hold at least one value, got an empty one; leave its point out')
    lower = [0, *limits[:-1]]
    pairs = list(zip(lower, counts, strict=True))
    return {
        'min': lower[filled[0]],
        'max': limits[filled[-1]],
        'num': sum(counts),
        'sum': sum(edge * count for edge, count in pairs),
        'sum_squares': sum(edge * edge * count for edge, count in pairs),
        'bucket_limits': list(limits),
        'bucket_counts': list(counts),
    }
