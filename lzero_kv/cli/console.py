"""Where the commands write: results to standard output, errors to standard error, lines never broken."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

TABLE_WIDTH = 110  # of a table that goes into a file or a pipe, where no terminal says how wide it is


def show_line(text: str) -> None:
    """Write one line to standard output; a path in it stays in one piece."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def show_table(table: Table, width: int = TABLE_WIDTH) -> None:
    """Write a table to standard output; where that is no terminal, at most ``width`` wide."""
    console = Console() if sys.stdout.isatty() else Console(width=width)
    console.print(table)


def show_error(text: str) -> None:
    """Write one line to standard error."""
    Console(stderr=True).print(f'lzero-kv: {text}', soft_wrap=True, markup=False, highlight=False)
