"""Reads the charts back from TensorBoard event files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing import event_accumulator as events

from lzero_kv.telemetry.metrics import (
    BUDGET_METRICS,
    METRICS,
    POOLS,
    RANK_METRICS,
    SPEED,
    SPEED_METRICS,
    VALIDATION,
    VALIDATION_METRICS,
    Kind,
    Metric,
    TagName,
    layer_of,
    parse_tag,
    with_ratios,
)

EVENT_FILES = 'events.out.tfevents.*'


@dataclass(frozen=True)
class Series:
    """One chart: `steps` int64 [points] ascending, `values` float64 [points], `wall_times` float64 [points]
    in seconds.
    """

    steps: np.ndarray
    values: np.ndarray
    wall_times: np.ndarray


@dataclass(frozen=True)
class HistogramPoint:
    """The histogram of one point: bucket i holds `counts[i]` values v with `limits[i-1] <= v < limits[i]`."""

    step: int
    limits: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True, eq=False)  # arrays have no equality of one bit
class RunLog:
    """The cache's part of a log.

    Attributes:
        folder: of the event files.
        file: the one of them that was read; None where all were.
    """

    folder: Path
    scalars: dict[TagName, Series]
    histograms: dict[TagName, tuple[HistogramPoint, ...]]
    file: Path | None = None

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools with at least one chart, in the order of POOLS."""
        present = {name.pool for name in self.scalars}
        return tuple(pool for pool in POOLS if pool in present)

    @property
    def begun(self) -> float:
        """Time of the first point, seconds of the epoch."""
        return min(float(series.wall_times[0]) for series in self.scalars.values())

    def series(self, pool: str, metric: str) -> Series | None:
        """Return a chart, or None when the pool did not report it."""
        return self.scalars.get(TagName(pool, metric))

    def totals(self) -> dict[str, dict[str, float]]:
        """Return the whole run: counters added up over all points, ratios of those sums, gauges at the last
        point.
        """
        return {pool: with_ratios(self._sums(pool, METRICS | RANK_METRICS)) for pool in self.pools}

    def last(self) -> dict[str, dict[str, float]]:
        """Return the last point of every pool; a metric without a value there (hit_rate without queries) is
        left out.
        """
        summary: dict[str, dict[str, float]] = {}
        for pool in self.pools:
            found = {name: self.series(pool, name) for name in METRICS | RANK_METRICS}
            charts = {name: series for name, series in found.items() if series is not None}
            end = max((series.steps[-1] for series in charts.values()), default=0)
            summary[pool] = {
                name: float(series.values[-1]) for name, series in charts.items() if series.steps[-1] == end
            }
        return summary

    def speed(self, *, last: bool = False) -> dict[str, float]:
        """Return the times and rates of the whole run, or of its last point, by metric: counters added up,
        ratios of those sums. Empty where the log has none.
        """
        counters = {name: metric for name, metric in SPEED_METRICS.items() if metric.kind is Kind.COUNTER}
        return with_ratios(self._sums(SPEED, counters, last=last))

    def validation(self) -> dict[str, float]:
        """Return the validation of the whole run by metric, empty where it was off: counters added up, means
        weighted by the rows of each point, the largest differences at the last point.
        """
        numbers = self._sums(VALIDATION, VALIDATION_METRICS)
        for name in ('policy', 'value'):
            series, rows = self.series(VALIDATION, f'{name}_moved'), self.series(VALIDATION, f'{name}_rows')
            if series is not None and rows is not None:
                weight = dict(zip(rows.steps.tolist(), rows.values.tolist(), strict=True))
                weights = [weight[step] for step in series.steps.tolist()]
                numbers[f'{name}_moved'] = float(np.average(series.values, weights=weights))
        return numbers

    def layers(self) -> dict[int, dict[str, float]]:
        """Return the layer budgets by layer and metric, empty where there were none: counters added up over
        the whole run, the mean of lost attention over its points, anything else at the last point.
        """
        sections = {layer_of(name.pool): name.pool for name in self.scalars}
        found = {}
        for layer in sorted(layer for layer in sections if layer is not None):
            found[layer] = self._sums(sections[layer], BUDGET_METRICS)
            if (lost := self.series(sections[layer], 'lost_mass')) is not None:
                found[layer]['lost_mass'] = float(lost.values.mean())
        return found

    def _sums(self, section: str, metrics: Mapping[str, Metric], *, last: bool = False) -> dict[str, float]:
        """Counters of a section, added up or at their last point, and gauges at their last point."""
        charts = {
            name: self.series(section, name) for name in metrics if metrics[name].kind is not Kind.RATIO
        }
        summed = {name for name in charts if metrics[name].kind is Kind.COUNTER and not last}
        return {
            name: float(series.values.sum() if name in summed else series.values[-1])
            for name, series in charts.items()
            if series is not None
        }

    @property
    def ranks(self) -> int:
        """Processes that the numbers stand for."""
        series = self.series('total', 'ranks')
        return 1 if series is None else int(series.values[-1])

    @property
    def last_step(self) -> int:
        """Environment steps at the last point."""
        return max((int(series.steps[-1]) for series in self.scalars.values()), default=0)

    @property
    def train_iterations(self) -> int:
        """Training iterations at the last point."""
        series = self.series(SPEED, 'train_iterations')
        return 0 if series is None else int(series.values[-1])


