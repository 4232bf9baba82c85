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
from functools import partial
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

    kind: Kind
    name: str
    unit: Unit
    sentence: str


_counter, _gauge, _ratio = (partial(Metric, kind) for kind in Kind)


def named(*metrics: Metric) -> dict[str, Metric]:
    """The metrics by their names."""
    return {metric.name: metric for metric in metrics}


METRICS = named(
    _counter('queries', Unit.COUNT, "Lookups of a history's KV: its keys and values."),
    _counter('hits', Unit.COUNT, 'Queries whose KV was in the pool.'),
    _counter('misses', Unit.COUNT, 'Queries whose KV was not in the pool.'),
    _ratio('hit_rate', Unit.FRACTION, 'Hits divided by queries; missing where nothing was queried.'),
    _counter('stores', Unit.COUNT, 'Histories whose KV was written into the pool.'),
    _counter('overwrites', Unit.COUNT, 'Stores that renewed the slot of a key already in the pool.'),
    _counter('evictions', Unit.ENTRIES, 'Entries removed by the policy because the pool was full.'),
    _ratio(
        'saved_tokens',
        Unit.FRACTION,
        'Served tokens as a part of all that a pass without a cache would compute.',
    ),
    _counter(
        'computed_tokens',
        Unit.TOKENS,
        'Tokens whose KV was computed: new ones, windows that moved, rebuilt ones.',
    ),
    _counter('served_tokens', Unit.TOKENS, 'Tokens of the histories behind them whose KV was there.'),
    _counter('rebuilt_tokens', Unit.TOKENS, 'Tokens whose KV was computed again after a miss.'),
    _counter(
        'window_tokens',
        Unit.TOKENS,
        'Tokens of derived windows, computed when a node was first expanded, and of roots that moved.',
    ),
    _gauge('entries', Unit.ENTRIES, 'Histories held at this moment.'),
    _gauge('occupancy', Unit.FRACTION, 'Entries divided by the capacity of the pool.'),
    _gauge('bytes', Unit.BYTES, 'Memory allocated for the tensors of the pool.'),
)

RANK_METRICS = named(
    _gauge(
        'ranks',
        Unit.COUNT,
        'Processes: counters, entries and bytes are their sums, occupancy is the largest.',
    ),
    _gauge('most_bytes', Unit.BYTES, 'The bytes of the process that has most.'),
)
"""Beside METRICS where the numbers stand for several processes."""

SPEED = 'speed'
"""Stands in a tag in the place of the pool: times and rates of the acting model, on the wall."""

SPEED_METRICS = named(
    _ratio(
        'env_steps_per_second',
        Unit.RATE,
        'Environment steps by all seconds since the previous point: collection, learning, evaluation.',
    ),
    _ratio(
        'simulations_per_second',
        Unit.RATE,
        'Simulations of all rows by the seconds of the searches, in one process.',
    ),
    _ratio(
        'search_ms',
        Unit.MILLISECONDS,
        'Mean time of a search of one batch of environments. A search waits for its answers: true on a '
        'GPU too.',
    ),
    _ratio(
        'root_inference_ms',
        Unit.MILLISECONDS,
        'Mean time of a root inference of one batch. On a GPU without the heads and stores that are '
        'still queued when it returns.',
    ),
    _ratio(
        'planning_share',
        Unit.FRACTION,
        'Part of the seconds of collection that searches and root inferences took.',
    ),
    _gauge('train_iterations', Unit.COUNT, 'Training iterations so far.'),
    _counter('env_steps', Unit.COUNT, 'Environment steps in `seconds`.'),
    _counter('seconds', Unit.SECONDS, 'All seconds since the previous point.'),
    _counter('searches', Unit.COUNT, 'Searches of a batch of environments.'),
    _counter('simulations', Unit.COUNT, 'Simulations of all rows of the searches.'),
    _counter('search_seconds', Unit.SECONDS, 'Seconds of the searches.'),
    _counter('root_inferences', Unit.COUNT, 'Root inferences of a batch of environments.'),
    _counter('root_seconds', Unit.SECONDS, 'Seconds of the root inferences.'),
    _counter('collect_seconds', Unit.SECONDS, 'Seconds of collection.'),
    _counter('planning_seconds', Unit.SECONDS, 'Seconds of searches and root inferences in collection.'),
)

