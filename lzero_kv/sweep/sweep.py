"""Measurement of methods on documents, shared by any number of processes and resumed after a kill."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lzero_kv.sweep.rows import ROWS, Row, RowFile, Unit

CLAIMS = 'claims.lock'


class Document(Protocol):
    """What is measured in one piece: a text, a training."""

    @property
    def task(self) -> str:
        """Kind of document."""

    @property
    def id(self) -> str:
        """Unlike that of every other document of the task."""

    @property
    def size(self) -> float:
        """Work of the document, in any unit."""


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
    """The rows of a sweep in a folder, and what is left to measure.

    Arguments:
        folder: of the rows; it is created where it is missing.
        header: what the sweep is, with the names of the methods as ``methods``; see :class:`RowFile`.

    Raises:
        ValueError: the folder holds another sweep.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = RowFile(folder / ROWS, header, header['methods'])

    @property
    def rows(self) -> list[Row]:
        """All rows so far, in the order in which they were written."""
        return list(self._file.rows)

    def left(self, documents: Iterable[Document]) -> list[Document]:
        """The documents that have no rows yet."""
        return [document for document in documents if unit_of(document) not in self._file.done]

    def append(self, rows: Iterable[Row]) -> bool:
        """Write the rows of a document that was measured elsewhere; see :meth:`RowFile.append`."""
        return self._file.append(rows)

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
                    self._file.refresh()  # its last holder may have written the rows
                    if mine and self.left([document]):
                        tell(document)
                        self._file.append(score(document))
                tell()
        return self.rows

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


def unit_of(document: Document) -> Unit:
    """The key of a document's rows."""
    return document.task, document.id


def _check_ids(documents: Sequence[Document]) -> None:
    units = [unit_of(document) for document in documents]
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
