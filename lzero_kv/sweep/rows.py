"""Append-only JSON-lines file of a sweep: a header, then one row for each method of each document."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Unit = tuple[str, str]
"""Task and document: what is measured in one piece, with every method."""

ROWS = 'rows.jsonl'
HEADER = 'sweep'
"""The one key of the header line."""


def versions(*names: str) -> dict[str, str]:
    """Versions of what numbers depend on: these packages, Python and lzero_kv as it was imported."""
    # Not by an import: the public names of the package lead to the host.
    found = {'Python': platform.python_version(), 'lzero_kv': sys.modules['lzero_kv'].__version__}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**dict.fromkeys(names, 'not installed'), **found}


def unit_of(row: Mapping[str, Any]) -> Unit:
    """The task and the document that a row belongs to."""
    return row['task'], row['document']


def complete_documents(text: bytes, methods: frozenset[str]) -> Iterator[tuple[list[Row], int]]:
    """The documents in the lines behind a header, each with the number of its bytes; a torn one ends it.

    Raises:
        ValueError: complete documents follow a torn one, so it is no end that a dead process left.
    """
    lines = text.splitlines(keepends=True)
    at, size = 0, len(methods)
    while rows := _document(lines[at : at + size], methods):
        yield rows, sum(map(len, lines[at : at + size]))
        at += size
    for later in range(at + 1, len(lines) - size + 1):
        if _document(lines[later : later + size], methods):
            raise ValueError(
                f'line {at + 2} of the rows is damaged and {len(lines) - later} lines follow it; restore the '
                f'file, or delete the damaged lines up to line {later + 1}'
            )


def _document(lines: Sequence[bytes], methods: frozenset[str]) -> list[Row]:
    """The rows of one document with every method; empty where these lines are no such rows."""
    rows = [_row_of(line) for line in lines]
    whole = [row for row in rows if row is not None and {'task', 'document', 'method'} <= row.keys()]
    one = len({unit_of(row) for row in whole}) == 1
    return whole if one and len(whole) == len(lines) and {row['method'] for row in whole} == methods else []


def read_rows(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The header of a sweep and its complete documents, of all files `rows*.jsonl` in a folder.

    Files of other machines may be copied into the folder; a document that several of them hold counts once,
    as in the first file by name.

    Raises:
        ValueError: there is no such file, one of them is no file of rows, or they are of different sweeps.
    """
    paths = sorted(folder.glob('rows*.jsonl'))
    if not paths:
        raise ValueError(f'{folder} holds no {ROWS}; give the folder (--out) that the sweep wrote into')
    texts = {path: path.read_bytes() for path in paths}
    headers = {path: header_of(text.partition(b'\n')[0], path) for path, text in texts.items()}
    header = headers[paths[0]]
    documents: dict[Unit, list[Row]] = {}
    for path, text in texts.items():
        if found := list(differences(header, headers[path])):
            raise ValueError(f'{path} is of another sweep than {paths[0]}:\n  ' + '\n  '.join(found))
        behind = text.partition(b'\n')[2]
        for rows, _ in complete_documents(behind, frozenset(header['methods'])):
            documents.setdefault(unit_of(rows[0]), rows)
    return header, [row for rows in documents.values() for row in rows]


def header_of(line: bytes, path: Path) -> dict[str, Any]:
    """The header on the first line of a file.

    Raises:
        ValueError: there is none.
    """
    found = _row_of(line + b'\n' if not line.endswith(b'\n') else line)
    if found is None or not isinstance(found.get(HEADER), dict):
        raise ValueError(f'{path} does not begin with the header of a sweep; write another --out')
    return found[HEADER]


def _row_of(line: bytes) -> Row | None:
    """The row on a line, None for a torn one."""
    if not line.endswith(b'\n'):
        return None
    try:
        row = json.loads(line)
    except ValueError:  # a power cut can leave blocks of zeros
        return None
    return row if isinstance(row, dict) else None


def differences(old: Any, new: Any, name: str = '') -> Iterator[str]:
    """One line for each value that differs between two headers; the order of a list does not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f'{name}.{key}' if name else key)
    elif isinstance(old, list) and isinstance(new, list):
        if gone := [item for item in old if item not in new]:
            yield f'{name}: no longer {_listed(gone)}'
        if more := [item for item in new if item not in old]:
            yield f'{name}: added {_listed(more)}'
    elif old != new:
        yield f'{name}: {json.dumps(old)} in the file, {json.dumps(new)} now'


def _listed(items: Sequence[Any]) -> str:
    return ', '.join(json.dumps(item) for item in items)


def line_of(row: Mapping[str, Any]) -> bytes:
    """A row as it stands in a file."""
    return json.dumps(row).encode() + b'\n'
