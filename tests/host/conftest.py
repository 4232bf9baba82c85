"""Every test of this folder leaves the host as it found it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from .repeatable_tree import unsupported_reason

collect_ignore_glob: list[str] = [] if unsupported_reason() is None else ["test_*.py"]


@pytest.fixture(autouse=True)
def host_left_as_found() -> Iterator[None]:
    """The plugin is taken out of the host after a test that put it in; the host's chatter is dropped."""
    yield
    if "lzero_kv.plugin" in sys.modules or "lzero_kv.hosts" in sys.modules:
        import lzero_kv

        lzero_kv.uninstall()


@pytest.fixture(scope="session", autouse=True)
def quiet_host() -> None:
    # Importing the host sets the root logger to DEBUG and every model reports its construction.
    import lzero.model.unizero_model  # noqa: F401

    logging.getLogger().setLevel(logging.WARNING)
