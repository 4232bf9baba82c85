"""Shows a training while it runs, and what came of it: live on a terminal, line by line elsewhere."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from demonstration.progress import COMPARED, ITERATION, TrainingProgress

PLAIN_WIDTH = 110  # of what goes into a file or a pipe
REFRESH_SECONDS = 0.25
LINE_SECONDS = 15.0  # between two lines where there is no terminal
TAIL_LINES = 15
EVALUATIONS = 2
FIRST = 20  # batches of searches after which the time left is estimated


class Display:
    """The state of a training on the screen; redrawn whenever the training took a step.

    Args:
        screen: where to draw.
        size: the demo's settings, of which the totals of the bars are taken.
    """

    def __init__(self, screen: TextIO, size: Mapping[str, Any]) -> None:
        self.progress = TrainingProgress(listener=self._took_step)
        self.console = Console(file=screen, width=None if screen.isatty() else PLAIN_WIDTH)
        self.started = time.monotonic()
        self._drawn = 0.0
        self._hit_rates = ''
        self._line: tuple[float, str] = (0.0, '')
        self._bars = Progress(
            TextColumn('  {task.description:<20}'), BarColumn(36), MofNCompleteColumn(), console=self.console
        )
        iterations = int(size['max_env_step'] * size['replay_ratio'])
        collected = size['max_env_step'] // size['collector_env_num']
        self._work = collected + EVALUATIONS * size['max_episode_steps'] + ITERATION * iterations + COMPARED
        self._began: float | None = None  # the first search, after LightZero was loaded
        self._env_steps = self._bars.add_task('environment steps', total=size['max_env_step'])
        self._iterations = self._bars.add_task('training iterations', total=iterations)

    @property
    def seconds(self) -> float:
        """Since the display was made."""
        return time.monotonic() - self.started

    @contextmanager
    def running(self, title: str) -> Iterator[None]:
        """Show the training that runs in this block."""
        self.console.print(f'{title}\n', highlight=False)
        if not self.console.is_terminal:
            self._print_line()
            yield
            self._print_line()
            return
        with Live(
            get_renderable=self._picture, console=self.console, refresh_per_second=4,
            redirect_stdout=False, redirect_stderr=False,
        ):  # fmt: skip
            yield

    @property
    def left(self) -> str:
        """Time left in words, from what was done so far; empty at the beginning."""
        done = self.progress.work
        if self._began is None or done < FIRST:
            return ''
        seconds = (self.seconds - self._began) * max(0, self._work - done) / done
        return f'about {seconds:.0f} s left' if seconds < 90 else f'about {seconds / 60:.0f} min left'

    def _took_step(self) -> None:
        now = self.seconds
        self._began = now if self._began is None else self._began
        if now - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = now
        self._hit_rates = hit_rates(self.progress.statistics())
        last, phase = self._line
        if not self.console.is_terminal and (now - last > LINE_SECONDS or phase != self.progress.phase):
            self._print_line()

    def _picture(self) -> Group:
        self._bars.update(self._env_steps, completed=self.progress.collected_steps)
        self._bars.update(self._iterations, completed=self.progress.train_iterations)
        state = f'  {self.progress.phase:<27} {self.seconds:4.0f} s   {self.left}   {self._hit_rates}'
        return Group(self._bars, Text(state))

    def _print_line(self) -> None:
        self._line = (self.seconds, self.progress.phase)
        self.console.print(
            f'{self.seconds:5.0f} s  {self.progress.phase:<26} '
            f'{self.progress.collected_steps:5d} environment steps '
            f'{self.progress.train_iterations:4d} training iterations   {self.left}',
            highlight=False,
        )


def hit_rates(summary: Mapping[str, Any]) -> str:
    """The hit rates of roots and nodes in words; empty while there are none."""
    rates = [
        f'{pool} {100 * summary[pool]["hit_rate"]:.1f} %'
        for pool in ('roots', 'nodes')
        if pool in summary and summary[pool]['queries']
    ]
    return f'hit rate: {", ".join(rates)}' if rates else ''


def show_failure(console: Console, error: Exception, log: Path) -> None:
    """Say why the training ended, and where to look."""
    tail = log.read_text(encoding='utf-8', errors='replace').splitlines()[-TAIL_LINES:]
    with log.open('a', encoding='utf-8') as file:
        traceback.print_exception(error, file=file)
    console.print(
        '\n'.join(('', *tail, f'The demo failed: {type(error).__name__}: {error}')),
        highlight=False,
        markup=False,
    )
    console.print(f'Everything the host wrote, and where it failed: {log}', highlight=False)


def show_result(display: Display, logdir: Path) -> int:
    """Show what the training and its cache did; 0, or 1 if the cache was not in use."""
    # Imported here: it loads torch, which a failed training may not have reached.
    from lzero_kv.telemetry.table import statistics_table

    progress, console = display.progress, display.console
    summary = progress.statistics()
    if not summary or not summary['total']['hits']:
        console.print('The training ran, but the cache served nothing. Look at it with: lzero-kv doctor')
        return 1
    console.print()
    console.print(statistics_table(summary, meanings=True))
    console.print()
    console.print(training_table(progress, display.seconds))
    console.print()
    console.print(stock_table(progress.beside))
    scripts = os.path.relpath(Path(sys.executable).parent)
    console.print(f'\nTensorBoard log: {logdir}', highlight=False, soft_wrap=True)
    console.print(
        f'open it with:    {scripts}/tensorboard --logdir {logdir}', highlight=False, soft_wrap=True
    )
    console.print('and look at the page Custom Scalars, or read the same in the terminal with')
    console.print(f'                 {scripts}/lzero-kv report {logdir}', highlight=False, soft_wrap=True)
    return 0


def stock_table(beside: Any) -> Table:
    """The last searches with LightZero's own cache and with this one: time, wrong answers, and why."""
    found = beside.counters.total
    table = Table(title=f"The last {beside.searches} searches, with LightZero's own cache and with this one")
    table.title_justify = 'left'
    table.add_column()
    for name in ("LightZero's", 'lzero_kv'):
        table.add_column(name, justify='right', no_wrap=True)
    table.add_column('meaning')
    seconds = (f'{1000 * total / beside.searches:,.0f} ms' for total in (beside.stock, beside.own))
    table.add_row('time of a search', *seconds, 'Processor time for one step of all environments.')
    answers = [f'{found.compared:,}'] * 2
    table.add_row('answers', *answers, 'Roots and nodes, each compared with a computation without any cache.')
    wrong = (f'{count:,}' for count in (found.different, found.cache_wrong))
    table.add_row('wrong', *wrong, 'Differ from that computation; one may have several causes:')
    for cause, count in found.causes.most_common():
        table.add_row(f'  {cause.value}', f'{count:,}', '-', f'{cause.sentence}.')
    if found.unexplained:
        table.add_row('unexplained', f'{found.unexplained:,}', '-', 'Differences without a proven cause.')
    if found.value.count:
        moved = f'{found.value.mean:.2g}'
        meaning = 'Mean over the wrong answers, in units of return; small while a model is young.'
        table.add_row('value moved by', moved, '-', meaning)
    return table


def training_table(progress: TrainingProgress, seconds: float) -> Table:
    """What the training did, in two columns."""
    table = Table(title='Training', title_justify='left', show_header=False)
    table.add_column()
    table.add_column(justify='right')
    table.add_row('environment steps, collected', f'{progress.collected_steps:,}')
    table.add_row('environment steps, evaluated', f'{progress.evaluated_steps:,}')
    table.add_row('training iterations', f'{progress.train_iterations:,}')
    table.add_row('mean return of each evaluation', ', '.join(f'{value:.1f}' for value in progress.returns))
    table.add_row('wall time', f'{seconds:.0f} s')
    return table
