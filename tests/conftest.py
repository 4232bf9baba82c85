"""What tests of several folders share."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from testing.warm_python import warm_python as started

VARIABLE = 'WARM_PYTHON'

# A machine that is busy with other programs fails no test.
settings.register_profile('untimed', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('untimed')


def pytest_configure(config: pytest.Config) -> None:
    """The first process starts the server; those of xdist inherit its address."""
    if not hasattr(config, 'workerinput'):
        stack = contextlib.ExitStack()
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='warm_python'))
        os.environ[VARIABLE] = stack.enter_context(started(Path(folder)))
        config.add_cleanup(stack.close)


def pytest_collection_finish() -> None:
    gc.freeze()  # a collection has no need to look at all modules again


@pytest.fixture(scope='session')
def warm_python() -> str:
    """Path of a ``python`` that starts with LightZero and transformers imported: see testing.warm_python."""
    return os.environ[VARIABLE]
