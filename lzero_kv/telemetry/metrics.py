"""The one home of metric names, pool names, tags and charts.

A tag is `kv_cache_step/<pool>/<metric>`: `kv_cache_step/roots/hit_rate` is the hit rate of the root pools
over environment steps. `kv_cache_step/speed/<metric>` has times and rates. Where validation is on,
`kv_cache_step/validation/<metric>` stands beside the pools, and where layer budgets are,
`kv_cache_step/layer_0/<metric>` for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from lzero_kv.telemetry.counters import Cause, Fault

PREFIX = 'kv_cache_step'
"""First part of each tag: points are over environment steps, as LightZero's own ``collector_step/...``."""


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
    MILLISECONDS = 'ms'
    SECONDS = 's'
    RATE = '1/s'
    DIFFERENCE = 'difference'  # of keys, values, latents or predictions; no fixed number of digits fits


@dataclass(frozen=True)
class Metric:
    """One row of the table and one chart of each pool."""

    name: str
    kind: Kind
    unit: Unit
    sentence: str


def named(*metrics: Metric) -> dict[str, Metric]:
    """The metrics by their names."""
    return {metric.name: metric for metric in metrics}


METRICS = named(
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
        'saved_tokens',
        Kind.RATIO,
        Unit.FRACTION,
        'Served tokens as a part of all that a pass without a cache would compute.',
    ),
    Metric(
        'computed_tokens',
        Kind.COUNTER,
        Unit.TOKENS,
        'Tokens whose KV was computed: new ones, windows that moved, rebuilt ones.',
    ),
    Metric(
        'served_tokens',
        Kind.COUNTER,
        Unit.TOKENS,
        'Tokens of the histories behind them whose KV was there.',
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
        'Tokens of derived windows, computed when a node was first expanded, and of roots that moved.',
    ),
    Metric('entries', Kind.GAUGE, Unit.ENTRIES, 'Histories held at this moment.'),
    Metric('occupancy', Kind.GAUGE, Unit.FRACTION, 'Entries divided by the capacity of the pool.'),
    Metric('bytes', Kind.GAUGE, Unit.BYTES, 'Memory allocated for the tensors of the pool.'),
)

RANK_METRICS = named(
    Metric(
        'ranks',
        Kind.GAUGE,
        Unit.COUNT,
        'Processes: counters, entries and bytes are their sums, occupancy is the largest.',
    ),
    Metric('most_bytes', Kind.GAUGE, Unit.BYTES, 'The bytes of the process that has most.'),
)
"""Beside METRICS where the numbers stand for several processes."""

SPEED = 'speed'
"""Stands in a tag in the place of the pool: times and rates of the acting model, on the wall."""

SPEED_METRICS = named(
    Metric(
        'env_steps_per_second',
        Kind.RATIO,
        Unit.RATE,
        'Environment steps by all seconds since the previous point: collection, learning, evaluation.',
    ),
    Metric(
        'simulations_per_second',
        Kind.RATIO,
        Unit.RATE,
        'Simulations of all rows by the seconds of the searches, in one process.',
    ),
    Metric(
        'search_ms',
        Kind.RATIO,
        Unit.MILLISECONDS,
        'Mean time of a search of one batch of environments. A search waits for its answers: true on a '
        'GPU too.',
    ),
    Metric(
        'root_inference_ms',
        Kind.RATIO,
        Unit.MILLISECONDS,
        'Mean time of a root inference of one batch. On a GPU without the heads and stores that are '
        'still queued when it returns.',
    ),
    Metric(
        'planning_share',
        Kind.RATIO,
        Unit.FRACTION,
        'Part of the seconds of collection that searches and root inferences took.',
    ),
    Metric('train_iterations', Kind.GAUGE, Unit.COUNT, 'Training iterations so far.'),
    Metric('env_steps', Kind.COUNTER, Unit.COUNT, 'Environment steps in `seconds`.'),
    Metric('seconds', Kind.COUNTER, Unit.SECONDS, 'All seconds since the previous point.'),
    Metric('searches', Kind.COUNTER, Unit.COUNT, 'Searches of a batch of environments.'),
    Metric('simulations', Kind.COUNTER, Unit.COUNT, 'Simulations of all rows of the searches.'),
    Metric('search_seconds', Kind.COUNTER, Unit.SECONDS, 'Seconds of the searches.'),
    Metric('root_inferences', Kind.COUNTER, Unit.COUNT, 'Root inferences of a batch of environments.'),
    Metric('root_seconds', Kind.COUNTER, Unit.SECONDS, 'Seconds of the root inferences.'),
    Metric('collect_seconds', Kind.COUNTER, Unit.SECONDS, 'Seconds of collection.'),
    Metric(
        'planning_seconds',
        Kind.COUNTER,
        Unit.SECONDS,
        'Seconds of searches and root inferences in collection.',
    ),
)

