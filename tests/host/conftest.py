"""Every test of this folder plays repeatable searches and leaves the host as it found it."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from testing.repeatable_tree import unsupported_reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = unsupported_reason()
    for item in items:
        if reason is not None and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def host_left_as_found() -> Iterator[None]:
    """The plugin is taken out of the host after a test that put it in."""
    yield
    if 'lzero_kv.plugin' in sys.modules or 'lzero_kv.lightzero' in sys.modules:
        import lzero_kv

        lzero_kv.uninstall()


@pytest.fixture(scope='session', autouse=True)
def quiet_host() -> None:
    # Importing the host sets the root logger to DEBUG, and every model reports its construction.
    import lzero.model.unizero_model
    import lzero.policy  # noqa: F401

    gc.freeze()  # a collection has no need to look at the host's modules again
    logging.getLogger().setLevel(logging.WARNING)
    # Threads wait for each other on few cores; and sums in another order are other sums.
    torch.set_num_threads(1)
