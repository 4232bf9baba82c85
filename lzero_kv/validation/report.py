"""Results of a bounded training with validation: verdict, JSON, a page of Markdown and a picture."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from lzero_kv.telemetry.counters import KINDS, Cause, Counters, ValidationCounters
from lzero_kv.telemetry.reading import columns_of
from lzero_kv.telemetry.table import markdown_table, validation_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERDICTS = {
    'equal': '#0072b2',
    'different': '#e69f00',
    'unexplained': '#d55e00',
    'cache_wrong': '#aa3377',
}
OF_STOCK = ('different', 'unexplained', 'largest_stock', 'policy_', 'value_')
"""Beginnings of the names of numbers that need the stock cache."""
BAR = 0.8  # of the place of one bar


@dataclass(frozen=True)
class Failure:
    """A saved finding: ``sentence`` is its first line."""

    file: str
    sentence: str


@dataclass(frozen=True)
class ModeRun:
    """One training in one mode of validation.

    Attributes:
        mode: ``'recompute'``, ``'store'`` or ``'model'``.
        counters: what was counted.
        collected, evaluated: environment steps of collection and of evaluation.
        iterations: training iterations.
        simulations: simulations of a search.
        seconds: wall time, without the start of the process.
        failures: what was saved.
        notes: what was changed in the config, or came otherwise than asked for.
    """

    mode: str
    counters: ValidationCounters
    collected: int
    evaluated: int
    iterations: int
    simulations: int
    seconds: float
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Environment steps of collection and evaluation."""
        return self.collected + self.evaluated

    @property
    def stock(self) -> bool:
        """Whether LightZero's own cache was compared, too."""
        return self.mode != 'recompute'

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Columns of a table, without numbers of a stock cache that was not compared."""
        columns = columns_of(self.counters)
        if self.stock:
            return columns
        return {kind: _without_stock(numbers) for kind, numbers in columns.items()}

    @property
    def missing(self) -> str:
        """What should have been compared and was not, as a sentence; empty where nothing is missing."""
        roots, nodes = self.counters.roots, self.counters.nodes + self.counters.reanalysis
        kinds = [name for name, kind in (('root', roots), ('node', nodes)) if not kind.compared]
        if not kinds:
            return ''
        crashed = self.counters.total.causes[Cause.CRASHED]
        why = (
            f"LightZero's own code crashed in {crashed:,} rows; write an env_num of all environments"
            if crashed
            else 'write a larger --env-steps, or a larger --rate'
        )
        searches = f'{self.counters.searches:,} searches'
        return f'mode {self.mode} compared no {" and no ".join(kinds)} in {searches}: {why}'


def _without_stock(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if not name.startswith(OF_STOCK)}


MODE_RUN = TypeAdapter(ModeRun)
"""Reads and writes a run as plain numbers and strings, for JSON."""


@dataclass(frozen=True)
class ValidationReport:
    """Trainings of one config, one for each mode.

    Attributes:
        config: the config file.
        arguments: what the config file was given on its command line.
        command: what runs all of it again.
        versions: of the packages that matter, by name.
        runs: one for each mode.
    """

    config: str
    arguments: tuple[str, ...]
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[ModeRun, ...] = ()

    @property
    def total(self) -> Counters:
        """All modes and kinds together."""
        return sum((run.counters.total for run in self.runs), Counters())

    @property
    def stock(self) -> bool:
        """Whether LightZero's own cache was compared in any mode."""
        return any(run.stock for run in self.runs)

    @property
    def passed(self) -> bool:
        """Whether each mode compared roots and nodes, and none of them is a failure."""
        return self.total.failures == 0 and not self.missing

    @property
    def missing(self) -> str:
        """What was not compared: a sentence for each mode in which something is missing."""
        return '; '.join(run.missing for run in self.runs if run.missing) if self.runs else 'no mode ran'

    @property
    def verdict(self) -> str:
        """One sentence, for people."""
        total = self.total
        if self.passed:
            return (
                f'Passed: of {total.compared:,} rows compared ({self._kinds}) {total.equal:,} are equal'
                f'{self._words_on_stock}, and the cache was never wrong (its largest rounding error is '
                f'{total.largest_cache:.2g}).'
            )
        if not total.failures:
            return f'NOT passed: {self.missing}.'
        unexplained = f'{total.unexplained:,} differ without a proven cause, and ' if self.stock else ''
        return (
            f'NOT passed: of {total.compared:,} rows compared {unexplained}in {total.cache_wrong:,} the '
            'cache was wrong.'
        )

    @property
    def _words_on_stock(self) -> str:
        """What a report that passed says of the stock cache; where that did not run, what was equal."""
        if not self.stock:
            return ' to the recomputation'
        different = self.total.different
        wrong = (
            f'in {different:,} the stock cache was wrong, each time for a proven cause'
            if different
            else 'the stock cache was never wrong'
        )
        return f' and {wrong}; 0 are unexplained'

    @property
    def _kinds(self) -> str:
        counts = {kind: sum(getattr(run.counters, kind).compared for run in self.runs) for kind in KINDS}
        return ', '.join(f'{kind} {count:,}' for kind, count in counts.items() if count)

    def as_json(self) -> str:
        """One JSON document; a difference without a number (another shape, nothing there) is a string."""
        plain = json.loads(REPORT.dump_json(self))
        return json.dumps({**plain, 'passed': self.passed, 'verdict': self.verdict}, indent=2)


REPORT = TypeAdapter(ValidationReport)
"""Writes a report as JSON, and reads it."""

