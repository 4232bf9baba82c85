"""The statistics of the pools as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lzero_kv.telemetry.metrics import METRICS, POOLS, RANK_METRICS, SPEED_METRICS, Unit


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
    pools = [pool for pool in POOLS if pool in summary]
    if not pools:
        raise ValueError(
            f'summary must hold one of the pools {", ".join(POOLS)}, '
            f'got {", ".join(map(str, summary)) or "nothing"}; '
            'write kv_cache=dict(enable_stats=True) to have statistics'
        )
    table = Table(title=title, title_justify='left')
    table.add_column('metric', no_wrap=True)
    for pool in pools:
        table.add_column(pool, justify='right', no_wrap=True)
    if meanings:
        table.add_column('meaning')
    several = [metric for name, metric in RANK_METRICS.items() if any(name in summary[p] for p in pools)]
    for metric in (*METRICS.values(), *several):
        cells = [summary[pool].get(metric.name) for pool in pools]
        texts = ['-' if cell is None else format_value(cell, metric.unit) for cell in cells]
        table.add_row(metric.name, *texts, *([metric.sentence] if meanings else []))
    return table


def speed_table(whole: Mapping[str, float], last: Mapping[str, float]) -> Table:
    """Return a table of SPEED_METRICS: the whole run and its last point, and what each number means."""
    table = Table(title='Speed', title_justify='left')
    table.add_column('metric', no_wrap=True)
    for column in ('whole run', 'last point'):
        table.add_column(column, justify='right', no_wrap=True)
    table.add_column('meaning')
    for name, metric in SPEED_METRICS.items():
        if name in whole:
            cells = (
                '-' if name not in part else format_value(part[name], metric.unit) for part in (whole, last)
            )
            table.add_row(name, *cells, metric.sentence)
    return table


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts as a table of Markdown; the first one is its head."""
    head, *others = ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows]
    return '\n'.join([head, '|' + '---|' * len(rows[0]), *others])


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
