"""Pictures of what was measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .players import Numbers
from .tables import PARTS

matplotlib.use('Agg')

STYLES = {
    'stock': dict(color='#b2182b', marker='o'),
    'rebuild': dict(color='#2166ac', marker='s'),
    'shift': dict(color='#67a9cf', marker='^'),
    'floor': dict(color='#555555', marker='', linestyle='--'),
}
"""Others take matplotlib's next colour."""
AXES = {
    'layers': 'layers',
    'environments': 'environments',
    'simulations': 'simulations of a search',
    'context': 'tokens of a window',
    'pool': 'nodes that the pool holds',
}
COLOURS = {'model': '#2166ac', 'cache': '#b2182b', 'tree': '#4dac26', 'rest': '#bababa'}


def growth_plot(found: dict[str, dict[int, dict[str, Numbers]]], file: Path) -> None:
    """Milliseconds of a simulation by each size: one panel each, axes from zero, so that what is proportional
    is a straight line from the corner."""
    figure = Figure(figsize=(10, 6.2), layout='constrained')
    panels = list(figure.subplots(2, 3).flat)
    for panel, (size, values) in zip(panels, found.items(), strict=False):
        _lines(panel, values)
        panel.set_xlabel(AXES[size])
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    handles = {
        label: handle
        for panel in panels[: len(found)]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    where = panels[len(found)] if len(found) < len(panels) else panels[0]
    where.legend(handles.values(), handles.keys(), loc='center', fontsize=12, frameon=False)
    figure.supylabel('processor time of one simulation, ms')
    figure.savefig(file, dpi=110)


def _lines(panel: Axes, values: dict[int, dict[str, Numbers]]) -> None:
    for name in next(iter(values.values())):
        times = [contestants[name]['simulation_ms'] for contestants in values.values()]
        panel.plot(list(values), times, label=name, **STYLES.get(name, {}))
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_xticks(list(values))
    panel.grid(alpha=0.3)


def profile_plot(shapes: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """Where the milliseconds of a step go: one panel for each shape, one bar for each contestant."""
    figure = Figure(figsize=(10, 1.6 + 0.45 * max(map(len, shapes.values()))), layout='constrained')
    for panel, (shape, contestants) in zip(
        figure.subplots(1, len(shapes), squeeze=False)[0], shapes.items(), strict=True
    ):
        left = dict.fromkeys(contestants, 0.0)
        for part in PARTS:
            widths = [milliseconds.get(part, 0.0) for milliseconds in contestants.values()]
            panel.barh(list(contestants), widths, left=list(left.values()), label=part, color=COLOURS[part])
            left = {name: left[name] + width for name, width in zip(contestants, widths, strict=True)}
        panel.invert_yaxis()
        panel.set_title(shape)
        panel.set_xlabel('processor time of one environment step, ms')
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=len(PARTS), frameon=False)
    figure.savefig(file, dpi=110)
