"""Writes what the pools counted into the TensorBoard log the host already keeps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, Protocol

from lzero_kv.budget import BudgetSnapshot
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.stats import CacheStats, Log2Histogram
from lzero_kv.telemetry.budget import layer_histograms, layer_numbers
from lzero_kv.telemetry.counters import ValidationCounters
from lzero_kv.telemetry.dashboard import dashboard_layout, explanation
from lzero_kv.telemetry.metrics import (
    HISTOGRAMS,
    LAYER_PREFIX,
    METRICS,
    RANK_METRICS,
    VALIDATION,
    Axis,
    Kind,
    tag,
)
from lzero_kv.telemetry.reading import Moment, PoolReading
from lzero_kv.telemetry.validation import validation_numbers

POOLS_OF = {'acting': ('roots', 'nodes'), 'reanalysis': ('reanalysis',)}


class SummaryWriter(Protocol):
    """The part of a writer that is used; torch.utils.tensorboard and tensorboardX both have it."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int | None = None) -> Any: ...

    def add_histogram_raw(
        self,
        tag: str,
        min: Any,
        max: Any,
        num: Any,
        sum: Any,
        sum_squares: Any,
        bucket_limits: Any,
        bucket_counts: Any,
        global_step: int | None = None,
    ) -> Any: ...

    def add_custom_scalars(self, layout: Any) -> Any: ...

    def add_text(self, tag: str, text_string: str, global_step: int | None = None) -> Any: ...

    def flush(self) -> Any: ...


class TensorBoardSink:
    """One chart per pool, metric and axis; a point at every `write`.

    Counters (queries, hits, misses, stores, overwrites, evictions, rebuilt_tokens, window_tokens) hold the
    difference since the previous point, so that a change in behaviour shows where it happens; the first point
    counts from the start. hit_rate is that of the same interval and has no point where nothing was queried.
    Gauges (entries, occupancy, bytes) hold the present value. Histograms hold the interval's values.
    TensorBoard keeps values as float32: above 16,777,216 a count is rounded.

    A manager that takes another's place between two points counts from its own start. After a `reset_stats`
    the interval counts from the reset: it shows by a counter that went down; when every counter has passed
    its old value again by the next point, the interval is counted too low.

    Where validation is on, the section `validation` follows the same rules: counters and the two means are of
    the interval (a mean has no point where nothing moved), the largest differences those so far.

    Where there are layer budgets, each layer has its own: gauges and the present averages of its preference,
    counters and the mean of lost attention of the interval, and which places its roots hold at this moment.

    The layout of the Custom Scalars page and a text that explains the metrics are written at the first point.

    Args:
        writer: the host's `torch.utils.tensorboard.SummaryWriter` or `tensorboardX.SummaryWriter`. The sink
            never closes it.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer
        self._previous: dict[str, CacheStats] = {}
        self._managers: dict[str, weakref.ref[KVCacheManager]] = {}
        self._validated = ValidationCounters()
        self._budget: BudgetSnapshot | None = None
        self._described = False

    def write(
        self,
        managers: Mapping[str, KVCacheManager],
        env_step: int,
        train_iter: int,
        validation: ValidationCounters | None = None,
        budget: BudgetSnapshot | None = None,
        others: Sequence[Moment] = (),
    ) -> None:
        """Write one point for every pool.

        Args:
            managers: `acting`, the manager of the model that collects and evaluates, and `reanalysis`, that
                of the target model, where there is one; see `read_managers`. An acting manager without
                statistics writes nothing. Its `cache_config.histograms` says whether histograms are written.
            env_step: environment steps collected so far.
            train_iter: training iterations done so far.
            validation: what validation counted since the start of the training; None where it is off, and
                then the log has no tag of it.
            budget: the acting model's layer budgets at this moment; None where there are none.
            others: the same of the other processes of the training: counters and memory are added, of
                occupancy the largest counts, and RANK_METRICS say so. Of layer budgets the losses are added;
                slots, averages and places are those of this process.

        Raises:
            ValueError: `acting` is missing, a name is unknown or a step is negative. Nothing has been written
                then.
            TypeError: a step is no integer. Nothing has been written then.
        """
        steps = {Axis.ENV_STEP: _step('env_step', env_step), Axis.TRAIN_ITER: _step('train_iter', train_iter)}
        if 'acting' not in managers or set(managers) - set(POOLS_OF):
            raise ValueError(
                "managers must be named 'acting' and, for a target model, 'reanalysis', "
                f'got {sorted(managers)}'
            )
        moment = Moment.of(managers, validation, budget).with_ranks(others)
        readings, validation = moment.pools, moment.validation
        if not readings:
            return
        if not self._described:
            self._describe(validation=validation is not None, budget=budget is not None, ranks=bool(others))
        histograms = managers['acting'].cache_config.histograms
        self._forget_replaced(managers)
        since = self._since_previous(readings)
        for pool, reading in readings.items():
            for axis, step in steps.items():
                self._write_scalars(axis, pool, reading.with_stats(since[pool]), step)
                if histograms:
                    self._write_histograms(axis, pool, since[pool], step)
        if validation is not None:
            self._write_validation(validation, steps)
        if budget is not None:
            self._write_budget(replace(budget, losses=moment.losses), steps, histograms)
        # A killed training, or a report on one that still runs, misses at most the interval in progress.
        self.writer.flush()

    def _forget_replaced(self, managers: Mapping[str, KVCacheManager]) -> None:
        """Let a manager that took another's place count from its own start."""
        for name, manager in managers.items():
            known = self._managers.get(name)
            if known is None or known() is not manager:
                # A weak reference: the sink must not keep the memory of a manager that was given up.
                self._managers[name] = weakref.ref(manager)
                for pool in POOLS_OF[name]:
                    self._previous.pop(pool, None)

    def _since_previous(self, readings: Mapping[str, PoolReading]) -> dict[str, CacheStats]:
        pools = {pool: reading.stats for pool, reading in readings.items() if pool != 'total'}
        since = {pool: interval(stats, self._previous.get(pool)) for pool, stats in pools.items()}
        self._previous = pools
        # Not the difference of two totals: one model's counters may have been reset and another's not.
        return {**since, 'total': sum(since.values(), CacheStats())}

    def _write_scalars(self, axis: Axis, pool: str, reading: PoolReading, step: int) -> None:
        values = reading.as_dict()
        for name in (*METRICS, *RANK_METRICS):
            if name in values and (name != 'hit_rate' or reading.stats.queries):
                self.writer.add_scalar(tag(axis, pool, name), values[name], step)

    def _write_histograms(self, axis: Axis, pool: str, since: CacheStats, step: int) -> None:
        for name in HISTOGRAMS:
            histogram: Log2Histogram = getattr(since, name)
            if histogram.total:
                self.writer.add_histogram_raw(
                    tag(axis, pool, name), **raw_histogram(histogram), global_step=step
                )

    def _write_validation(self, counters: ValidationCounters, steps: Mapping[Axis, int]) -> None:
        if counters.searches < self._validated.searches:  # of other models, which began anew
            self._validated = ValidationCounters()
        numbers = validation_numbers(counters.since(self._validated))
        self._validated = counters.snapshot()
        for axis, step in steps.items():
            for name, value in numbers.items():
                self.writer.add_scalar(tag(axis, VALIDATION, name), value, step)

    def _write_budget(self, snapshot: BudgetSnapshot, steps: Mapping[Axis, int], histograms: bool) -> None:
        numbers = layer_numbers(snapshot.since(self._budget))
        self._budget = snapshot
        for axis, step in steps.items():
            for layer, values in enumerate(numbers):
                for name, value in values.items():
                    self.writer.add_scalar(tag(axis, f'{LAYER_PREFIX}{layer}', name), value, step)
            for layer, drawn in enumerate(layer_histograms(snapshot) if histograms else ()):
                for name, arguments in drawn.items():
                    self.writer.add_histogram_raw(
                        tag(axis, f'{LAYER_PREFIX}{layer}', name), **arguments, global_step=step
                    )

    def _describe(self, *, ranks: bool, **sections: bool) -> None:
        self.writer.add_custom_scalars(dashboard_layout(**sections))
        self.writer.add_text('kv_cache/metrics', explanation(**sections, ranks=ranks), 0)
        self._described = True


