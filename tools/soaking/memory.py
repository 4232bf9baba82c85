"""Memory of the running process."""

from __future__ import annotations

import ctypes
import gc

import psutil


def resident_bytes() -> int:
    """Resident memory of this process without what it could give back at once.

    The C library keeps freed pages for later: after a training batch some 250 MiB, now more, now less,
    in which a leak of megabytes would drown. Where it is glibc, it is asked to return them first.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss
