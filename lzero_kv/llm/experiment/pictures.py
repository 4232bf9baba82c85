"""Pictures of a sweep: quality against bytes, tokens of each layer, kept positions, speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lzero_kv.budget import ALLOCATIONS
from lzero_kv.llm.experiment.methods import FULL
from lzero_kv.llm.experiment.summary import Memory, Summary, by_ratio, pareto_front
from lzero_kv.sweep.intervals import Estimate

# Colours that colour-blind readers tell apart; further algorithms take matplotlib's own.
COLOURS = {
    'full': '#000000',
    'cake': '#d55e00',
    'h2o': '#0072b2',
    'hace': '#aa3377',
    'snapkv': '#009e73',
    'streaming': '#999999',
}
MARKERS = dict(zip(ALLOCATIONS, 'osv^', strict=True))
DPI = 110
COLUMNS = 3
MOST = 2.5  # colours of the layers end here, at a multiple of the mean
BESIDE = 0.06  # octaves between the points of two algorithms at the same bytes


def draw_all(found: Sequence[Summary], folder: Path) -> dict[str, str]:
    """Draw what was measured: the file of each picture in ``folder``, and what it shows."""
    held = [one for group in by_ratio(found).values() for one in group if one.memory]
    pictures: dict[str, tuple[Callable[[Sequence[Summary], Path], None], str, bool]] = {
        'quality.png': (draw_quality, 'Quality against bytes', any(one.kl or one.relative for one in held)),
        'layers.png': (draw_layers, 'Tokens of each layer', bool(held)),
        'kept.png': (draw_kept, 'Where kept tokens stand', bool(held)),
        'speed.png': (draw_speed, 'Speed', any(one.next_token for one in found)),
    }
    for name, (draw, _, measured) in pictures.items():
        if measured:
            draw(found, folder / name)
    return {name: text for name, (_, text, measured) in pictures.items() if measured}


def draw_quality(found: Sequence[Summary], path: Path) -> None:
    """KL divergence and relative score against the kept part of the full cache, a panel for each task."""
    shown = [one for one in found if one.algorithm != FULL and one.memory]
    panels = [
        (task, name, label, some)
        for name, label in (('kl', 'KL, nats per token'), ('relative', 'score, % of full'))
        for task in _names(one.task for one in shown)
        if (some := [one for one in shown if one.task == task and getattr(one, name)])
    ]
    columns = min(len(_names(one.task for one in shown)), COLUMNS)
    rows = -(-len(panels) // columns)
    figure = _figure(4.4 * columns + 0.6, 3.4 * rows + 0.8)
    for place, (task, name, label, some) in enumerate(panels, 1):
        panel = figure.add_subplot(rows, columns, place)
        panel.set_title(f'{task}: {label}', fontsize=10, loc='left')
        panel.set_xlabel('bytes kept, % of the full cache', fontsize=9)
        _draw_measure(panel, some, name)
    figure.legend(handles=_legend(shown), loc='outside lower center', ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=DPI)


def _memory(one: Summary) -> Memory:
    """Of a summary that has some: others are not drawn."""
    assert one.memory is not None
    return one.memory


def _draw_measure(panel: Axes, shown: Sequence[Summary], name: str) -> None:
    panel.set_xscale('log', base=2)
    panel.grid(alpha=0.3, axis='y')
    algorithms = _names(one.algorithm for one in shown)
    for one in shown:
        number: Estimate = getattr(one, name)
        beside = BESIDE * (algorithms.index(one.algorithm) - (len(algorithms) - 1) / 2)
        panel.errorbar(
            100 * _memory(one).part * 2**beside,
            number.value,
            [[max(0, number.value - number.low)], [max(0, number.high - number.value)]],
            fmt=_marker(one),
            color=_colour(one.algorithm),
            markersize=5,
            elinewidth=0.8,
            alpha=0.9,
        )
    _draw_front(panel, shown, name)
    ticks = sorted({float(f'{100 * one.ratio:.3g}') for one in shown})
    panel.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    panel.minorticks_off()
    if name == 'kl':
        panel.set_yscale('log')
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.axhline(100, color='k', lw=0.8, ls=(0, (4, 2)))


def _draw_front(panel: Axes, shown: Sequence[Summary], name: str) -> None:
    """The steps of what the bytes buy at best."""
    sign = 1 if name == 'kl' else -1
    points = [(_memory(one).part, sign * getattr(one, name).value) for one in shown]
    front = [points[index] for index in pareto_front(points)]
    parts, means = zip(*front, strict=True)
    right = max(part for part, _ in points)
    panel.step(
        [*(100 * part for part in parts), 100 * right],
        [*(sign * mean for mean in means), sign * means[-1]],
        where='post',
        color='k',
        lw=0.8,
        zorder=0,
    )


def _legend(found: Sequence[Summary]) -> list[Line2D]:
    shown = [one for one in found if one.algorithm != FULL]
    handles = [
        Line2D([], [], color=_colour(name), marker='o', ls='', label=name)
        for name in _names(one.algorithm for one in shown)
    ]
    allocations = _names(one.allocation for one in shown if one.allocation)
    handles += [
        Line2D([], [], color='k', marker=MARKERS.get(name, 'o'), ls='', mfc='none', label=name)
        for name in allocations
    ]
    return [*handles, Line2D([], [], color='k', lw=0.8, label='Pareto front of the means')]


def draw_layers(found: Sequence[Summary], path: Path) -> None:
    """Heat map of the tokens that each layer holds, as a multiple of the mean of the layers: a panel for each
    ratio, a line for each method, the mean over all tasks."""
    groups = by_ratio(one for one in found if one.memory)
    heights = [len(_names(one.method for one in group)) for group in groups.values()]
    figure = _figure(9, sum(0.22 * height + 0.5 for height in heights) + 0.6)
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    image: Any = None
    for panel, (ratio, group) in zip(panels, groups.items(), strict=True):
        methods = _names(one.method for one in group)
        shares = np.stack([_mean_of(group, method, lambda one: _memory(one).shares) for method in methods])
        image = panel.imshow(
            shares / shares.mean(axis=1, keepdims=True), aspect='auto', cmap='PuOr_r',
            norm=TwoSlopeNorm(1, 0, MOST), interpolation='nearest',
        )  # fmt: skip
        panel.set_yticks(range(len(methods)), methods, fontsize=8)
        panel.set_title(f'ratio {ratio:g}', fontsize=10, loc='left')
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel('layer')
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=40, extend='max')
    bar.set_label('tokens of the layer / mean of the layers', fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_kept(found: Sequence[Summary], path: Path) -> None:
    """Where kept tokens stand in the document: layers against positions, a line of panels for each ratio."""
    groups = by_ratio(one for one in found if one.memory)
    most = max(len(_names(one.method for one in group)) for group in groups.values())
    columns = min(most, 6)
    lines = [
        (ratio, methods[first : first + columns], group)
        for ratio, group in groups.items()
        for methods in [_names(one.method for one in group)]
        for first in range(0, len(methods), columns)
    ]
    figure = _figure(2.2 * columns + 1.2, 1.9 * len(lines) + 0.6)
    panels = figure.subplots(len(lines), columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for line, (ratio, methods, group) in zip(panels, lines, strict=True):
        for panel in line[len(methods) :]:
            panel.axis('off')
        for panel, method in zip(line, methods, strict=False):
            kept = _mean_of(group, method, lambda one: _memory(one).kept)
            edge = len(kept) - 0.5
            image = panel.imshow(
                100 * kept, aspect='auto', cmap='viridis', norm=PowerNorm(0.5, 0, 100),
                extent=(0, 100, edge, -0.5), interpolation='nearest',
            )  # fmt: skip
            panel.set_title(method, fontsize=8, loc='left')
        line[0].set_ylabel(f'ratio {ratio:g}\nlayer', fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel('position, %', fontsize=8)
    bar = figure.colorbar(image, ax=panels, pad=0.01, aspect=40)
    bar.set_label('tokens kept, %', fontsize=8)
    figure.savefig(path, dpi=DPI)


def draw_speed(found: Sequence[Summary], path: Path) -> None:
    """Time to the first token and time of each further one; the line is the full cache's."""
    timed = [one for one in found if one.first_token or one.next_token]
    figure = _figure(9, 0.22 * len(timed) + 1.2)
    panels = figure.subplots(1, 2, sharey=True)
    places = range(len(timed))
    for panel, name, title in (
        (panels[0], 'first_token', 'time to the first token, s'),
        (panels[1], 'next_token', 'time of each further token, ms'),
    ):
        factor = 1 if name == 'first_token' else 1000
        numbers: list[Estimate] = [getattr(one, name) for one in timed]
        means = [factor * number.value for number in numbers]
        errors = [
            [max(0, factor * (number.value - number.low)) for number in numbers],
            [max(0, factor * (number.high - number.value)) for number in numbers],
        ]
        colours = [_colour(one.algorithm) for one in timed]
        panel.barh(places, means, xerr=errors, color=colours, height=0.75, error_kw={'elinewidth': 0.8})
        for mean, one in zip(means, timed, strict=True):
            if one.algorithm == FULL:
                panel.axvline(mean, color='k', lw=0.8, ls=(0, (4, 2)))
        panel.set_title(title, fontsize=10, loc='left')
        panel.grid(alpha=0.3, axis='x')
    panels[0].set_yticks(places, [one.method for one in timed], fontsize=8)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=DPI)


def _mean_of(found: Sequence[Summary], method: str, of: Callable[[Summary], np.ndarray]) -> np.ndarray:
    return np.mean([of(one) for one in found if one.method == method], axis=0)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _names(names: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(names))


def _colour(algorithm: str) -> str:
    return COLOURS.get(algorithm, '#e69f00')


def _marker(one: Summary) -> str:
    return MARKERS.get(one.allocation or '', 'o')
