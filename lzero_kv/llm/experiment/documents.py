"""Documents: what a model reads, what it should write, and how that is scored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


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
    """Score of a generated answer, one of ``answers.SCORES``."""
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
