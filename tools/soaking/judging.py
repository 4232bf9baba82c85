"""Says whether a long training stayed flat, as a table, a picture and numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from lzero_kv.telemetry.table import format_bytes
from soaking.samples import Sample

SMALLEST_RUN = 8  # samples; below, a quarter has fewer than two


@dataclass(frozen=True)
class Quantity:
    """Something that must not grow.

    Attributes:
        name: what the table says.
        of: its value in a sample; None where the sample has none.
        bound: the largest ratio of its medians, last quarter to second quarter.
        text: how the table prints it.
    """

    name: str
    of: Callable[[Sample], float | None]
    bound: float
    text: Callable[[float], str]


QUANTITIES = (
    # The host's replay buffer holds ever more segments (see replay_bytes) and is counted apart. What is left
    # moves by one or two percent between collection and training; a pool that is made again and kept, or a
    # history that is never forgotten, adds megabytes a minute.
    Quantity('memory without replay buffer', lambda sample: sample.own_bytes, 1.03, format_bytes),
    # Allocated once. The target model's pool follows its largest batch, which comes in the first quarter.
    Quantity('pool bytes', lambda sample: sample.pool_bytes, 1.0, format_bytes),
    # Processor time moves by a tenth or so with what else shares the processor's caches; a search that walks
    # through all that it ever saw would take many times as long at the end.
    Quantity(
        'processor time of one search',
        lambda sample: sample.search_seconds,
        1.25,
        lambda value: f'{1e3 * value:.1f} ms',
    ),
)


@dataclass(frozen=True)
class Judgement:
    """Medians of a quantity in the second and the last quarter of a run (the first is warm-up)."""

    quantity: Quantity
    second: float
    last: float

    @property
    def ratio(self) -> float:
        """Last quarter to second quarter."""
        return self.last / self.second if self.second else 1.0

    @property
    def flat(self) -> bool:
        """Whether the ratio keeps its bound."""
        return self.ratio <= self.quantity.bound


def judge(samples: Sequence[Sample]) -> list[Judgement]:
    """Compare the quarters of a run.

    Raises:
        ValueError: the run is too short to be judged.
    """
    if len(samples) < SMALLEST_RUN:
        raise ValueError(
            f'expected {SMALLEST_RUN} samples or more to judge, got {len(samples)}; write a larger --minutes'
        )
    quarter = len(samples) // 4
    judged = []
    for quantity in QUANTITIES:
        second, last = (
            [value for sample in part if (value := quantity.of(sample)) is not None]
            for part in (samples[quarter : 2 * quarter], samples[-quarter:])
        )
        if not second or not last:
            raise ValueError(
                f'expected values of {quantity.name} in the second and the last quarter, got none in one; '
                'write a larger --minutes'
            )
        judged.append(Judgement(quantity, statistics.median(second), statistics.median(last)))
    return judged


def passed(judgements: Sequence[Judgement], end: Sample) -> bool:
    """Whether everything is flat, something was compared, and nothing failed."""
    return (
        all(judgement.flat for judgement in judgements)
        and end.compared > 0
        and not end.unexplained
        and not end.cache_wrong
    )


def soak_table(judgements: Sequence[Judgement], end: Sample) -> Table:
    """What grew, and what validation found."""
    table = Table(title=f'{end.seconds / 60:.0f} minutes of training', title_justify='left')
    for name in ('', 'second quarter', 'last quarter', 'ratio', 'at most', ''):
        table.add_column(name, justify='right' if name else 'left')
    for judgement in judgements:
        quantity = judgement.quantity
        table.add_row(
            quantity.name,
            quantity.text(judgement.second),
            quantity.text(judgement.last),
            f'{judgement.ratio:.3f}',
            f'{quantity.bound:.2f}',
            'flat' if judgement.flat else 'GROWS',
            style=None if judgement.flat else 'red',
        )
    table.add_section()
    for name in ('env_steps', 'train_iterations', 'compared', 'different', 'unexplained', 'cache_wrong'):
        table.add_row(name, '', f'{getattr(end, name):,}', '', '', '')
    return table


def numbers(judgements: Sequence[Judgement], end: Sample) -> dict[str, object]:
    """The same for the JSON line."""
    return {
        'passed': passed(judgements, end),
        **{f'{j.quantity.name} ratio'.replace(' ', '_'): round(j.ratio, 4) for j in judgements},
        **vars(end),
    }


def plot_soak(samples: Sequence[Sample], path: Path) -> Path:
    """Draw the run over time, the quarters that are compared in grey, and write it as PNG."""
    figure = Figure(figsize=(9, 9), layout='constrained')
    FigureCanvasAgg(figure)
    memory, search, compared, failures = figure.subplots(4, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in samples]
    memory.plot(minutes, [sample.resident_bytes / 2**20 for sample in samples], label='resident')
    memory.plot(minutes, [sample.own_bytes / 2**20 for sample in samples], ':', label='without replay buffer')
    memory.plot(minutes, [sample.replay_bytes / 2**20 for sample in samples], '-.', label='replay buffer')
    memory.plot(minutes, [sample.pool_bytes / 2**20 for sample in samples], '--', label='pools')
    memory.set_title('memory', loc='left', fontsize=10)
    memory.set_ylabel('MiB')
    timed = [
        (m, s.search_seconds) for m, s in zip(minutes, samples, strict=True) if s.search_seconds is not None
    ]
    search.plot([minute for minute, _ in timed], [1e3 * seconds for _, seconds in timed], label='median')
    search.set_title('one search of all environments, processor time', loc='left', fontsize=10)
    search.set_ylabel('ms')
    for panel, names, title in (
        (compared, ('compared', 'different'), 'validation: rows so far'),
        (failures, ('unexplained', 'cache_wrong'), 'validation: failures so far, which must stay 0'),
    ):
        for name, dashes in zip(names, ('-', '--'), strict=True):
            panel.plot(minutes, [getattr(sample, name) for sample in samples], dashes, label=name)
        panel.set_title(title, loc='left', fontsize=10)
        panel.set_ylabel('rows')
    quarter = len(samples) // 4
    for panel in (memory, search, compared, failures):
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc='center right')
        for part in (minutes[quarter : 2 * quarter], minutes[-quarter:]) if quarter else ():
            panel.axvspan(part[0], part[-1], color='0.9', zorder=0)
    failures.set_xlabel('minutes')
    figure.savefig(path, dpi=110)
    return path
