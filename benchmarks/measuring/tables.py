"""What the benchmark found, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .contestants import EAGER
from .players import Numbers

PARTS = ('model', 'cache', 'tree', 'rest')
COUNTS = ('operators', 'host_reads', 'allocations', 'mib_moved')
"""What is given for one simulation."""


QUALITY = ('root_actions', 'nats')
"""Of a reduced precision beside float32: part of the roots with the same most visited action, and divergence
of visits."""


def shapes_table(shapes: dict[str, dict[str, Numbers]], threads: Sequence[int]) -> Table:
    """One row for each shape and contestant."""
    heads = ['shape', 'cache', 'step ms', 'x stock', 'x floor', 'root ms', 'x stock', 'simulation ms']
    for number in threads[1:]:
        heads += [f'{number} threads: step ms', 'x stock', 'x floor']
    heads += ['/'.join(PARTS) + ' %', 'operators', 'host reads', 'allocations', 'MiB moved']
    heads += ['peak MiB', 'cache MiB', 'hits', 'root actions', 'visits, nats']
    table = Table(
        *heads, title='eight environments; operators to MiB moved: for one simulation; peak: above cache'
    )
    for shape, contestants in shapes.items():
        for name, numbers in contestants.items():
            table.add_row(shape, name, *_times(numbers, threads), *_counts(numbers))
        table.add_section()
    return table


def _times(numbers: Numbers, threads: Sequence[int]) -> list[str]:
    first, *others = (numbers['threads'][number] for number in threads)
    row = [_step(first), str(first['times_as_fast']), str(first['over_floor'])]
    if 'simulation_ms' in first:
        row += [f'{first["root_inference_ms"]["median"]:.1f}', str(first['root_times_as_fast'])]
        row += [f'{first["simulation_ms"]:.2f}']
    else:
        row += ['', '', '']
    for other in others:
        row += [_step(other), str(other['times_as_fast']), str(other['over_floor'])]
    return row


def _step(numbers: Numbers) -> str:
    return f'{numbers["step_ms"]["median"]:.1f}'


def _counts(numbers: Numbers) -> list[str]:
    if 'share_of_time' not in numbers:
        return []
    shares = '/'.join(f'{100 * numbers["share_of_time"].get(part, 0):.0f}' for part in PARTS)
    counts = [f'{numbers[f"{name}_per_simulation"]:.4g}' for name in COUNTS]
    memory = [f'{numbers[name]:.3g}' for name in ('step_peak_mib', 'cache_mib')]
    quality = [str(numbers['quality'][name]) for name in QUALITY] if 'quality' in numbers else []
    return [shares, *counts, *memory, str(numbers.get('nodes_hit_rate', '')), *quality]


def collection_table(tasks: dict[str, dict[str, Numbers]]) -> Table:
    """One row for each task and cache."""
    table = Table('collection', 'cache', 'environment steps per second', 'x stock')
    for task, caches in tasks.items():
        for cache, numbers in caches.items():
            rate = f'{numbers["steps_per_second"]["median"]:.1f}'
            table.add_row(task, cache, rate, str(numbers['times_as_fast']))
    return table


def reanalysis_table(shapes: dict[str, Numbers]) -> Table:
    """One row for each shape."""
    table = Table('reanalysis', 'roots', 'simulations', *(f'{cache} s' for cache in EAGER), 'x stock')
    for shape, numbers in shapes.items():
        row = [shape, numbers['roots'], numbers['simulations'], *(numbers[f'{cache}_s'] for cache in EAGER)]
        table.add_row(*map(str, row), str(numbers['rebuild_times_as_fast']))
    return table
