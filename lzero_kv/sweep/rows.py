"""Append-only JSON-lines file of a sweep: a header, then one row for each method of each document.

Several processes append to one file, a whole document at a time and under a lock. A process that dies while
it appends leaves a torn document at the end; the next one that opens or appends cuts it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Versions of the packages that numbers depend on, and of Python, for a header."""
    found = {'Python': platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**dict.fromkeys(names, 'not installed'), **found}


def unit_of(row: Mapping[str, Any]) -> Unit:
    """The task and the document that a row belongs to."""
    return row['task'], row['document']


class RowFile:
    """The rows of one sweep, on disk and in memory.

    Arguments:
        path: the file; its folder exists. It is created where it is missing.
        header: what the sweep is, JSON-able; every process that appends gives the same.
        methods: names of the methods; a document is complete with one row of each.

    Raises:
        ValueError: the file holds another sweep, or is no file of rows. Nothing has been changed then.
        OSError: the file cannot be written or locked.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], methods: Sequence[str]) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._methods = frozenset(methods)
        self._done: set[Unit] = set()
        self._read_to = 0  # bytes; a whole number of documents behind the header
        with self._locked() as file:
            self._begin(file, json.loads(json.dumps(header)))
            self._repair(file)

    @property
    def done(self) -> frozenset[Unit]:
        """Documents with all their rows, as of the last `refresh` or `append`."""
        return frozenset(self._done)

    def refresh(self) -> None:
        """Read what other processes appended since the last call."""
        with self._locked() as file:
            self._read_on(file)

    def append(self, rows: Iterable[Row]) -> bool:
        """Write all rows of one document; they are on the disk when this returns.

        Returns:
            False when another process has written the document already; nothing was written then.

        Raises:
            ValueError: the rows are not those of one document with every method once.
        """
        made = list(rows)
        unit = self._checked(made)
        with self._locked() as file:
            self._repair(file)
            if unit in self._done:
                return False
            file.seek(self._read_to)
            file.write(b''.join(_line(row) for row in made))
            _to_disk(file)
            self._read_on(file)
        return True

    def _checked(self, made: Sequence[Row]) -> Unit:
        units, names = {unit_of(row) for row in made}, sorted(row['method'] for row in made)
        if len(units) != 1 or names != sorted(self._methods):
            raise ValueError(
                f'expected the rows of one document, one for each of {sorted(self._methods)}, '
                f'got {names} of {sorted(units)}'
            )
        return units.pop()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, 'r+b') as file:
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # closing the file gives it back, also when the process is killed
            yield file

    def _begin(self, file: Any, header: Any) -> None:
        first = file.readline()
        if not first.endswith(b'\n'):
            file.seek(0)
            file.truncate()
            first = _line({HEADER: header})
            file.write(first)
            _to_disk(file)
            _folder_to_disk(self.path.parent)
        elif differences := list(_differences(_header_of(first, self.path), header)):
            raise ValueError(
                f'{self.path} holds another sweep:\n  '
                + '\n  '.join(differences)
                + '\nwrite the same as before to go on with it, or another --out to begin a new one'
            )
        self._read_to = len(first)

    def _repair(self, file: Any) -> None:
        """Cut away what stands behind the last complete document; the lock says that its process is dead."""
        self._read_on(file)
        file.truncate(self._read_to)

    def _read_on(self, file: Any) -> None:
        file.seek(self._read_to)
        for rows, size in complete_documents(file.read(), self._methods):
            self.rows += rows
            self._done.add(unit_of(rows[0]))
            self._read_to += size


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
    headers = {path: _header_of(text.partition(b'\n')[0], path) for path, text in texts.items()}
    header = headers[paths[0]]
    found: dict[Unit, list[Row]] = {}
    for path, text in texts.items():
        if differences := list(_differences(header, headers[path])):
            raise ValueError(f'{path} is of another sweep than {paths[0]}:\n  ' + '\n  '.join(differences))
        behind = text.partition(b'\n')[2]
        for rows, _ in complete_documents(behind, frozenset(header['methods'])):
            found.setdefault(unit_of(rows[0]), rows)
    return header, [row for rows in found.values() for row in rows]


def _header_of(line: bytes, path: Path) -> dict[str, Any]:
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


def _differences(old: Any, new: Any, name: str = '') -> Iterator[str]:
    """One line for each value that differs between two headers; the order of a list does not count."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f'{name}.{key}' if name else key)
    elif isinstance(old, list) and isinstance(new, list):
        if gone := [item for item in old if item not in new]:
            yield f'{name}: no longer {_listed(gone)}'
        if more := [item for item in new if item not in old]:
            yield f'{name}: added {_listed(more)}'
    elif old != new:
        yield f'{name}: {json.dumps(old)} in the file, {json.dumps(new)} now'


def _listed(items: Sequence[Any]) -> str:
    return ', '.join(json.dumps(item) for item in items)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b'\n'


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
