"""The table of a summary, as a terminal shows it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lzero_kv.telemetry.metrics import METRICS, Unit
from lzero_kv.telemetry.table import format_value, statistics_table

from .driving import env_step, make_manager


def rendered(summary: dict, title: str = 'KV cache') -> list[str]:
    """The lines of the table without its frame."""
    console = Console(file=io.StringIO(), width=100)
    console.print(statistics_table(summary, title))
    assert isinstance(console.file, io.StringIO)
    return [line.strip(' │┃') for line in console.file.getvalue().splitlines()]


def test_a_managers_summary_as_a_table() -> None:
    manager = make_manager()
    for step in range(400):
        env_step(manager, step)
    lines = rendered(manager.get_stats_summary(), 'Pong')
    cells = [line.replace('┃', '│').split('│') for line in lines if '│' in line or '┃' in line]
    rows = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}
    assert lines[0] == 'Pong'
    assert rows['metric'] == ['roots', 'nodes', 'total']
    assert list(rows) == ['metric', *METRICS]
    assert rows['queries'] == ['1,600', '8,000', '9,600']
    assert rows['hit_rate'][0] == '99.8 %'
    assert rows['occupancy'][:2] == ['100.0 %', '100.0 %']
    # 2 layers, keys and values, 8 tokens, 12 numbers of 4 bytes: 1.5 KiB for each of 4 roots and 11 nodes.
    assert rows['bytes'] == ['6.0 KiB', '16.5 KiB', '22.5 KiB']


def test_numbers_are_right_aligned() -> None:
    lines = rendered({'nodes': {'queries': 1234567, 'hits': 8}})
    ends = {len(line.rstrip()) for line in lines if line.startswith(('queries', 'hits'))}
    assert len(ends) == 1


def test_a_metric_that_a_pool_lacks_is_a_dash() -> None:
    line = next(line for line in rendered({'roots': {'hits': 8}, 'nodes': {}}) if line.startswith('hits'))
    assert line.split('│')[2].strip() == '-'


@pytest.mark.parametrize(
    ('value', 'unit', 'text'),
    [
        (0, Unit.COUNT, '0'),
        (1234567, Unit.TOKENS, '1,234,567'),
        (0.97249, Unit.FRACTION, '97.2 %'),
        (0.0, Unit.FRACTION, '0.0 %'),
        (1023, Unit.BYTES, '1023 B'),
        (1024, Unit.BYTES, '1.0 KiB'),
        (1.5 * 2**20, Unit.BYTES, '1.5 MiB'),
        (2**31, Unit.BYTES, '2.0 GiB'),
        (5 * 2**40, Unit.BYTES, '5120.0 GiB'),
    ],
)
def test_values_carry_their_unit(value: float, unit: Unit, text: str) -> None:
    assert format_value(value, unit) == text


def test_a_summary_without_statistics_is_refused() -> None:
    manager = make_manager(enable_stats=False, tensorboard=False)
    with pytest.raises(ValueError, match=r'got stats_enabled; write kv_cache=dict\(enable_stats=True\)'):
        statistics_table(manager.get_stats_summary())