QUOTIENTS: dict[str, tuple[str, tuple[str, ...], float]] = {
    'hit_rate': ('hits', ('queries',), 1),
    'saved_tokens': ('served_tokens', ('served_tokens', 'computed_tokens'), 1),
    'env_steps_per_second': ('env_steps', ('seconds',), 1),
    'simulations_per_second': ('simulations', ('search_seconds',), 1),
    'search_ms': ('search_seconds', ('searches',), 1000),
    'root_inference_ms': ('root_seconds', ('root_inferences',), 1000),
    'planning_share': ('planning_seconds', ('collect_seconds',), 1),
}
"""Ratios of METRICS and SPEED_METRICS: a counter by a sum of counters, and the factor of its unit."""


def with_ratios(numbers: Mapping[str, float]) -> dict[str, float]:
    """``numbers`` and the QUOTIENTS of their counters; one is left out where nothing was counted."""
    ratios = {
        name: factor * numbers[part] / sum(numbers[other] for other in others)
        for name, (part, others, factor) in QUOTIENTS.items()
        if part in numbers and sum(numbers.get(other, 0) for other in others)
    }
    return {**numbers, **ratios}


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
    _counter('searches', Unit.COUNT, 'Searches begun.'),
    _counter('validated', Unit.COUNT, 'Searches whose nodes were compared.'),
    _counter('compared', Unit.COUNT, 'Rows of inferences that were compared.'),
    _counter('equal', Unit.COUNT, 'Rows without a difference.'),
    _counter(
        'different',
        Unit.COUNT,
        'Rows in which the stock cache was wrong, for a proven cause, and the cache right.',
    ),
    _counter('unexplained', Unit.COUNT, 'Differences without a proven cause: must be 0.'),
    _counter('cache_wrong', Unit.COUNT, 'Rows in which the cache was wrong: must be 0.'),
    *(
        _counter(f'{CAUSE_PREFIX}{cause.value}', Unit.COUNT, f'Different: {cause.sentence}.')
        for cause in Cause
    ),
    *(
        _counter(f'{FAULT_PREFIX}{fault.value}', Unit.COUNT, f'Cache wrong: {fault.sentence}.')
        for fault in Fault
    ),
    _gauge(
        'largest_stock',
        Unit.DIFFERENCE,
        'Largest difference of the stock cache from the recomputation so far.',
    ),
    _gauge(
        'largest_cache',
        Unit.DIFFERENCE,
        'Largest difference of the cache from the recomputation so far: rounding, where it is right.',
    ),
    _counter('policy_rows', Unit.COUNT, 'Differences of which is known how far the policy moved.'),
    _ratio(
        'policy_moved',
        Unit.DIFFERENCE,
        'Mean total variation distance of the stock policy from the right one, over those rows.',
    ),
    _gauge('policy_moved_most', Unit.DIFFERENCE, 'The largest of those distances so far.'),
    _counter('value_rows', Unit.COUNT, 'Differences of which is known how far the value moved.'),
    _ratio(
        'value_moved',
        Unit.DIFFERENCE,
        'Mean absolute difference of the stock value from the right one, over those rows.',
    ),
    _gauge('value_moved_most', Unit.DIFFERENCE, 'The largest of those differences so far.'),
)
"""A fault has a chart only where it happened: such a chart is an alarm."""

HISTOGRAMS: dict[str, str] = {
    'lifetime': "Stores of the pool between an entry's store and its removal.",
    'reuse_distance': 'Queries of the pool between two accesses of an entry.',
}


@dataclass(frozen=True)
class Chart:
    """One chart of the dashboard and one panel of the report's plot: a metric of several pools, or several
    metrics of one section.

    Attributes:
        title: what is drawn, with its unit.
        metrics: their names; one line each.
        sections: where they stand in a tag; one line each.
        steady: whether the chart is constant in a healthy training.
        logarithmic: the plot's vertical axis; differences lie many powers of ten apart.
    """

    title: str
    metrics: tuple[str, ...]
    sections: tuple[str, ...] = ('roots', 'nodes', 'reanalysis')
    steady: bool = False
    logarithmic: bool = False

    @property
    def unit(self) -> Unit:
        """Of all its metrics."""
        return metric_of(self.sections[0], self.metrics[0]).unit

    @property
    def heading(self) -> str:
        """The title, with what a point of a counter counts."""
        kinds = {metric_of(self.sections[0], name).kind for name in self.metrics}
        return f'{self.title} since the previous point' if kinds == {Kind.COUNTER} else self.title


CHARTS = (
    Chart('tokens saved, part of all', ('saved_tokens',)),
    Chart('hit rate', ('hit_rate',)),
    Chart('memory in bytes', ('bytes',), ('roots', 'nodes', 'reanalysis', 'total')),
    Chart('computed tokens', ('computed_tokens',)),
    Chart('served tokens', ('served_tokens',)),
    Chart('tokens of moved windows', ('window_tokens',)),
    Chart('occupancy, part of the capacity', ('occupancy',)),
    Chart('rebuilt tokens', ('rebuilt_tokens',), steady=True),
    Chart('evictions, entries', ('evictions',), steady=True),
)
"""In the order in which the dashboard and the plot show them, behind SPEED_CHARTS."""

