"""Measurement of methods on documents, shared by any number of processes and resumed after a kill.

Several processes append to one file, a whole document at a time and under a lock. A process that dies while
it appends leaves a torn document at the end; the next one that opens or appends cuts it away.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lzero_kv.sweep.rows import (
    HEADER,
    ROWS,
    Row,
    Unit,
    complete_documents,
    differences,
    header_of,
    line_of,
    unit_of,
)

CLAIMS = 'claims.lock'


class Document(Protocol):
    """What is measured in one piece: a text, a training."""

    @property
    def task(self) -> str:
        """Kind of document."""
        ...

    @property
    def id(self) -> str:
        """Unlike that of every other document of the task."""
        ...

    @property
    def size(self) -> float:
        """Work of the document, in any unit."""
        ...


Score = Callable[[Any], Iterable[Row]]
"""The rows of one document, one for each method."""


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands, all processes together."""

    documents: int
    """Documents of the sweep."""
    done: int
    """Documents with all their rows."""
    work: float
    """Sizes of all documents."""
    work_done: float
    """Of the documents with all their rows."""
    current: str
    """Task and id of the document in work here; empty where there is none."""
    waiting: bool
    """Whether that document is in work in another process, whose end is waited for."""


Watch = Callable[[Progress], None]


class Sweep:
    """The rows of a sweep, on disk and in memory, and what is left to measure.

    Arguments:
        folder: of the rows; it is created where it is missing.
        header: what the sweep is, JSON-able, with the names of the methods as ``methods``: a document is
            complete with one row of each. Every process that appends gives the same.

    Attributes:
        rows: all rows so far, in the order in which they were written.

    Raises:
        ValueError: the folder holds another sweep, or no file of rows. Nothing has been changed then.
        OSError: the folder or its file cannot be written or locked.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows: list[Row] = []
        self._path = folder / ROWS
        self._methods = frozenset(header['methods'])
        self._done: set[Unit] = set()
        self._read_to = 0  # bytes; a whole number of documents behind the header
        with self._locked() as file:
            self._begin(file, json.loads(json.dumps(header)))
            self._repair(file)

    def left(self, documents: Iterable[Document]) -> list[Document]:
        """The documents that have no rows yet."""
        return [document for document in documents if _unit(document) not in self._done]

    def run(
        self,
        documents: Sequence[Document],
        score: Score,
        watch: Watch = lambda progress: None,
    ) -> list[Row]:
        """Measure the documents that have no rows yet, and return all rows.

        Several processes may do so at the same time: each document is measured by one of them. It returns
        when all rows are there: a process with nothing left to begin waits for the others, and takes over the
        document of one that died.

        Arguments:
            documents: the same, in the same order, in every process.
            score: measures one document.
            watch: is told before and after each document.

        Raises:
            ValueError: two documents have the same task and id.
        """
        _check_ids(documents)

        def tell(current: Document | None = None, waiting: bool = False) -> None:
            watch(self._progress(documents, current, waiting))

        for wait in (False, True):
            for index, document in enumerate(documents):
                if not self.left([document]):
                    continue
                tell(document, wait)
                with claimed(self.folder / CLAIMS, index, wait=wait) as mine:
                    with self._locked() as file:
                        self._read_on(file)  # its last holder may have written the rows
                    if mine and self.left([document]):
                        tell(document)
                        self.append(score(document))
                tell()
        return self.rows

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
            file.write(b''.join(line_of(row) for row in made))
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
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, 'r+b') as file:
            # closing the file gives it back, also when the process is killed
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _begin(self, file: Any, header: Any) -> None:
        first = file.readline()
        if _is_torn_header(first):
            file.seek(0)
            file.truncate()
            first = line_of({HEADER: header})
            file.write(first)
            _to_disk(file)
            _folder_to_disk(self.folder)
        elif found := list(differences(header_of(first, self._path), header)):
            raise ValueError(
                f'{self._path} holds another sweep:\n  '
                + '\n  '.join(found)
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

    def _progress(self, documents: Sequence[Document], current: Document | None, waiting: bool) -> Progress:
        left = self.left(documents)
        work, work_left = (sum(document.size for document in some) for some in (documents, left))
        return Progress(
            documents=len(documents),
            done=len(documents) - len(left),
            work=work,
            work_done=work - work_left,
            current='' if current is None else f'{current.task} {current.id}',
            waiting=waiting,
        )


def _is_torn_header(line: bytes) -> bool:
    """Whether a first line is none, or what a process left that died while it wrote the header."""
    begins = line_of({HEADER: {}}).partition(b'}')[0]
    return not line.strip(b'\0') or (not line.endswith(b'\n') and begins.startswith(line[: len(begins)]))


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unit(document: Document) -> Unit:
    """The key of a document's rows."""
    return document.task, document.id


def _check_ids(documents: Sequence[Document]) -> None:
    units = [_unit(document) for document in documents]
    if twice := sorted({unit for unit in units if units.count(unit) > 1}):
        raise ValueError(f'each document of a task needs an id of its own, got twice: {twice}')


@contextlib.contextmanager
def claimed(path: Path, index: int, *, wait: bool) -> Iterator[bool]:
    """Hold the claim of a document in this block: the lock of one byte of an empty file.

    The kernel gives it back when the process ends, however it ends. It holds on local disks and on NFS 4.
    A process holds one claim at a time: closing the file gives back all of its locks.

    Arguments:
        path: the file, the same for all processes; it is created where it is missing.
        index: of the document.
        wait: until the process that holds it is done or dead.

    Yields:
        Whether this process holds it; always True with ``wait``.

    Raises:
        OSError: the file cannot be made or locked.
    """
    with path.open('ab') as file:
        mine = True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, index)
        except (BlockingIOError, PermissionError):  # as systems call it
            mine = False
        except OSError as error:
            advice = 'choose a folder on a local disk or on NFS 4'
            raise OSError(error.errno, f'cannot lock {path}: {error.strerror}; {advice}') from error
        yield mine