def find_runs(logdir: Path) -> list[Path]:
    """Return every folder at or below `logdir` that holds event files, sorted.

    `logdir` may be an experiment folder of LightZero, its `log` or `log/serial`, or a folder of many
    experiments.

    Raises:
        ValueError: there is no such folder, or no event file in it.
    """
    if not logdir.is_dir():
        raise ValueError(
            f'{logdir} is not a folder; give the experiment folder (exp_name) that LightZero wrote'
        )
    folders = sorted({path.parent for path in logdir.rglob(EVENT_FILES)})
    if not folders:
        raise ValueError(
            f'no TensorBoard event file in {logdir} or below; give the experiment folder (exp_name) that '
            'LightZero wrote: its log is in <exp_name>/log/serial, and a time is appended to exp_name when '
            'that folder exists already'
        )
    return folders


def runs_in(folder: Path) -> list[RunLog]:
    """The runs that wrote charts of the cache into one folder, the oldest first: one for each event file.

    A resumed training writes a file of its own beside the first one's, about steps that the first may have
    passed already. Their counters are never added up. Where no file has such a chart there is one empty run.
    """
    logs = [read_run(path) for path in sorted(folder.glob(EVENT_FILES))]
    found = [log for log in logs if log.pools]
    return sorted(found, key=lambda log: log.begun) or [RunLog(folder, {}, {})]


def read_run(path: Path) -> RunLog:
    """Read the charts of the cache from one event file, or from all of a folder as if one run had written
    them (:func:`runs_in` keeps runs apart); other tags of the log are left out."""
    accumulator = events.EventAccumulator(
        str(path), size_guidance=dict.fromkeys(events.DEFAULT_SIZE_GUIDANCE, 0)
    )
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {}
    for text, name in _own(tags['scalars']):
        points = sorted(accumulator.Scalars(text), key=lambda point: point.step)
        scalars[name] = Series(
            steps=np.array([point.step for point in points], dtype=np.int64),
            values=np.array([point.value for point in points], dtype=np.float64),
            wall_times=np.array([point.wall_time for point in points], dtype=np.float64),
        )
    histograms = {}
    for text, name in _own(tags['histograms']):
        histograms[name] = tuple(
            HistogramPoint(
                point.step, tuple(point.histogram_value.bucket_limit), tuple(point.histogram_value.bucket)
            )
            for point in accumulator.Histograms(text)
        )
    if path.is_dir():
        return RunLog(path, scalars, histograms)
    return RunLog(path.parent, scalars, histograms, path)


def _own(tags: Iterable[str]) -> list[tuple[str, TagName]]:
    parsed = ((text, parse_tag(text)) for text in tags)
    return [(text, name) for text, name in parsed if name is not None]
