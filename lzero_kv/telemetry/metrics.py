"""The one home of metric names, pool names, tags and charts.

A tag is `<axis>/<pool>/<metric>`: `kv_cache_step/roots/hit_rate` is the hit rate of the root pools over
environment steps, `kv_cache_iter/roots/hit_rate` the same numbers over training iterations. The two axes are
separate tags because TensorBoard draws a tag against one step only; LightZero's own charts follow the same
habit (`collector_step`, `collector_iter`). Where validation is on, `kv_cache_step/validation/<metric>` stands
beside the pools, and where layer budgets are, `kv_cache_step/layer_0/<metric>` for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from lzero_kv.telemetry.counters import Cause, Fault


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
    DIFFERENCE = 'difference'  # of keys, values, latents or predictions; no fixed number of digits fits


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
            'Tokens of derived windows, computed when a node was first expanded, and of roots that moved.',
        ),
        Metric('entries', Kind.GAUGE, Unit.ENTRIES, 'Histories held at this moment.'),
        Metric('occupancy', Kind.GAUGE, Unit.FRACTION, 'Entries divided by the capacity of the pool.'),
        Metric('bytes', Kind.GAUGE, Unit.BYTES, 'Memory allocated for the tensors of the pool.'),
    )
}

RANK_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            'ranks',
            Kind.GAUGE,
            Unit.COUNT,
            'Processes: counters, entries and bytes are their sums, occupancy is the largest.',
        ),
        Metric('most_bytes', Kind.GAUGE, Unit.BYTES, 'The bytes of the process that has most.'),
    )
}
"""Beside METRICS where the numbers stand for several processes."""

POOLS: dict[str, str] = {
    'roots': 'The root pools of all environments of the acting model.',
    'nodes': 'The recurrent pool of the acting model: derived windows of the running search.',
    'reanalysis': 'All pools of the target model, which searches again for reanalysis.',
    'total': 'All of the above together.',
}

VALIDATION = 'validation'
"""Stands in a tag in the place of the pool: both caches side by side, all kinds of inference together."""

CAUSE_PREFIX, FAULT_PREFIX = 'cause_', 'fault_'

VALIDATION_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
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
            Metric(
                f'{FAULT_PREFIX}{fault.value}', Kind.COUNTER, Unit.COUNT, f'Cache wrong: {fault.sentence}.'
            )
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
        Metric(
            'value_rows', Kind.COUNTER, Unit.COUNT, 'Differences of which is known how far the value moved.'
        ),
        Metric(
            'value_moved',
            Kind.RATIO,
            Unit.DIFFERENCE,
            'Mean absolute difference of the stock value from the right one, over those rows.',
        ),
        Metric('value_moved_most', Kind.GAUGE, Unit.DIFFERENCE, 'The largest of those differences so far.'),
    )
}
"""A fault has a chart only where it happened: such a chart is an alarm."""

HISTOGRAMS: dict[str, str] = {
    'lifetime': "Stores of the pool between an entry's store and its removal.",
    'reuse_distance': 'Queries of the pool between two accesses of an entry.',
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


@dataclass(frozen=True)
class ValidationChart:
    """One chart of the dashboard and one panel of the plot: metrics of the validation.

    Attributes:
        title: what is drawn.
        metrics: names of VALIDATION_METRICS, one line each.
        logarithmic: the plot's vertical axis; differences lie many powers of ten apart.
    """

    title: str
    metrics: tuple[str, ...]
    logarithmic: bool = False

    @property
    def heading(self) -> str:
        """The title, with what a point of a counter counts."""
        counters = all(VALIDATION_METRICS[name].kind is Kind.COUNTER for name in self.metrics)
        return f'{self.title} since the previous point' if counters else self.title


VALIDATION_CHARTS = (
    ValidationChart('validation: rows compared', ('compared', 'equal', 'different')),
    ValidationChart('validation: failures, which must stay 0,', ('unexplained', 'cache_wrong')),
    ValidationChart('validation: differences by cause', tuple(f'{CAUSE_PREFIX}{c.value}' for c in Cause)),
    ValidationChart(
        'validation: largest difference from the recomputation so far',
        ('largest_stock', 'largest_cache'),
        logarithmic=True,
    ),
    ValidationChart(
        'validation: policy and value moved, mean of the differences', ('policy_moved', 'value_moved')
    ),
)
"""Shown below CHARTS where validation is on."""


LAYER_PREFIX = 'layer_'
"""Stands in a tag, with the layer's number, in the place of the pool: the budget of a layer."""

BUDGET_METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
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
}

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
    VALIDATION, of VALIDATION_METRICS, or, where it is a layer, of BUDGET_METRICS or BUDGET_HISTOGRAMS.
    """

    axis: Axis
    pool: str
    metric: str


def tag(axis: Axis, pool: str, metric: str) -> str:
    """Return the tag of a scalar or a histogram.

    Raises:
        ValueError: the pool or the metric has no entry in POOLS, METRICS or HISTOGRAMS.
    """
    if pool not in POOLS and pool != VALIDATION and layer_of(pool) is None:
        raise ValueError(
            f'pool must be one of {", ".join(POOLS)}, got {pool!r}; add it to POOLS to report it'
        )
    if metric not in _metrics_of(pool):
        known = ', '.join(_metrics_of(pool))
        raise ValueError(f'metric must be one of {known}, got {metric!r}; add it to METRICS to report it')
    return f'{axis.value}/{pool}/{metric}'


def parse_tag(text: str) -> TagName | None:
    """Return the parts of a tag written by this library, or None for any other tag of the log."""
    parts = text.split('/')
    if len(parts) != 3 or parts[0] not in {axis.value for axis in Axis}:
        return None
    if parts[2] not in _metrics_of(parts[1]):
        return None
    return TagName(Axis(parts[0]), parts[1], parts[2])


def _metrics_of(pool: str) -> tuple[str, ...]:
    if pool == VALIDATION:
        return tuple(VALIDATION_METRICS)
    if layer_of(pool) is not None:
        return (*BUDGET_METRICS, *BUDGET_HISTOGRAMS)
    return (*METRICS, *RANK_METRICS, *HISTOGRAMS) if pool in POOLS else ()
