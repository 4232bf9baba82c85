"""A tokenizer and tiny models of transformers, made in the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip('transformers')

from tests.llm.experiment.tiny import text_of_animals, tiny_llama, tiny_tokenizer  # noqa: E402


@pytest.fixture(scope='session')
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope='session')
def model(tokenizer) -> Any:
    return tiny_llama(tokenizer)


@pytest.fixture(scope='session')
def story(tmp_path_factory) -> Path:
    """A text of about 70,000 characters in lines."""
    path = tmp_path_factory.mktemp('texts') / 'story.txt'
    path.write_text(text_of_animals(lines=1500), encoding='utf-8')
    return path
