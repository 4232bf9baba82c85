"""A validation report as one page of Markdown and one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lzero_kv.telemetry.counters import Cause
from lzero_kv.telemetry.reading import columns_of
from lzero_kv.telemetry.table import markdown_table, validation_rows
from lzero_kv.validation.report import ModeRun, ValidationReport

VERDICTS = {
    'equal': '#0072b2',
    'different': '#e69f00',
    'unexplained': '#d55e00',
    'cache_wrong': '#aa3377',
}
BAR = 0.8  # of the place of one bar


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
        "Every row was answered by the cache, by LightZero's own (stock) cache, and by a recomputation of "
        'the history without any cache, which says which of the two is right.',
        f'![rows compared and causes]({picture})',
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
    columns = columns_of(run.counters)
    table = markdown_table(list(validation_rows(columns)))
    return f'## What mode {run.mode} found\n\n{table}\n\nA row with several causes counts under each.'


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

    Raises:
        ValueError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 2.9 * len(report.runs) + 0.6), layout='constrained')
    FigureCanvasAgg(figure)
    figure.suptitle(f'lzero_kv and the cache of LightZero, {Path(report.config).name}', fontsize=10)
    panels = figure.subplots(len(report.runs), 2, squeeze=False)
    for run, (left, right) in zip(report.runs, panels, strict=True):
        _draw_verdicts(left, run)
        _draw_causes(right, run)
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
