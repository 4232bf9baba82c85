"""Sends everything a process writes into a file, and keeps one stream to the screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def output_into(path: Path) -> Iterator[TextIO]:
    """Redirect what is written, also by C libraries, into `path`; yield a stream to the screen."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept_out, kept_err = os.dup(1), os.dup(2)
    screen = os.fdopen(os.dup(1), 'w', encoding='utf-8', errors='replace', buffering=1)
    with path.open('ab') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield screen
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept_out, 1)
        os.dup2(kept_err, 2)
        os.close(kept_out)
        os.close(kept_err)
        screen.close()
