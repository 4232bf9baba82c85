"""Statistics, speed, validation and layer budgets as tables of texts, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from lzero_kv.telemetry.metrics import (
    BUDGET_METRICS,
    CAUSE_PREFIX,
    FAULT_PREFIX,
    METRICS,
    POOLS,
    RANK_METRICS,
    SPEED_METRICS,
    VALIDATION_METRICS,
    Metric,
    Unit,
)

Rows = Sequence[Sequence[str]]
"""Texts of a table; the first row is its head."""
ALARMS = ('unexplained', 'cache_wrong')
MEANING = 'meaning'


def text_table(rows: Rows, title: str, *, left: Container[str] = ('', 'metric', MEANING)) -> Table:
    """Rows of texts as a table for a terminal.

    Args:
        rows: head and lines.
        title: the line above the table.
        left: heads of columns of words; the others are of numbers and stand right. Only ``meaning`` wraps.
    """
    head, *lines = rows
    table = Table(title=title, title_justify='left')
    for name in head:
        table.add_column(name, justify='left' if name in left else 'right', no_wrap=name != MEANING)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(rows: Rows) -> str:
    """Rows of texts as a table of Markdown."""
    head, *lines = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows]
    return '\n'.join([head, '|' + '---|' * len(rows[0]), *lines])


def statistics_table(summary: Mapping[str, Any], title: str = 'KV cache', *, meanings: bool = False) -> Table:
    """Return a table with one row per metric and one column per pool.

    Args:
        summary: pool name -> metric name -> number, as `KVCacheManager.get_stats_summary()` gives it. Pools
            and metrics that METRICS and POOLS do not name are left out; a metric that a pool does not have
            shows as a dash. RANK_METRICS have rows where a pool has them.
        title: the line above the table.
        meanings: whether a last column says what each metric counts.

    Raises:
        ValueError: the summary holds no pool, because statistics are off.
    """
    pools = {pool: summary[pool] for pool in POOLS if pool in summary}
    if not pools:
        raise ValueError(
            f'summary must hold one of the pools {", ".join(POOLS)}, '
            f'got {", ".join(map(str, summary)) or "nothing"}; '
            'write kv_cache=dict(enable_stats=True) to have statistics'
        )
    several = [metric for name, metric in RANK_METRICS.items() if any(name in one for one in pools.values())]
    rows = [['metric', *pools, MEANING], *(_row(m, pools.values()) for m in (*METRICS.values(), *several))]
    return text_table(rows if meanings else [row[:-1] for row in rows], title)


def speed_table(whole: Mapping[str, float], last: Mapping[str, float]) -> Table:
    """Return a table of SPEED_METRICS: the whole run and its last point, and what each number means."""
    rows = [_row(metric, (whole, last)) for name, metric in SPEED_METRICS.items() if name in whole]
    return text_table([('metric', 'whole run', 'last point', MEANING), *rows], 'Speed')


def validation_table(columns: Mapping[str, Mapping[str, float]], title: str = 'Validation') -> Table:
    """Return a table of :func:`validation_rows`; the rows that must not be are red where there are any."""
    rows = list(validation_rows(columns))
    table = text_table(rows, title)
    for line, (name, *_) in zip(table.rows, rows[1:], strict=True):
        if name in ALARMS and any(numbers.get(name) for numbers in columns.values()):
            line.style = 'red'
    return table


def validation_rows(columns: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    """One row per metric and one column per kind of inference, and what each metric means.

    Args:
        columns: kind -> metric -> number. A metric that a kind lacks shows as a dash; a cause or a fault that
            never came is left out.
    """
    yield ['metric', *columns, MEANING]
    for name, metric in VALIDATION_METRICS.items():
        found = any(numbers.get(name) for numbers in columns.values())
        if found or not name.startswith((CAUSE_PREFIX, FAULT_PREFIX)):
            yield _row(metric, columns.values())


def budget_table(layers: Mapping[int, Mapping[str, float]], title: str = 'Layer budgets') -> Table:
    """Return a table with one row per layer and one column per metric.

    Args:
        layers: layer -> metric -> number; a metric that no layer has gets no column.
        title: the line above the table.
    """
    ordered = dict(sorted(layers.items()))
    columns = [_row(metric, ordered.values())[:-1] for metric in BUDGET_METRICS.values()]
    shown = [column for column in columns if set(column[1:]) != {'-'}]
    return text_table(list(zip(['layer', *map(str, ordered)], *shown, strict=True)), title)


def _row(metric: Metric, columns: Any) -> list[str]:
    """Name, a number for each column (a dash where it has none), and meaning."""
    found = [numbers.get(metric.name) for numbers in columns]
    texts = ['-' if value is None else format_value(value, metric.unit) for value in found]
    return [metric.name, *texts, metric.sentence]


def format_value(value: float, unit: Unit) -> str:
    """Return a number with its unit: `12,345`, `97.2 %`, `1.5 MiB`; a difference as `3.1e-07`."""
    if unit is Unit.FRACTION:
        return f'{100 * value:.1f} %'
    if unit is Unit.BYTES:
        return format_bytes(value)
    if unit in (Unit.DIFFERENCE, Unit.MILLISECONDS, Unit.SECONDS, Unit.RATE):
        shown = f'{value:.3g}' if value < 1000 else f'{value:,.0f}'
        return shown if unit is Unit.DIFFERENCE else f'{shown} {unit.value}'
    return f'{value:,.0f}'


def format_bytes(value: float) -> str:
    """Return a size in the largest of B, KiB, MiB, GiB that keeps it at 1 or more."""
    if value < 1024:
        return f'{value:.0f} B'
    for unit in ('KiB', 'MiB'):
        value /= 1024
        if value < 1024:
            return f'{value:.1f} {unit}'
    return f'{value / 1024:.1f} GiB'