def interval(now: CacheStats, previous: CacheStats | None) -> CacheStats:
    """Return what was counted since `previous`; all of `now` if there is none or a reset came between."""
    if previous is None:
        return now.snapshot()
    counters = [name for name, metric in METRICS.items() if metric.kind is Kind.COUNTER]
    if any(getattr(now, name) < getattr(previous, name) for name in counters):
        return now.snapshot()
    return now - previous


def raw_histogram(histogram: Log2Histogram) -> dict[str, Any]:
    """Return the arguments of `add_histogram_raw` for a histogram that holds at least one value.

    Bucket i goes to TensorBoard with its upper edge `limits[i]`. The first bucket that is drawn begins at
    `min` and the last ends at `max`, so both are edges of the buckets and not values. The two sums, which no
    chart shows, are those of the lower edges: the buckets do not hold the values themselves.

    Raises:
        ValueError: the histogram is empty.
    """
    filled = [bucket for bucket, count in enumerate(histogram.counts) if count]
    if not filled:
        raise ValueError('histogram must hold at least one value, got an empty one; leave its point out')
    upper = histogram.limits
    lower = [0, *upper[:-1]]
    pairs = list(zip(lower, histogram.counts, strict=True))
    return {
        'min': lower[filled[0]],
        'max': upper[filled[-1]],
        'num': histogram.total,
        'sum': sum(edge * count for edge, count in pairs),
        'sum_squares': sum(edge * edge * count for edge, count in pairs),
        'bucket_limits': upper,
        'bucket_counts': histogram.counts,
    }


def _step(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f'{name} must be an integer, got {type(value).__name__}; count it from the start of the training'
        )
    if value < 0:
        raise ValueError(f'{name} must be 0 or more, got {value}; count it from the start of the training')
    return int(value)
