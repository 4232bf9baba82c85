"""Layer budgets in the report's picture: a map of layers and time, and the tokens that a root holds."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from lzero_kv.telemetry.metrics import LAYER_PREFIX, TagName
from lzero_kv.telemetry.read import RunLog

MAPS = (
    ('slots', 'tokens of each layer', 1),
    ('lost_mass', 'attention lost by each layer, %', 100),
)
"""Metric, title, and the factor of what is drawn."""


def draw_budgets(panels: list[Axes], run: RunLog) -> None:
    """Draw the layer-by-time maps of MAPS.

    Args:
        panels: one for each map, in their order; the horizontal axis is environment steps.
        run: a log with layer budgets.
    """
    for panel, (metric, title, factor) in zip(panels, MAPS, strict=True):
        _draw_map(panel, run, metric, factor)
        panel.set_title(f'layer budgets: {title}', fontsize=10, loc='left')


def _draw_map(panel: Axes, run: RunLog, metric: str, factor: int) -> None:
    layers = list(run.layers())
    series = [run.series(f'{LAYER_PREFIX}{layer}', metric) for layer in layers]
    steps = np.unique(np.concatenate([one.steps for one in series if one is not None] or [np.empty(0)]))
    panel.set_ylabel('layer')
    panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    if not len(steps):
        panel.text(0.5, 0.5, 'no attention was read', ha='center', transform=panel.transAxes, fontsize=8)
        return
    values = np.full((len(layers), len(steps)), np.nan)
    for row, one in enumerate(series):
        if one is not None:
            values[row, np.searchsorted(steps, one.steps)] = factor * one.values
    # a point stands for the interval that ended with it
    edges = np.concatenate([[0], steps]) if steps[0] > 0 else np.concatenate([steps, steps[-1:] + 1])
    mesh = panel.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, values, cmap='viridis', vmin=0)
    panel.invert_yaxis()
    bar = panel.figure.colorbar(mesh, ax=panel, pad=0.01, aspect=12)
    bar.ax.tick_params(labelsize=7)


def draw_kept_tokens(panel: Axes, run: RunLog) -> None:
    """Draw which places of its window one root holds in each layer, at the last point that knows it."""
    layers = list(run.layers())
    panel.set_title('layer budgets: tokens that one root holds at the last point', fontsize=10, loc='left')
    panel.set_ylabel('layer')
    panel.set_xlabel('place in the window, 0 for its oldest token')
    panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    for row, layer in enumerate(layers):
        points = run.histograms.get(TagName(f'{LAYER_PREFIX}{layer}', 'kept_tokens'), ())
        if points:
            last = max(points, key=lambda point: point.step)
            held = np.array(last.limits)[np.array(last.counts) > 0] - 1  # a bucket for each place
            panel.bar(held, 0.7, width=0.8, bottom=row - 0.35, color='#0072b2')
    panel.set_ylim(len(layers) - 0.4, -0.6)
    panel.set_xlim(left=-1)
