"""Writes what the pools counted into the TensorBoard log the host already keeps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lzero_kv.budget import BudgetSnapshot
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.stats import CacheStats, Log2Histogram
from lzero_kv.telemetry.counters import Timings, ValidationCounters
from lzero_kv.telemetry.metrics import (
    BUDGET_CHARTS,
    BUDGET_HISTOGRAMS,
    BUDGET_METRICS,
    CHARTS,
    HISTOGRAMS,
    LAYER_PREFIX,
    METRICS,
    POOLS,
    PREFIX,
    RANK_METRICS,
    SPEED,
    SPEED_CHARTS,
    SPEED_METRICS,
    VALIDATION,
    VALIDATION_CHARTS,
    VALIDATION_METRICS,
    Chart,
    Kind,
    Metric,
    metric_of,
    tag,
    with_ratios,
)
from lzero_kv.telemetry.reading import (
    Moment,
    PoolReading,
    layer_histograms,
    layer_numbers,
    raw_histogram,
    validation_numbers,
)
from lzero_kv.telemetry.table import markdown_table

MOVING, ROOTS, STEADY = 'KV cache', 'KV cache: roots', 'KV cache: constant in a healthy training'
NOW, SINCE = 'at this moment', 'since the previous point'
POOLS_OF = {'acting': ('roots', 'nodes'), 'reanalysis': ('reanalysis',)}


class TensorBoardSink:
    """One chart per pool and metric over environment steps; a point at every `write`.

    Counters (queries, stores, computed_tokens, ...) hold the difference since the previous point, so that a
    change in behaviour shows where it happens; the first point counts from the start. Ratios (hit_rate,
    saved_tokens) are those of the same interval and have no point where nothing was counted.
    Gauges (entries, occupancy, bytes) hold the present value. Histograms hold the interval's values.
    TensorBoard keeps values as float32: above 16,777,216 a count is rounded.

    A manager that takes another's place between two points counts from its own start. After a `reset_stats`
    the interval counts from the reset: it shows by a counter that went down; when every counter has passed
    its old value again by the next point, the interval is counted too low.

    Where validation is on, the section `validation` follows the same rules: counters and the two means are of
    the interval (a mean has no point where nothing moved), the largest differences those so far.

    Where there are layer budgets, each layer has its own: gauges and the present averages of its preference,
    counters and the mean of lost attention of the interval, and which places its roots hold at this moment.

    Times and rates (SPEED_METRICS) follow the same rules; environment steps per second begin with the second
    point. The layout of the Custom Scalars page and a text with the configuration and the meaning of each
    metric are written at the first point, and the first point of each chart carries its meaning.

    Args:
        writer: the host's `torch.utils.tensorboard.SummaryWriter` or `tensorboardX.SummaryWriter`. The sink
            never closes it.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self._previous: dict[str, CacheStats] = {}
        self._managers: dict[str, weakref.ref[KVCacheManager]] = {}
        self._validated = ValidationCounters()
        self._budget: BudgetSnapshot | None = None
        self._timings = Timings()
        self._latest: tuple[int, float] | None = None
        self._described: set[str] = set()

    def write(
        self,
        managers: Mapping[str, KVCacheManager],
        env_step: int,
        train_iter: int,
        validation: ValidationCounters | None = None,
        budget: BudgetSnapshot | None = None,
        others: Sequence[Moment] = (),
        timings: Timings | None = None,
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
            timings: what the acting model counted since the start of the training.
        """
        moment = Moment.of(managers, validation, budget, timings).with_ranks(others)
        readings, validation = moment.pools, moment.validation
        if not readings:
            return
        if not self._described:
            sections = dict(validation=validation is not None, budget=budget is not None)
            self.writer.add_custom_scalars(dashboard_layout(**sections))
            choices = managers['acting'].cache_config.model_dump()
            text = explanation(choices=choices, ranks=bool(others), **sections)
            self.writer.add_text('kv_cache/metrics', text, 0)
        histograms = managers['acting'].cache_config.histograms
        self._write_speed(moment.timings, env_step, train_iter)
        self._forget_replaced(managers)
        since = self._since_previous(readings)
        for pool, reading in readings.items():
            self._write_pool(pool, reading.with_stats(since[pool]), env_step)
            if histograms:
                self._write_histograms(pool, since[pool], env_step)
        if validation is not None:
            self._write_validation(validation, env_step)
        if budget is not None:
            self._write_budget(replace(budget, losses=moment.losses), env_step, histograms)
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

    def _write_numbers(self, pool: str, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            text = tag(pool, name)
            if text in self._described:
                self.writer.add_scalar(text, value, step)
            else:
                self._described.add(text)
                _add_described(self.writer, text, value, step, metric_of(pool, name).sentence)

    def _write_speed(self, timings: Timings, step: int, iteration: int) -> None:
        if timings.searches < self._timings.searches:  # of another model, which began anew
            self._timings = Timings()
        counters = dict(vars(timings.since(self._timings))) if timings.root_inferences else {}
        self._timings, now = timings.snapshot(), time.perf_counter()
        if self._latest is not None:
            counters |= {'env_steps': step - self._latest[0], 'seconds': now - self._latest[1]}
        self._latest = step, now
        self._write_numbers(SPEED, {**with_ratios(counters), 'train_iterations': iteration}, step)

    def _write_pool(self, pool: str, reading: PoolReading, step: int) -> None:
        counted = {name: metric for name, metric in METRICS.items() if metric.kind is not Kind.RATIO}
        values = reading.as_dict()
        numbers = {name: values[name] for name in (*counted, *RANK_METRICS) if name in values}
        self._write_numbers(pool, with_ratios(numbers), step)

    def _write_histograms(self, pool: str, since: CacheStats, step: int) -> None:
        for name in HISTOGRAMS:
            histogram: Log2Histogram = getattr(since, name)
            if histogram.total:
                drawn = raw_histogram(histogram.limits, histogram.counts)
                self.writer.add_histogram_raw(tag(pool, name), **drawn, global_step=step)

    def _write_validation(self, counters: ValidationCounters, step: int) -> None:
        if counters.searches < self._validated.searches:  # of other models, which began anew
            self._validated = ValidationCounters()
        self._write_numbers(VALIDATION, validation_numbers(counters.since(self._validated)), step)
        self._validated = counters.snapshot()

    def _write_budget(self, snapshot: BudgetSnapshot, step: int, histograms: bool) -> None:
        numbers = layer_numbers(snapshot.since(self._budget))
        self._budget = snapshot
        for layer, values in enumerate(numbers):
            self._write_numbers(f'{LAYER_PREFIX}{layer}', values, step)
        for layer, drawn in enumerate(layer_histograms(snapshot) if histograms else ()):
            for name, arguments in drawn.items():
                self.writer.add_histogram_raw(
                    tag(f'{LAYER_PREFIX}{layer}', name), **arguments, global_step=step
                )


def _add_described(writer: Any, text: str, value: float, step: int, meaning: str) -> None:
    """Write a point that carries the description of its chart, which TensorBoard shows on the card.

    tensorboardX writes descriptions that TensorBoard's reader warns of; it gets none.
    """
    from tensorboard.compat.proto import summary_pb2
    from torch.utils.tensorboard import SummaryWriter as TorchWriter

    if not isinstance(writer, TorchWriter):
        writer.add_scalar(text, value, step)
        return
    proto: Any = summary_pb2  # its classes are made at import
    plugin = proto.SummaryMetadata.PluginData(plugin_name='scalars')
    metadata = proto.SummaryMetadata(summary_description=meaning, plugin_data=plugin)
    point = proto.Summary.Value(tag=text, simple_value=float(value), metadata=metadata)
    file_writer: Any = writer.file_writer
    file_writer.add_summary(proto.Summary(value=[point]), step)


def interval(now: CacheStats, previous: CacheStats | None) -> CacheStats:
    """Return what was counted since `previous`; all of `now` if there is none or a reset came between."""
    if previous is None:
        return now.snapshot()
    counters = [name for name, metric in METRICS.items() if metric.kind is Kind.COUNTER]
    if any(getattr(now, name) < getattr(previous, name) for name in counters):
        return now.snapshot()
    return now - previous


def dashboard_layout(*, validation: bool = False, budget: bool = False) -> dict[str, dict[str, list[object]]]:
    """Return the layout of the Custom Scalars page, as `SummaryWriter.add_custom_scalars` takes it: what
    moves first; roots, and what is constant in a healthy training, in groups of their own. TensorBoard
    colours runs, not tags, so nodes and roots share no chart that moves.

    Args:
        validation: whether the charts of the validation follow those of the pools.
        budget: whether those of the layer budgets do.

    TensorBoard matches an entry as a regular expression against the beginning of a tag. One closed expression
    per chart draws whichever pools report, and a pool that never reports is no missing tag.
    """
    charts = (*SPEED_CHARTS, *CHARTS, *(VALIDATION_CHARTS if validation else ()))
    headings = {chart.heading: chart for chart in charts}
    headings |= {chart.title: chart for chart in BUDGET_CHARTS if budget}
    layout: dict[str, dict[str, list[object]]] = {MOVING: {}, ROOTS: {}, STEADY: {}}
    for heading, chart in headings.items():
        sections = chart.sections
        if 'roots' in sections and not chart.steady:
            layout[ROOTS][f'roots: {heading}'] = _lines(chart, ('roots',))
            whole = 'total' in sections
            sections = ('total',) if whole else tuple(name for name in sections if name != 'roots')
            heading = f'{"all" if whole else "nodes"}: {heading}'
        layout[STEADY if chart.steady else MOVING][heading] = _lines(chart, sections)
    return layout


def _lines(chart: Chart, sections: Sequence[str]) -> list[object]:
    return ['Multiline', [f'{PREFIX}/{_any(sections)}/{_any(chart.metrics)}$']]


def _any(names: Sequence[str]) -> str:
    return f'({"|".join(names)})' if len(names) > 1 else names[0]


def explanation(
    *, choices: Mapping[str, object], validation: bool = False, budget: bool = False, ranks: bool = False
) -> str:
    """Return Markdown tables: the configuration of the cache (``choices``), what each metric, pool and
    histogram means, and, with `validation` or `budget`, further metrics. With `ranks` RANK_METRICS too.
    """
    speed = [*SPEED_METRICS.values(), *METRICS.values(), *(RANK_METRICS.values() if ranks else ())]
    tables: list[list[Sequence[str]]] = [
        [('option of kv_cache', 'value'), *((name, str(value)) for name, value in choices.items())],
        [*_meanings('metric', speed), *_drawn(HISTOGRAMS, SINCE)],
        [('pool', 'meaning'), *POOLS.items()],
    ]
    if validation:
        tables.append(_meanings(VALIDATION, VALIDATION_METRICS.values()))
    if budget:
        tables.append([*_meanings('each layer', BUDGET_METRICS.values()), *_drawn(BUDGET_HISTOGRAMS, NOW)])
    return '\n\n'.join(map(markdown_table, tables))


def _meanings(name: str, metrics: Iterable[Metric]) -> list[Sequence[str]]:
    rows = [(m.name, m.unit.value, NOW if m.kind is Kind.GAUGE else SINCE, m.sentence) for m in metrics]
    return [(name, 'unit', 'value', 'meaning'), *rows]


def _drawn(histograms: Mapping[str, str], when: str) -> list[Sequence[str]]:
    return [(name, 'histogram', when, text) for name, text in histograms.items()]
