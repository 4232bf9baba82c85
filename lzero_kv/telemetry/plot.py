"""The charts of the dashboard as one picture, drawn without a display."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lzero_kv.telemetry.metrics import (
    CAUSE_PREFIX,
    CHARTS,
    LAYER_PREFIX,
    SPEED_CHARTS,
    VALIDATION_CHARTS,
    Chart,
    TagName,
    Unit,
)
from lzero_kv.telemetry.read import RunLog, Series
from lzero_kv.telemetry.table import format_value

# Colours that colour-blind readers tell apart; dashes let a line show that lies under another.
LINES = {
    'roots': ('#0072b2', 'solid'),
    'nodes': ('#d55e00', (0, (4, 2))),
    'reanalysis': ('#009e73', (0, (1, 1.5))),
    'total': ('#aa3377', (0, (6, 2, 1, 2))),
}
BYTE_UNITS = (('B', 1), ('KiB', 2**10), ('MiB', 2**20), ('GiB', 2**30))
COLUMNS = 2
DASHES = ('solid', (0, (4, 2)), (0, (1, 1.5)))
MARKED_POINTS = 60  # beyond this, markers hide the line
MAPS = (
    ('slots', 'tokens of each layer', 1),
    ('lost_mass', 'attention lost by each layer, %', 100),
)
"""Metric, title, and the factor of what is drawn."""


def plot_run(run: RunLog, path: Path) -> Path:
    """Draw the dashboard's charts over environment steps, two in a row, and write them as PNG.

    The charts of a validation follow where the log has them, and the maps of layer budgets. What
    :func:`constant_charts` names is left out.

    Args:
        run: a log with at least one pool.
        path: the file to write; an existing one is replaced.

    Raises:
        ValueError: the name does not end in `.png`, or its folder does not exist or cannot be written.
    """
    if path.suffix.lower() != '.png':
        raise ValueError(
            f'the plot must be a .png file, got {path}; write for example {path.with_suffix(".png")}'
        )
    left_out = constant_charts(run)
    charts = [chart for chart in _charts(run) if chart.heading not in left_out]
    maps = MAPS if run.layers() else ()
    above = -(-len(charts) // COLUMNS)
    rows = above + len(maps) + bool(maps)
    figure = Figure(figsize=(11, 2.1 * rows + 0.6), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(f'KV cache of {run.folder}', fontsize=10)
    panels: list[Axes] = []

    def panel(columns: int, place: int) -> Axes:
        panels.append(figure.add_subplot(rows, columns, place, sharex=panels[0] if panels else None))
        return panels[-1]

    for place, chart in enumerate(charts, 1):
        _draw(panel(COLUMNS, place), chart, run)
    for row, one in enumerate(maps, above + 1):
        _draw_map(panel(1, row), run, *one)
    for lowest in panels[-1:] if maps else panels[-COLUMNS:]:
        lowest.set_xlabel('environment steps')
    if maps:
        _draw_kept_tokens(figure.add_subplot(rows, 1, rows), run)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(
            f'cannot write the plot to {path}: {error.strerror}; choose another with --out'
        ) from error
    return path


def constant_charts(run: RunLog) -> dict[str, str]:
    """Headings of the charts whose lines never moved in a log of several points, with their values."""
    found: dict[str, str] = {}
    for chart in _charts(run):
        lines = _series(run, chart)
        still = all((series.values == series.values[0]).all() for series in lines.values())
        if still and any(len(series.values) > 1 for series in lines.values()):
            shown = {name: format_value(float(one.values[0]), chart.unit) for name, one in lines.items()}
            told = [f'{name} {text}' for name, text in shown.items()]
            one, *others = set(shown.values())
            found[chart.heading] = ', '.join(told) if others else one
    return found


def _charts(run: RunLog) -> list[Chart]:
    """Charts that have points in the log."""
    charts = (*SPEED_CHARTS, *CHARTS, *VALIDATION_CHARTS)
    return [chart for chart in charts if _series(run, chart)]


def _series(run: RunLog, chart: Chart) -> dict[str, Series]:
    """The chart's lines by what tells them apart, the pool or the metric."""
    found = {
        section if len(chart.metrics) == 1 and section in LINES else name: run.series(section, name)
        for section in chart.sections
        for name in chart.metrics
    }
    return {name: series for name, series in found.items() if series is not None}


def _draw(panel: Axes, chart: Chart, run: RunLog) -> None:
    # A cause that never came would only lengthen the legend; the rows that must not be stay, at zero.
    several = len(chart.metrics) > 3
    lines = {name: one for name, one in _series(run, chart).items() if one.values.any() or not several}
    highest = max((_highest_finite(series) for series in lines.values()), default=0.0)
    label, divisor = _scale(chart.unit, highest)
    for number, (name, series) in enumerate(lines.items()):
        colour, dashes = LINES.get(name, (f'C{number}', DASHES[number % len(DASHES)]))
        panel.plot(
            series.steps,
            series.values / divisor,
            label=name.removeprefix(CAUSE_PREFIX),
            color=colour,
            linestyle=dashes,
            marker='.' if len(series.steps) <= MARKED_POINTS else '',
        )
    panel.set_title(chart.heading.removesuffix(' in bytes'), fontsize=10, loc='left')
    panel.set_ylabel(label)
    panel.ticklabel_format(axis='x', style='plain')
    if chart.logarithmic and highest > 0:
        panel.set_yscale('log', nonpositive='mask')
    else:
        # A flat line at zero is a good result of several panels: keep it visible above the lower edge.
        top = 100.0 if label == '%' else highest / divisor or 1.0
        panel.set_ylim(-0.05 * top, 1.08 * top)
    panel.grid(alpha=0.3)
    told = len(chart.metrics) == 1 and not lines.keys() & LINES.keys()  # by the heading
    if panel.lines and not told:
        panel.legend(
            loc='center left', bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, handlelength=3.5
        )


def _highest_finite(series: Series) -> float:
    """0.0 where none is: the stock answer can be infinitely far off, of another shape or not there."""
    return float(series.values[np.isfinite(series.values)].max(initial=0.0))


def _scale(unit: Unit, highest: float) -> tuple[str, float]:
    """Return the label of the vertical axis and the number of base units in one of its units."""
    if unit is Unit.FRACTION:
        return '%', 0.01
    if unit is Unit.BYTES:
        return next((name, size) for name, size in reversed(BYTE_UNITS) if size <= max(highest, 1))
    return unit.value, 1.0


def _draw_map(panel: Axes, run: RunLog, metric: str, title: str, factor: int) -> None:
    """Draw a layer-by-time map; the horizontal axis is environment steps."""
    panel.set_title(f'layer budgets: {title}', fontsize=10, loc='left')
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


def _draw_kept_tokens(panel: Axes, run: RunLog) -> None:
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