SPEED_QUOTIENTS: dict[str, tuple[str, str, float]] = {
    'env_steps_per_second': ('env_steps', 'seconds', 1),
    'simulations_per_second': ('simulations', 'search_seconds', 1),
    'search_ms': ('search_seconds', 'searches', 1000),
    'root_inference_ms': ('root_seconds', 'root_inferences', 1000),
    'planning_share': ('planning_seconds', 'collect_seconds', 1),
}
"""Each ratio of SPEED_METRICS: a counter by a counter, and the factor of its unit."""


def speed_numbers(counters: Mapping[str, float]) -> dict[str, float]:
    """The metrics of SPEED_METRICS from its counters; a ratio is left out where nothing was counted."""
    ratios = {
        name: factor * counters[above] / counters[below]
        for name, (above, below, factor) in SPEED_QUOTIENTS.items()
        if counters.get(below)
    }
    return {**ratios, **counters}


POOLS: dict[str, str] = {
    'roots': 'The root pools of all environments of the acting model.',
    'nodes': 'The recurrent pool of the acting model: derived windows of the running search.',
    'reanalysis': 'All pools of the target model, which searches again for reanalysis.',
    'total': 'All of the above together.',
}

VALIDATION = 'validation'
"""Stands in a tag in the place of the pool: both caches side by side, all kinds of inference together."""

CAUSE_PREFIX, FAULT_PREFIX = 'cause_', 'fault_'

VALIDATION_METRICS = named(
    Metric('searches', Kind.COUNTER, Unit.COUNT, 'Searches begun.'),
    Metric('validated', Kind.COUNTER, Unit.COUNT, 'Searches whose nodes were compared.'),
    Metric('compared', Kind.COUNTER, Unit.COUNT, 'Rows of inferences that were compared.'),
    Metric('equal', Kind.COUNTER, Unit.COUNT, 'Rows in which both caches gave the same.'),
    Metric(
        'different',
        Kind.COUNTER,
        Unit.COUNT,
        'Rows in which the stock cache was wrong, for a proven cause, and the cache right.',
    ),
    Metric('unexplained', Kind.COUNTER, Unit.COUNT, 'Differences without a proven cause: must be 0.'),
    Metric('cache_wrong', Kind.COUNTER, Unit.COUNT, 'Rows in which the cache was wrong: must be 0.'),
    *(
        Metric(f'{CAUSE_PREFIX}{cause.value}', Kind.COUNTER, Unit.COUNT, f'Different: {cause.sentence}.')
        for cause in Cause
    ),
    *(
        Metric(f'{FAULT_PREFIX}{fault.value}', Kind.COUNTER, Unit.COUNT, f'Cache wrong: {fault.sentence}.')
        for fault in Fault
    ),
    Metric(
        'largest_stock',
        Kind.GAUGE,
        Unit.DIFFERENCE,
        'Largest difference of the stock cache from the recomputation so far.',
    ),
    Metric(
        'largest_cache',
        Kind.GAUGE,
        Unit.DIFFERENCE,
        'Largest difference of the cache from the recomputation so far: rounding, where it is right.',
    ),
    Metric(
        'policy_rows', Kind.COUNTER, Unit.COUNT, 'Differences of which is known how far the policy moved.'
    ),
    Metric(
        'policy_moved',
        Kind.RATIO,
        Unit.DIFFERENCE,
        'Mean total variation distance of the stock policy from the right one, over those rows.',
    ),
    Metric('policy_moved_most', Kind.GAUGE, Unit.DIFFERENCE, 'The largest of those distances so far.'),
    Metric('value_rows', Kind.COUNTER, Unit.COUNT, 'Differences of which is known how far the value moved.'),
    Metric(
        'value_moved',
        Kind.RATIO,
        Unit.DIFFERENCE,
        'Mean absolute difference of the stock value from the right one, over those rows.',
    ),
    Metric('value_moved_most', Kind.GAUGE, Unit.DIFFERENCE, 'The largest of those differences so far.'),
)
"""A fault has a chart only where it happened: such a chart is an alarm."""