_STOCK_TOO = (
    "Every row was answered by the cache, by LightZero's own (stock) cache, and by a recomputation of "
    'the history without any cache, which says which of the two is right.'
)
_RECOMPUTED = (
    'Every row was answered by the cache, and by a recomputation of the history without any cache, which is '
    "right. LightZero's own (stock) cache was not compared."
)


def validation_page(report: ValidationReport, picture: str) -> str:
    """Return the page.

    Args:
        report: what ran and what was found.
        picture: the picture's file, relative to the page.
    """
    name = Path(report.config).name
    parts = [
        f'# Validation of lzero_kv: {name}',
        f'**{report.verdict}**',
        _STOCK_TOO if report.stock else _RECOMPUTED,
        f'![rows compared{" and causes" if report.stock else ""}]({picture})',
        '## What ran',
        _what_ran(report),
        *(_found(run) for run in report.runs),
        '## Failures',
        _failures(report.runs),
        '## To run it again',
        f'```bash\n{report.command}\n```',
    ]
    return '\n\n'.join(parts) + '\n'


def _what_ran(report: ValidationReport) -> str:
    runs = report.runs
    common = {'config': f'`{report.config}`', 'its arguments': f'`{" ".join(report.arguments) or "none"}`'}
    rows = [('', *(f'mode {run.mode}' for run in runs))]
    rows += [(name, *(text for _ in runs)) for name, text in {**common, **report.versions}.items()]
    numbers = {
        'environment steps collected': [f'{run.collected:,}' for run in runs],
        'environment steps evaluated': [f'{run.evaluated:,}' for run in runs],
        'training iterations': [f'{run.iterations:,}' for run in runs],
        'searches (with nodes compared)': [
            f'{run.counters.searches:,} ({run.counters.validated:,})' for run in runs
        ],
        'simulations of a search': [f'{run.simulations:,}' for run in runs],
        'wall time': [f'{run.seconds:.0f} s' for run in runs],
    }
    rows += [(name, *texts) for name, texts in numbers.items()]
    notes = [f'- mode {run.mode}: {note}' for run in runs for note in run.notes]
    return '\n'.join([markdown_table(rows), *(['', *notes] if notes else [])])


def _found(run: ModeRun) -> str:
    table = markdown_table(list(validation_rows(run.columns)))
    causes = '\n\nA row with several causes counts under each.' if run.stock else ''
    return f'## What mode {run.mode} found\n\n{table}{causes}'


def _failures(runs: Sequence[ModeRun]) -> str:
    lines = [
        f'- mode {run.mode}: {failure.sentence}\n  `lzero-kv explain {failure.file}`'
        for run in runs
        for failure in run.failures
    ]
    if lines:
        return '\n'.join(lines)
    return 'None.' if not any(run.counters.total.failures for run in runs) else 'None of them was saved.'


def plot_validation(report: ValidationReport, path: Path) -> Path:
    """Draw rows by verdict and differences by cause, one line of panels for each mode, and write them as PNG.

    Causes are drawn where the stock cache was compared.

    Raises:
        ValueError: the file cannot be written.
    """
    # Imported here so that a broken plotting library does not take the commands with it.
    # LightZero's imports let every logger tell all.
    logging.getLogger('matplotlib').setLevel(logging.WARNING)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9 * len(report.runs) + 0.6), layout='constrained')
    FigureCanvasAgg(figure)
    other = 'the cache of LightZero' if report.stock else 'a recomputation without a cache'
    figure.suptitle(f'lzero_kv and {other}, {Path(report.config).name}', fontsize=10)
    panels = figure.subplots(len(report.runs), 2 if report.stock else 1, squeeze=False)
    for run, (left, *right) in zip(report.runs, panels, strict=True):
        _draw_verdicts(left, run)
        for panel in right:
            if run.stock:
                _draw_causes(panel, run)
            else:
                panel.set_axis_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower left', ncols=len(VERDICTS), fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f'cannot write the picture to {path}: {error.strerror}') from error
    return path


def _draw_verdicts(panel: Axes, run: ModeRun) -> None:
    kinds = list(columns_of(run.counters))
    for number, (verdict, colour) in enumerate(VERDICTS.items()):
        place = (number - 1.5) * BAR / len(VERDICTS)
        counts = [columns_of(run.counters)[kind][verdict] for kind in kinds]
        bars = panel.barh(
            [index + place for index in range(len(kinds))],
            counts,
            height=BAR / len(VERDICTS),
            color=colour,
            label=verdict.replace('_', ' '),
        )
        panel.bar_label(bars, [f'{count:,.0f}' for count in counts], padding=2, fontsize=7)
    panel.set_yticks(range(len(kinds)), kinds)
    panel.set_title(f'mode {run.mode}: rows compared', fontsize=10, loc='left')
    _logarithmic(panel, run.counters.total.compared)


def _draw_causes(panel: Axes, run: ModeRun) -> None:
    counts = {cause.value.replace('_', ' '): run.counters.total.causes[cause] for cause in Cause}
    bars = panel.barh(list(counts), list(counts.values()), color=VERDICTS['different'])
    panel.bar_label(bars, [f'{count:,}' for count in counts.values()], padding=2, fontsize=7)
    panel.tick_params(axis='y', labelsize=8)
    panel.set_title(f'mode {run.mode}: why the stock cache was wrong', fontsize=10, loc='left')
    _logarithmic(panel, max(counts.values()))


def _logarithmic(panel: Axes, highest: int) -> None:
    """Counts of one and of hundred thousands in one panel; a count of 0 has no bar and keeps its label."""
    panel.set_xscale('symlog', linthresh=1)
    panel.set_xlim(0, 10 ** (math.log10(max(highest, 10)) * 1.15 + 0.2))
    panel.invert_yaxis()
    panel.grid(alpha=0.3, axis='x')