SPEED_CHARTS = (
    Chart('environment steps per second', ('env_steps_per_second',), (SPEED,)),
    Chart('simulations per second', ('simulations_per_second',), (SPEED,)),
    Chart('time of a search in ms', ('search_ms',), (SPEED,)),
    Chart('time of a root inference in ms', ('root_inference_ms',), (SPEED,)),
    Chart('share of collection that is planning', ('planning_share',), (SPEED,)),
)
"""What the dashboard and the plot open with."""

VALIDATION_CHARTS = (
    Chart('validation: rows compared', ('compared', 'equal', 'different'), (VALIDATION,)),
    Chart(
        'validation: failures, which must stay 0,', ('unexplained', 'cache_wrong'), (VALIDATION,), steady=True
    ),
    Chart(
        'validation: differences by cause', tuple(f'{CAUSE_PREFIX}{c.value}' for c in Cause), (VALIDATION,)
    ),
    Chart(
        'validation: largest difference from the recomputation so far',
        ('largest_stock', 'largest_cache'),
        (VALIDATION,),
        logarithmic=True,
    ),
    Chart(
        'validation: policy and value moved, mean of the differences',
        ('policy_moved', 'value_moved'),
        (VALIDATION,),
    ),
)
"""Shown below CHARTS where validation is on."""

LAYER_PREFIX = 'layer_'
"""Stands in a tag, with the layer's number, in the place of the pool: the budget of a layer."""

BUDGET_METRICS = named(
    _gauge('slots', Unit.TOKENS, 'Tokens of a root that the layer may hold.'),
    _gauge(
        'dispersion',
        Unit.DIFFERENCE,
        "Entropy of the newest tokens' attention over those that may be dropped, in nats; averaged.",
    ),
    _gauge(
        'shift',
        Unit.DIFFERENCE,
        'Variance of that attention over the newest tokens, summed over heads and tokens; averaged.',
    ),
    _counter('dropped_tokens', Unit.TOKENS, 'Tokens of roots that were dropped.'),
    _ratio(
        'lost_mass',
        Unit.FRACTION,
        "Part of the newest token's attention that went to tokens which were then dropped; no point "
        'where nothing was dropped or attention was not recorded.',
    ),
)

BUDGET_HISTOGRAMS: dict[str, str] = {
    'kept_positions': 'Places in the window (0: its oldest token) of the tokens that all latest roots hold.',
    'kept_tokens': 'The same of one root alone, a bucket for each token.',
}


BUDGET_CHARTS = tuple(
    Chart(f'layer budgets: {title}', (metric,), (f'{LAYER_PREFIX}[0-9]+',))
    for title, metric in (
        ('tokens', 'slots'),
        ('attention lost', 'lost_mass'),
        ('dispersion', 'dispersion'),
        ('shift', 'shift'),
    )
)
"""Shown on the dashboard below the others where there are layer budgets; one line for each layer."""


def layer_of(pool: str) -> int | None:
    """The layer that stands in a tag in the place of the pool, None where a pool does."""
    number = pool.removeprefix(LAYER_PREFIX)
    return int(number) if pool != number and number.isdecimal() else None


class TagName(NamedTuple):
    """A tag taken apart: a pool, a layer, VALIDATION or SPEED, and one of its metrics or histograms."""

    pool: str
    metric: str


def tag(pool: str, metric: str) -> str:
    """Return the tag of a scalar or a histogram."""
    return f'{PREFIX}/{pool}/{metric}'


def parse_tag(text: str) -> TagName | None:
    """Return the parts of a tag written by this library, or None for any other tag of the log."""
    prefix, *parts = text.split('/')
    if prefix != PREFIX or len(parts) != 2:
        return None
    name = TagName(*parts)
    return name if any(name.metric in known for known in _section(name.pool)) else None


def metric_of(pool: str, name: str) -> Metric:
    """The metric with this name in a pool, a layer, VALIDATION or SPEED."""
    return _section(pool)[0][name]


def _section(pool: str) -> tuple[Mapping[str, Metric], Mapping[str, str]]:
    """Scalars and histograms that a tag can have there; none where nothing has this name."""
    if layer_of(pool) is not None:
        return BUDGET_METRICS, BUDGET_HISTOGRAMS
    if pool in POOLS:
        return METRICS | RANK_METRICS, HISTOGRAMS
    return {VALIDATION: VALIDATION_METRICS, SPEED: SPEED_METRICS}.get(pool, {}), {}
