"""Division of a sweep's documents among processes, by one lock for each document.

The locks are byte ranges of one empty file. The kernel gives them back when a process ends, however it ends,
so no claim outlives its process. They hold on local disks and on NFS 4.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

CLAIMS = 'claims.lock'


class Claims:
    """Locks of one process.

    Arguments:
        path: the file, the same for all processes; it is created where it is missing. No other part of a
            process may open it: closing any descriptor of it gives back all locks of the process.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    @contextlib.contextmanager
    def claimed(self, index: int, *, wait: bool) -> Iterator[bool]:
        """Hold the claim of a document in this block.

        Arguments:
            index: of the document.
            wait: until the process that holds it is done or dead.

        Yields:
            Whether this process holds it; always True with ``wait``.
        """
        if not self._lock(index, wait=wait):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, index)

    def _lock(self, index: int, *, wait: bool) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, index)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise OSError(
                error.errno,
                f'cannot lock {self.path}: {error.strerror}; choose a folder on a local disk or on NFS 4',
            ) from error
        return True
