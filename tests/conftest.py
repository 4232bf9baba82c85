"""What tests of several folders share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testing.warm_python import warm_python as started


@pytest.fixture(scope='session')
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of a ``python`` that starts with LightZero and transformers imported: see testing.warm_python."""
    with started(tmp_path_factory.mktemp('warm_python')) as path:
        yield path