HISTOGRAMS: dict[str, str] = {
    'lifetime': "Stores of the pool between an entry's store and its removal.",
    'reuse_distance': 'Queries of the pool between two accesses of an entry.',
}


@dataclass(frozen=True)
class Chart:
    """One chart of the dashboard and one panel of the report's plot: a metric of some pools.

    Attributes:
        title: what is drawn, with its unit.
        metric: a name of METRICS.
        pools: one line each.
        steady: whether the chart is constant in a healthy training.
    """

    title: str
    metric: str
    pools: tuple[str, ...] = ('roots', 'nodes', 'reanalysis')
    steady: bool = False

    @property
    def heading(self) -> str:
        """The title, with what a point of a counter counts."""
        counter = METRICS[self.metric].kind is Kind.COUNTER
        return f'{self.title} since the previous point' if counter else self.title


CHARTS = (
    Chart('tokens saved, part of all', 'saved_tokens'),
    Chart('hit rate', 'hit_rate'),
    Chart('memory in bytes', 'bytes', ('roots', 'nodes', 'reanalysis', 'total')),
    Chart('computed tokens', 'computed_tokens'),
    Chart('served tokens', 'served_tokens'),
    Chart('tokens of moved windows', 'window_tokens'),
    Chart('occupancy, part of the capacity', 'occupancy'),
    Chart('rebuilt tokens', 'rebuilt_tokens', steady=True),
    Chart('evictions, entries', 'evictions', steady=True),
)
"""In the order in which the dashboard and the plot show them, behind SPEED_CHARTS."""


@dataclass(frozen=True)
class LinesChart:
    """One chart of the dashboard and one panel of the plot: metrics of the validation or of speed.

    Attributes:
        title: what is drawn.
        metrics: names of VALIDATION_METRICS or of SPEED_METRICS, one line each.
        logarithmic: the plot's vertical axis; differences lie many powers of ten apart.
        section: where the metrics stand in a tag.
        steady: whether the chart is constant in a healthy training.
    """

    title: str
    metrics: tuple[str, ...]
    logarithmic: bool = False
    section: str = VALIDATION
    steady: bool = False

    @property
    def heading(self) -> str:
        """The title, with what a point of a counter counts."""
        counters = all(self.metric(name).kind is Kind.COUNTER for name in self.metrics)
        return f'{self.title} since the previous point' if counters else self.title

    def metric(self, name: str) -> Metric:
        """The metric of this name."""
        return metric_of(self.section, name)


SPEED_CHARTS = (
    LinesChart('environment steps per second', ('env_steps_per_second',), section=SPEED),
    LinesChart('simulations per second', ('simulations_per_second',), section=SPEED),
    LinesChart(
        'time of a search and of a root inference in ms', ('search_ms', 'root_inference_ms'), section=SPEED
    ),
    LinesChart('share of collection that is planning', ('planning_share',), section=SPEED),
)
"""What the dashboard and the plot open with."""


VALIDATION_CHARTS = (
    LinesChart('validation: rows compared', ('compared', 'equal', 'different')),
    LinesChart('validation: failures, which must stay 0,', ('unexplained', 'cache_wrong'), steady=True),
    LinesChart('validation: differences by cause', tuple(f'{CAUSE_PREFIX}{c.value}' for c in Cause)),
    LinesChart(
        'validation: largest difference from the recomputation so far',
        ('largest_stock', 'largest_cache'),
        logarithmic=True,
    ),
    LinesChart(
        'validation: policy and value moved, mean of the differences', ('policy_moved', 'value_moved')
    ),
)
"""Shown below CHARTS where validation is on."""


