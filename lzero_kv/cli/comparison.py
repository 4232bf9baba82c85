"""Stock and plugin side by side, from the rows of a comparison: estimates, table, picture and sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table

from lzero_kv.sweep.intervals import Estimate, difference, quotient
from lzero_kv.sweep.rows import Row
from lzero_kv.telemetry.table import text_table

STOCK, PLUGIN = 'stock', 'lzero_kv'
SEARCH, ROOTS, SAMPLING, LEARNING = 'search', 'root inference', 'sampling', 'learning'
WHOLE = 'whole training'
EVALUATION = 'evaluation'
PARTS = (SEARCH, ROOTS, SAMPLING, LEARNING, EVALUATION)
"""Parts that are timed; they do not overlap: a search inside sampling (reanalysis) or inside an evaluation
counts as theirs. Only trainings to a return have evaluations."""
REST = 'environments and the rest'
RETURN = 'mean return of the episodes'
COLOURS = {
    SEARCH: '#0072b2',
    ROOTS: '#56b4e9',
    SAMPLING: '#e69f00',
    LEARNING: '#d55e00',
    EVALUATION: '#009e73',
    REST: '#999999',
}
FEW = 5  # seeds below which a bootstrap of them is too narrow


@dataclass(frozen=True)
class Comparison:
    """The pairs of a comparison: seeds that were trained with the flag off and on.

    Attributes:
        stock, plugin: the rows of the same seeds in the same order.
    """

    stock: Sequence[Row]
    plugin: Sequence[Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Comparison:
        """Pair the rows by seed; what has no partner yet is left out."""
        arms = {arm: {row['seed']: row for row in rows if row['task'] == arm} for arm in (STOCK, PLUGIN)}
        seeds = sorted(arms[STOCK].keys() & arms[PLUGIN].keys())
        return cls(*([arms[arm][seed] for seed in seeds] for arm in (STOCK, PLUGIN)))

    @property
    def clock(self) -> str:
        """The clock that counts: of the processor, or on the wall where a GPU works beside it."""
        return 'wall' if self.stock[0]['device'].startswith('cuda') else 'processor'

    def values(self, quantity: Callable[[Row], float | None]) -> list[list[float]]:
        """A quantity of both arms, over the pairs in which both have it."""
        pairs = [(quantity(a), quantity(b)) for a, b in zip(self.stock, self.plugin, strict=True)]
        whole = [(a, b) for a, b in pairs if a is not None and b is not None]
        return [[a for a, _ in whole], [b for _, b in whole]]

    def ratio(self, quantity: Callable[[Row], float | None]) -> Estimate | None:
        """The plugin's mean as a part of stock's; None where stock has none of it."""
        stock, plugin = self.values(quantity)
        return quotient(plugin, stock) if any(stock) else None

    def difference_of_returns(self) -> Estimate | None:
        """Plugin less stock; None where no pair has episodes that ended."""
        stock, plugin = self.values(mean_return)
        return difference(plugin, stock) if stock else None

    @property
    def quantities(self) -> dict[str, Callable[[Row], float | None]]:
        """What the table shows, by name."""
        return {
            **{name: partial(seconds, self.clock, name) for name in (*self.parts, WHOLE)},
            'environment steps per second': lambda row: row['env_steps'] / row['wall'][WHOLE],
            'peak memory, MiB': lambda row: row['peak_bytes'] / 2**20,
            **self.to_return,
        }

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of these trainings."""
        return tuple(part for part in (*PARTS, REST) if part != EVALUATION or self.until is not None)

    @property
    def until(self) -> float | None:
        """The return of an evaluation that ended a training; None for trainings without evaluations."""
        return self.stock[0].get('until')

    @property
    def to_return(self) -> dict[str, Callable[[Row], float]]:
        """What a training took until the return, or to its end where it did not reach it (restricted means).

        To leave out what did not reach it would favour the arm that fails. Empty for trainings without
        evaluations.
        """
        if self.until is None:
            return {}
        return {
            'environment steps until then or the end': lambda row: row['env_steps'],
            f'{self.clock} seconds until then or the end': lambda row: row[self.clock][WHOLE],
        }

    def table(self) -> Table:
        """The :meth:`cells` for a terminal."""
        title = (
            f'{self.clock.capitalize()} seconds for 1,000 environment steps, and more; mean of {self.seeds}'
        )
        return text_table(self.cells(), title)

    def cells(self) -> list[tuple[str, ...]]:
        """One row for each quantity: means of both arms, and their ratio with its interval; a head first."""
        rows: list[tuple[str, ...]] = [('', STOCK, PLUGIN, f'{PLUGIN} / {STOCK}')]
        for name, quantity in self.quantities.items():
            rows.append((name, *self._means(quantity), self._shown(self.ratio(quantity))))
        if self.until is not None:
            stock, plugin = self._reached()
            rows.append((f'trainings that reached {self.until:g}', str(stock), str(plugin), ''))
        elif (difference := self.difference_of_returns()) is not None:
            rows.append((RETURN, *self._means(mean_return), f'difference {self._shown(difference)}'))
        return rows

    def _means(self, quantity: Callable[[Row], float | None]) -> list[str]:
        return [f'{np.mean(values):,.4g}' for values in self.values(quantity)]

    def sentence(self) -> str:
        """What was found, in one sentence."""
        search, whole = (
            self._shown(self.ratio(partial(seconds, self.clock, name))) for name in (SEARCH, WHOLE)
        )
        steps = min(row['env_steps'] for row in (*self.stock, *self.plugin))
        few = '; with fewer than five seeds intervals are too narrow' if len(self.stock) < FEW else ''
        return (
            f"With the flag, search took {search} of stock's {self.clock} time and the whole training {whole}"
            f' ({self.seeds}, {steps:,} environment steps or more); {self._words_on_returns()}{few}.'
        )

    @property
    def seeds(self) -> str:
        """How many, in words."""
        return f'{len(self.stock)} seed{"s" if len(self.stock) > 1 else ""}'

    def _reached(self) -> list[int]:
        return [sum(row['reached'] for row in rows) for rows in (self.stock, self.plugin)]

    def _words_on_reaching(self) -> str:
        stock, plugin = self._reached()
        steps, time = (self._shown(self.ratio(quantity)) for quantity in self.to_return.values())
        return (
            f'{stock} reached a return of {self.until:g} without the flag and {plugin} with it; until then '
            f"or the end trainings took {steps} of stock's environment steps and {time} of its time"
        )

    def _words_on_returns(self) -> str:
        if self.until is not None:
            return self._words_on_reaching()
        found = self.difference_of_returns()
        if found is None:
            return 'no episode ended, so nothing is known of returns'
        if len(self.stock) == 1 or found.low <= 0 <= found.high:
            return f'returns do not tell the two apart (difference {self._shown(found)})'
        return f'returns are {"higher" if found.value > 0 else "lower"} with the flag by {self._shown(found)}'

    def _shown(self, estimate: Estimate | None) -> str:
        if estimate is None:
            return '-'
        interval = f' [{estimate.low:.2f}, {estimate.high:.2f}]' if len(self.stock) > 1 else ''
        return f'{estimate.value:.2f}{interval}'

    def draw(self, path: Path) -> Path:
        """Write the picture: time by part, and returns over environment steps."""
        # Imported here so that a broken plotting library does not take the other commands with it.
        # LightZero's imports let every logger tell all.
        logging.getLogger('matplotlib').setLevel(logging.WARNING)
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout='constrained')
        FigureCanvasAgg(figure)
        bars, curves = figure.subplots(1, 2)
        below = np.zeros(2)
        for part in self.parts:
            colour = COLOURS[part]
            found = np.array([np.mean(v) for v in self.values(partial(seconds, self.clock, part))])
            bars.bar((STOCK, PLUGIN), found, bottom=below, color=colour, label=part, width=0.55)
            below += found
        bars.set_title(f'{self.clock} seconds for 1,000 environment steps', fontsize=10, loc='left')
        bars.set_xlim(-0.5, 1.5)
        bars.legend(fontsize=8, frameon=False, loc='center left', bbox_to_anchor=(1.0, 0.5), reverse=True)
        for arm, rows, colour in ((STOCK, self.stock, '#999999'), (PLUGIN, self.plugin, '#0072b2')):
            for number, row in enumerate(rows):
                label = None if number else arm
                curves.plot(*by_collection(row), color=colour, alpha=0.6, marker='.', label=label)
        curves.set_title('mean return of each collection, a line for each seed', fontsize=10, loc='left')
        curves.set_xlabel('environment steps')
        curves.legend(fontsize=8, frameon=False)
        figure.savefig(path, dpi=110)
        return path


def seconds(clock: str, part: str, row: Row) -> float:
    """Seconds of a part for 1,000 environment steps of collection."""
    spent = row[clock]
    own = spent[WHOLE] - sum(spent.get(name, 0.0) for name in PARTS) if part == REST else spent.get(part, 0.0)
    return 1000 * own / row['env_steps']


def mean_return(row: Row) -> float | None:
    """Of all episodes that ended; None without one."""
    return float(np.mean([value for _, value in row['returns']])) if row['returns'] else None


def by_collection(row: Row) -> tuple[list[int], list[float]]:
    """Environment steps and mean return of each collection."""
    found: dict[int, list[float]] = {}
    for step, value in row['returns']:
        found.setdefault(step, []).append(value)
    return list(found), [float(np.mean(values)) for values in found.values()]
