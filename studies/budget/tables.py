"""The study's rows as tables: for a terminal, and for the documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from lzero_kv.telemetry.table import markdown_table

Row = dict[str, Any]

COLUMNS = {
    'KL root': 'decisive/policy_kl_root',
    'KL nodes': 'decisive/policy_kl_nodes',
    '|dv|': 'decisive/value_root',
    '|dr|': 'decisive/reward_nodes',
    'latent 1': 'decisive/latent_1',
    'latent 5': 'decisive/latent_5',
    'same action': 'decisive/agreement',
    '... all frames': 'all/agreement',
    'KL visits': 'decisive/visit_kl',
    'return': 'return',
}
OVERVIEW = {'KL': 'decisive/policy_kl_root', 'same action': 'decisive/agreement', 'return': 'return'}
"""What the overview of all methods shows at each ratio."""


def cell(row: Row, field: str, join: str = ' ± ') -> str:
    """Mean and spread of one measure, with as many digits as say something."""
    mean, spread = row[field], row['spread'][field]
    if field.endswith('agreement') or field == 'return':
        return f'{100 * mean:.1f}{join}{100 * spread:.1f} %'
    digits = 4 if mean < 0.1 else 3 if mean < 1 else 2
    return f'{mean:.{digits}f}{join}{spread:.{digits}f}'


def rich_table(rows: Iterable[Row], cue: str) -> Table:
    """All measures of the rows of one kind of cue."""
    table = Table(title=f'cue at {cue}: differences from the full cache between the doors, mean±spread')
    for name in ('ratio', 'method', *COLUMNS, 'node KiB', 'search ms'):
        table.add_column(name, justify='left' if name == 'method' else 'right', no_wrap=True)
    for row in rows:
        table.add_row(
            f'{row["ratio"]:g}', row['method'], *(cell(row, of, '±') for of in COLUMNS.values()), *_sizes(row)
        )
    return table


def detailed(rows: Iterable[Row]) -> str:
    """All measures of the given rows, in Markdown."""
    lines = [
        [f'{row["ratio"]:g}', row['method'], *(cell(row, of) for of in COLUMNS.values()), *_sizes(row)]
        for row in rows
    ]
    return markdown_table([['ratio', 'method', *COLUMNS, 'node KiB', 'search ms'], *lines])


def overview(rows: Sequence[Row]) -> str:
    """A line for each method, in Markdown: KL, agreement and return at each ratio, the best ones in bold."""
    ratios = sorted({row['ratio'] for row in rows if row['ratio'] < 1}, reverse=True)
    found = {(row['method'], row['ratio']): row for row in rows}
    best = {
        (ratio, of): (min if name == 'KL' else max)(row[of] for row in rows if row['ratio'] == ratio)
        for ratio in ratios
        for name, of in OVERVIEW.items()
    }
    lines = [['', *(f'{name}, {ratio:g}' for ratio in ratios for name in OVERVIEW)]]
    for method in dict.fromkeys(row['method'] for row in rows if row['ratio'] < 1):
        line = [method]
        for ratio in ratios:
            row = found[method, ratio]
            for of in OVERVIEW.values():
                text = cell(row, of)
                line.append(f'**{text}**' if row[of] == best[ratio, of] else text)
        lines.append(line)
    return markdown_table(lines)


def _sizes(row: Row) -> list[str]:
    return [f'{row["node_bytes"] / 1024:.1f}', f'{row["search_ms"]:.0f}']
