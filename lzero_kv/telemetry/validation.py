"""Validation counters by the names of their metrics, and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from lzero_kv.telemetry.counters import KINDS, Cause, Counters, ValidationCounters
from lzero_kv.telemetry.metrics import CAUSE_PREFIX, FAULT_PREFIX, VALIDATION_METRICS
from lzero_kv.telemetry.table import format_value


def validation_numbers(counters: ValidationCounters) -> dict[str, float]:
    """Every metric of VALIDATION_METRICS, all kinds of inference together.

    A mean is left out where nothing moved, and a fault where it did not happen.
    """
    return {'searches': counters.searches, 'validated': counters.validated, **counter_numbers(counters.total)}


def counter_numbers(counters: Counters) -> dict[str, float]:
    """The metrics of one kind of inference, as :func:`validation_numbers` has them."""
    numbers: dict[str, float] = {
        name: getattr(counters, name) for name in VALIDATION_METRICS if hasattr(counters, name)
    }
    numbers |= {f'{CAUSE_PREFIX}{cause.value}': counters.causes[cause] for cause in Cause}
    numbers |= {f'{FAULT_PREFIX}{fault.value}': count for fault, count in counters.faults.items() if count}
    for name, movement in (('policy', counters.policy), ('value', counters.value)):
        numbers[f'{name}_rows'] = movement.count
        numbers[f'{name}_moved_most'] = movement.largest
        if movement.count:
            numbers[f'{name}_moved'] = movement.mean
    return numbers


def columns_of(counters: ValidationCounters) -> dict[str, dict[str, float]]:
    """The columns of :func:`validation_table`: each kind of inference that was compared, and all together."""
    kinds = {name: getattr(counters, name) for name in KINDS}
    columns = {name: counter_numbers(kind) for name, kind in kinds.items() if kind.compared}
    return {**columns, 'total': validation_numbers(counters)}


def validation_table(columns: Mapping[str, Mapping[str, float]], title: str = 'Validation') -> Table:
    """Return a table with one row per metric and one column per kind of inference.

    Args:
        columns: kind -> metric -> number. A metric that a kind lacks shows as a dash; a cause or a fault that
            never came is left out.
        title: the line above the table.
    """
    table = Table(title=title, title_justify='left')
    table.add_column('metric', no_wrap=True)
    for kind in columns:
        table.add_column(kind, justify='right', no_wrap=True)
    table.add_column('meaning')
    for name, *texts in validation_rows(columns):
        alarming = name in ('unexplained', 'cache_wrong') and any(col.get(name) for col in columns.values())
        table.add_row(name, *texts, style='red' if alarming else None)
    return table


def validation_rows(columns: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    """Name, a number for each column and meaning of each metric; causes and faults only where one came."""
    for name, metric in VALIDATION_METRICS.items():
        cells = [numbers.get(name) for numbers in columns.values()]
        if any(cells) or not name.startswith((CAUSE_PREFIX, FAULT_PREFIX)):
            texts = ['-' if cell is None else format_value(cell, metric.unit) for cell in cells]
            yield [name, *texts, metric.sentence]
