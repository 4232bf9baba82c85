"""The Pareto plot: what a node's bytes buy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from lzero_kv.budget import ALLOCATIONS, SELECTIONS
from studies.budget.measures import pareto_front

PANELS = {
    'decisive/policy_kl_root': 'KL of the policy at the root (nats)',
    'decisive/disagreement': 'root actions that differ (%)',
}
COLOURS = dict(zip(SELECTIONS, ('#777777', '#1f77b4', '#2ca02c', '#d62728', '#9467bd'), strict=True))
MARKERS = dict(zip(ALLOCATIONS, 'osv^', strict=True))
LINEAR = {'decisive/disagreement': 1.0}
"""Where a logarithmic axis becomes linear, to show zero."""


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A point for each method and ratio, a panel for each measure and cue; the study's rows of budgets."""
    cues = list(dict.fromkeys(row['cue'] for row in rows))
    figure, axes = plt.subplots(len(PANELS), len(cues), figsize=(5.6 * len(cues), 7.6), squeeze=False)
    for line, (measure, title) in enumerate(PANELS.items()):
        for column, cue in enumerate(cues):
            ax = axes[line][column]
            _panel(ax, [row for row in rows if row['cue'] == cue], measure)
            ax.set_title(f'cue at {"the start" if cue == "start" else "a random time"}', fontsize=10)
            ax.set_ylabel(title if column == 0 else '')
            ax.set_xlabel("KiB of a history's keys and values" if line == len(PANELS) - 1 else '')
    handles = [
        Line2D([], [], color=colour, marker='o', ls='', label=name) for name, colour in COLOURS.items()
    ]
    handles += [
        Line2D([], [], color='k', marker=m, ls='', mfc='none', label=name) for name, m in MARKERS.items()
    ]
    handles += [
        Line2D([], [], color='#999999', mec='k', marker='o', ls='', label='as published'),
        Line2D([], [], color='#999999', marker='o', ls='', mfc='none', label='grid'),
        Line2D([], [], color='#999999', marker='o', ls='', label='hybrid'),
        Line2D([], [], color='k', lw=0.8, label='Pareto front'),
    ]
    figure.legend(handles=handles, loc='lower center', ncol=5, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(ax: Any, rows: Sequence[dict[str, Any]], measure: str) -> None:
    points = [(row['node_bytes'] / 1024, _loss(row, measure)) for row in rows]
    # Methods of one ratio have the same bytes; they are drawn side by side, by selection and allocation.
    order = list(SELECTIONS)
    for row, (kib, loss) in zip(rows, points, strict=True):
        place = order.index(row['selection']) + 0.18 * list(ALLOCATIONS).index(row['allocation'])
        ax.plot(
            kib * 2 ** ((place - 2.3) / 9), loss, MARKERS[row['allocation']], color=COLOURS[row['selection']],
            markersize=5.5, mfc='none' if row['kind'] == 'grid' else COLOURS[row['selection']],
            mec='k' if row['kind'] == 'published' else COLOURS[row['selection']], alpha=0.85,
        )  # fmt: skip
    front = [points[i] for i in pareto_front(points)]
    ax.step(*zip(*front, strict=True) if front else ((), ()), where='post', color='k', lw=0.8, zorder=0)
    ticks = sorted({kib for kib, _ in points})
    ax.set_xscale('log', base=2)
    ax.set_xticks(ticks, [f'{kib:.1f}' for kib in ticks])
    ax.minorticks_off()
    if measure in LINEAR:
        ax.set_yscale('symlog', linthresh=LINEAR[measure])
        ax.set_ylim(bottom=-0.2)
    else:
        ax.set_yscale('log')
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis='y', lw=0.3)


def _loss(row: dict[str, Any], measure: str) -> float:
    frames, name = measure.split('/')
    return 100 * (1 - row[f'{frames}/agreement']) if name == 'disagreement' else row[measure]
