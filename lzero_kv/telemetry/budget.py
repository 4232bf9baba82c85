"""Layer budgets by the names of their metrics, as histograms, and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.table import Table

from lzero_kv.budget import BudgetSnapshot
from lzero_kv.telemetry.metrics import BUDGET_METRICS
from lzero_kv.telemetry.table import format_value


def layer_numbers(snapshot: BudgetSnapshot) -> list[dict[str, float]]:
    """For each layer every metric of BUDGET_METRICS that has a value."""
    numbers: list[dict[str, float]] = []
    for layer, (slots, loss) in enumerate(zip(snapshot.slots, snapshot.losses, strict=True)):
        found: dict[str, float] = {'slots': slots, 'dropped_tokens': loss.dropped_tokens}
        if snapshot.preferences:
            found |= snapshot.preferences[layer]._asdict()
        if loss.lost_mass is not None:
            found['lost_mass'] = loss.lost_mass
        numbers.append(found)
    return numbers


def layer_histograms(snapshot: BudgetSnapshot) -> list[dict[str, dict[str, Any]]]:
    """For each layer the histograms of BUDGET_HISTOGRAMS that hold a value, as arguments of
    `add_histogram_raw`; a bucket for each token of a window."""
    parts = {'kept_positions': snapshot.kept, 'kept_tokens': snapshot.root}
    return [
        {
            name: places_histogram(layers[layer], snapshot.context)
            for name, layers in parts.items()
            if layers[layer].size
        }
        for layer in range(len(snapshot.slots))
    ]


def places_histogram(places: np.ndarray, context: int) -> dict[str, Any]:
    """Arguments of `add_histogram_raw` for places in `[0, context)` (int64, at least one)."""
    counts = np.bincount(places, minlength=context)
    return {
        'min': int(places.min()),
        'max': int(places.max()) + 1,
        'num': len(places),
        'sum': int(places.sum()),
        'sum_squares': int((places * places).sum()),
        'bucket_limits': list(range(1, len(counts) + 1)),
        'bucket_counts': counts.tolist(),
    }


def budget_table(layers: Mapping[int, Mapping[str, float]], title: str = 'Layer budgets') -> Table:
    """Return a table with one row per layer and one column per metric.

    Args:
        layers: layer -> metric -> number; a metric that no layer has gets no column.
        title: the line above the table.
    """
    shown = [name for name in BUDGET_METRICS if any(name in numbers for numbers in layers.values())]
    table = Table(title=title, title_justify='left')
    table.add_column('layer', justify='right')
    for name in shown:
        table.add_column(name, justify='right')
    for layer, numbers in sorted(layers.items()):
        cells = (
            '-' if name not in numbers else format_value(numbers[name], BUDGET_METRICS[name].unit)
            for name in shown
        )
        table.add_row(str(layer), *cells)
    return table