LAYER_PREFIX = 'layer_'
"""Stands in a tag, with the layer's number, in the place of the pool: the budget of a layer."""

BUDGET_METRICS = named(
    Metric('slots', Kind.GAUGE, Unit.TOKENS, 'Tokens of a root that the layer may hold.'),
    Metric(
        'dispersion',
        Kind.GAUGE,
        Unit.DIFFERENCE,
        "Entropy of the newest tokens' attention over those that may be dropped, in nats; averaged.",
    ),
    Metric(
        'shift',
        Kind.GAUGE,
        Unit.DIFFERENCE,
        'Variance of that attention over the newest tokens, summed over heads and tokens; averaged.',
    ),
    Metric('dropped_tokens', Kind.COUNTER, Unit.TOKENS, 'Tokens of roots that were dropped.'),
    Metric(
        'lost_mass',
        Kind.RATIO,
        Unit.FRACTION,
        "Part of the newest token's attention that went to tokens which were then dropped; no point "
        'where nothing was dropped or attention was not recorded.',
    ),
)

BUDGET_HISTOGRAMS: dict[str, str] = {
    'kept_positions': 'Places in the window (0: its oldest token) of the tokens that all latest roots hold.',
    'kept_tokens': 'The same of one root alone, a bucket for each token.',
}


@dataclass(frozen=True)
class BudgetChart:
    """One chart of the dashboard: a metric of all layers."""

    title: str
    metric: str


BUDGET_CHARTS = (
    BudgetChart('layer budgets: tokens', 'slots'),
    BudgetChart('layer budgets: attention lost', 'lost_mass'),
    BudgetChart('layer budgets: dispersion', 'dispersion'),
    BudgetChart('layer budgets: shift', 'shift'),
)
"""Shown below the others where there are layer budgets."""


def layer_of(pool: str) -> int | None:
    """The layer that stands in a tag in the place of the pool, None where a pool does."""
    number = pool.removeprefix(LAYER_PREFIX)
    return int(number) if pool != number and number.isdecimal() else None


class TagName(NamedTuple):
    """A tag taken apart; `metric` is a name of METRICS, RANK_METRICS or HISTOGRAMS, or, where `pool` is
    VALIDATION or SPEED, of VALIDATION_METRICS or SPEED_METRICS, or, where it is a layer, of BUDGET_METRICS or
    BUDGET_HISTOGRAMS.
    """

    pool: str
    metric: str


def tag(pool: str, metric: str) -> str:
    """Return the tag of a scalar or a histogram.

    Raises:
        ValueError: the pool or the metric has no entry in POOLS, METRICS or HISTOGRAMS.
    """
    if pool not in (*POOLS, VALIDATION, SPEED) and layer_of(pool) is None:
        raise ValueError(
            f'pool must be one of {", ".join(POOLS)}, got {pool!r}; add it to POOLS to report it'
        )
    if metric not in _metrics_of(pool):
        known = ', '.join(_metrics_of(pool))
        raise ValueError(f'metric must be one of {known}, got {metric!r}; add it to METRICS to report it')
    return f'{PREFIX}/{pool}/{metric}'


def parse_tag(text: str) -> TagName | None:
    """Return the parts of a tag written by this library, or None for any other tag of the log."""
    parts = text.split('/')
    if len(parts) != 3 or parts[0] != PREFIX:
        return None
    if parts[2] not in _metrics_of(parts[1]):
        return None
    return TagName(parts[1], parts[2])


def metric_of(pool: str, name: str) -> Metric:
    """The metric with this name in a pool, a layer, VALIDATION or SPEED."""
    return _section(pool)[0][name]


def _metrics_of(pool: str) -> tuple[str, ...]:
    scalars, histograms = _section(pool)
    return (*scalars, *histograms)


def _section(pool: str) -> tuple[Mapping[str, Metric], Mapping[str, str]]:
    """Scalars and histograms that a tag can have there; none where nothing has this name."""
    if layer_of(pool) is not None:
        return BUDGET_METRICS, BUDGET_HISTOGRAMS
    if pool in POOLS:
        return METRICS | RANK_METRICS, HISTOGRAMS
    return {VALIDATION: VALIDATION_METRICS, SPEED: SPEED_METRICS}.get(pool, {}), {}
