"""Where the commands write: results to standard output, errors to standard error, lines never broken."""

from __future__ import annotations

import sys

from rich.console import Console
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
    Console().print(printable(text), soft_wrap=True, markup=False, highlight=False)


def show_table(table: Table, width: int = TABLE_WIDTH) -> None:
    """Write a table to standard output; where that is no terminal, at most ``width`` wide."""
    console = Console() if sys.stdout.isatty() else Console(width=width)
    segments = (part._replace(text=printable(part.text)) for part in console.render(table))
    console.print(Segments(list(segments)), end='')


def show_error(text: str) -> None:
    """Write one line to standard error."""
    Console(stderr=True).print(f'lzero-kv: {printable(text)}', soft_wrap=True, markup=False, highlight=False)
