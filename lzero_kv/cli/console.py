"""Where the commands write: results to standard output, errors to standard error, lines never broken."""

from __future__ import annotations

import math
import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segments
from rich.table import Table

TABLE_WIDTH = 110  # of a table that goes into a file or a pipe, where no terminal says how wide it is

_SHOWN = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in '\n\t'},  # ␛ for an escape
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD),
}


def printable(text: str) -> str:
    """``text`` with a visible sign for each control character: the name of a file commands no terminal."""
    return text.translate(_SHOWN)


def show_line(text: str) -> None:
    """Write one line to standard output; a path in it stays in one piece."""
    _write(Console(), text)


def show_error(text: str) -> None:
    """Write one line to standard error."""
    _write(Console(stderr=True), f'lzero-kv: {text}')


def _write(console: Console, text: str) -> None:
    console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def show_table(table: Table, width: int = TABLE_WIDTH) -> None:
    """Write a table to standard output; where that is no terminal, at most ``width`` wide."""
    console = Console() if sys.stdout.isatty() else Console(width=width)
    segments = (part._replace(text=printable(part.text)) for part in console.render(table))
    console.print(Segments(list(segments)), end='')


class Bar:
    """Bar of progress on a terminal; elsewhere nothing but the lines that :meth:`say` is given.

    Arguments:
        quiet: whether it writes nothing at all.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(quiet=quiet)
        self.drawn = self._console.is_terminal
        self._bar = Progress(
            BarColumn(24),
            TextColumn('{task.description}'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self.drawn,
            speed_estimate_period=math.inf,  # a document may take longer than rich remembers
        )
        self._bar.add_task('', total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Write a line."""
        _write(self._console, text)

    def show(self, done: float, total: float, state: str) -> Task:
        """Show where the work stands, in any unit; the speed is that of what is done after the first call."""
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, description=state)
        return self._bar.tasks[0]
