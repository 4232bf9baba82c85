"""The one home of metric names, pool names, tags and the dashboard layout.

A tag is `<axis>/<pool>/<metric>`: `kv_cache_step/roots/hit_rate` is the hit rate of the root pools over
environment steps, `kv_cache_iter/roots/hit_rate` the same numbers over training iterations. The two axes are
separate tags because TensorBoard draws a tag against one step only; LightZero's own charts follow the same
habit (`collector_step`, `collector_iter`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Axis(Enum):
    """What a chart's horizontal axis counts; the value is the first part of the tag."""

    ENV_STEP = 'kv_cache_step'
    TRAIN_ITER = 'kv_cache_iter'


class Kind(Enum):
    """How a metric behaves between two points of a chart."""

    COUNTER = 'counter'  # a point holds what happened since the previous point
    GAUGE = 'gauge'  # a point holds the value at that moment
    RATIO = 'ratio'  # a point holds a quotient of two counters of the same interval


class Unit(Enum):
    """What a number counts; decides how the table and the plot print it."""

    COUNT = 'count'
    TOKENS = 'tokens'
    ENTRIES = 'entries'
    FRACTION = 'fraction'
    BYTES = 'bytes'


@dataclass(frozen=True)
class Metric:
    """One row of the table and one chart of each pool."""

    name: str
    kind: Kind
    unit: Unit
    sentence: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            'queries',
            Kind.COUNTER,
            Unit.COUNT,
            "Lookups of a history's KV; a root and its fallback count once.",
        ),
        Metric('hits', Kind.COUNTER, Unit.COUNT, 'Queries whose KV was in the pool.'),
        Metric('misses', Kind.COUNTER, Unit.COUNT, 'Queries whose KV was not in the pool.'),
        Metric(
            'hit_rate',
            Kind.RATIO,
            Unit.FRACTION,
            'Hits divided by queries; no point where nothing was queried.',
        ),
        Metric('stores', Kind.COUNTER, Unit.COUNT, 'Histories whose KV was written into the pool.'),
        Metric(
            'overwrites',
            Kind.COUNTER,
            Unit.COUNT,
            'Stores that renewed the slot of a key already in the pool.',
        ),
        Metric(
            'evictions',
            Kind.COUNTER,
            Unit.ENTRIES,
            'Entries removed by the policy because the pool was full.',
        ),
        Metric(
            'rebuilt_tokens',
            Kind.COUNTER,
            Unit.TOKENS,
            'Tokens whose KV was computed again after a miss.',
        ),
        Metric(
            'window_tokens',
            Kind.COUNTER,
            Unit.TOKENS,
            'Tokens whose KV was computed again because a full window dropped its oldest step.',
        ),
        Metric('entries', Kind.GAUGE, Unit.ENTRIES, 'Histories held at this moment.'),
        Metric('occupancy', Kind.GAUGE, Unit.FRACTION, 'Entries divided by the capacity of the pool.'),
        Metric('bytes', Kind.GAUGE, Unit.BYTES, 'Memory allocated for the tensors of the pool.'),
    )
}

POOLS: dict[str, str] = {
    'roots': 'The root pools of all environments of the acting model.',
    'nodes': 'The recurrent pool of the acting model: nodes below the roots of the running search.',
    'reanalysis': 'All pools of the target model, which searches again for reanalysis.',
    'total': 'All of the above together.',
}

HISTOGRAMS: dict[str, str] = {
    'lifetime': "Stores of the pool between an entry's store and its removal.",
    'reuse_distance': 'Queries of the pool between two accesses of an entry.',
}

LAYOUT_TITLES: dict[Axis, str] = {
    Axis.ENV_STEP: 'KV cache by environment step',
    Axis.TRAIN_ITER: 'KV cache by training iteration',
}


@dataclass(frozen=True)
class Chart:
    """One chart of the dashboard and one panel of the report's plot: a metric of some pools."""

    title: str
    metric: str
    pools: tuple[str, ...] = ('roots', 'nodes', 'reanalysis')

    @property
    def heading(self) -> str:
        """The title, with what a point of a counter counts."""
        counter = METRICS[self.metric].kind is Kind.COUNTER
        return f'{self.title} since the previous point' if counter else self.title


CHARTS = (
    Chart('hit rate', 'hit_rate'),
    Chart('rebuilt tokens', 'rebuilt_tokens'),
    Chart('tokens of moved windows', 'window_tokens'),
    Chart('evictions', 'evictions'),
    Chart('occupancy', 'occupancy'),
    Chart('memory in bytes', 'bytes', ('roots', 'nodes', 'reanalysis', 'total')),
)
"""In the order in which the dashboard and the plot show them."""


class TagName(NamedTuple):
    """A tag taken apart; `metric` is a name of METRICS or of HISTOGRAMS."""

    axis: Axis
    pool: str
    metric: str


def tag(axis: Axis, pool: str, metric: str) -> str:
    """Return the tag of a scalar or a histogram.

    Raises:
        ValueError: the pool or the metric has no entry in POOLS, METRICS or HISTOGRAMS.
    """
    if pool not in POOLS:
        raise ValueError(
            f'pool must be one of {", ".join(POOLS)}, got {pool!r}; add it to POOLS to report it'
        )
    if metric not in METRICS and metric not in HISTOGRAMS:
        known = ', '.join((*METRICS, *HISTOGRAMS))
        raise ValueError(f'metric must be one of {known}, got {metric!r}; add it to METRICS to report it')
    return f'{axis.value}/{pool}/{metric}'


def parse_tag(text: str) -> TagName | None:
    """Return the parts of a tag written by this library, or None for any other tag of the log."""
    parts = text.split('/')
    if len(parts) != 3 or parts[0] not in {axis.value for axis in Axis} or parts[1] not in POOLS:
        return None
    if parts[2] not in METRICS and parts[2] not in HISTOGRAMS:
        return None
    return TagName(Axis(parts[0]), parts[1], parts[2])


def dashboard_layout() -> dict[str, dict[str, list[object]]]:
    """Return the layout of the Custom Scalars page, as `SummaryWriter.add_custom_scalars` takes it.

    TensorBoard matches an entry as a regular expression against the beginning of a tag. One closed expression
    per chart draws whichever pools report, and a pool that never reports is no missing tag.
    """
    return {
        title: {
            chart.heading: ['Multiline', [f'{axis.value}/({"|".join(chart.pools)})/{chart.metric}$']]
            for chart in CHARTS
        }
        for axis, title in LAYOUT_TITLES.items()
    }


def explanation() -> str:
    """Return a Markdown table that says what each metric, pool and histogram means."""
    kinds = {
        Kind.COUNTER: 'since the previous point',
        Kind.GAUGE: 'at this moment',
        Kind.RATIO: 'since the previous point',
    }
    lines = ['| metric | unit | value | meaning |', '|---|---|---|---|']
    lines += [f'| {m.name} | {m.unit.value} | {kinds[m.kind]} | {m.sentence} |' for m in METRICS.values()]
    lines += [
        f'| {name} | histogram | since the previous point | {text} |' for name, text in HISTOGRAMS.items()
    ]
    lines += ['', '| pool | meaning |', '|---|---|']
    lines += [f'| {name} | {text} |' for name, text in POOLS.items()]
    return '\n'.join(lines)
