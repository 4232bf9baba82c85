"""Methods that are compared: an algorithm and its budget."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lzero_kv.budget import ALLOCATIONS
from lzero_kv.llm.budget import PromptBudget
from lzero_kv.mistakes import Mistakes, did_you_mean

FULL = 'full'
"""Name of the control: every token stays."""
ALGORITHMS = (FULL, 'cake', 'h2o', 'hace', 'snapkv', 'streaming')
"""The control, and the selections of a :class:`~lzero_kv.llm.budget.PromptBudget`."""
_OWN = ('algorithm', 'ratio', 'tokens', 'allocation')


@dataclass(frozen=True)
class Method:
    """An algorithm and its budget. Every mistake is reported in one ValueError.

    Raises:
        ValueError: a name is unknown, a value is wrong, or choices contradict each other.
    """

    algorithm: str
    """One of :data:`ALGORITHMS`."""
    ratio: float | None = None
    """Slots as a part of all tokens."""
    tokens: int | None = None
    """Slots of a layer, in the mean over the layers, in the place of ``ratio``."""
    allocation: str | None = None
    """How the slots are divided among the layers; None for the default of a PromptBudget."""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Other fields of a :class:`~lzero_kv.llm.budget.PromptBudget`."""

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise Mistakes('method', problems)
        object.__setattr__(self, 'options', dict(sorted(self.options.items())))
        if self.algorithm != FULL:
            default = PromptBudget.model_fields['allocation'].default
            object.__setattr__(self, 'allocation', self.allocation or default)
            PromptBudget.read(self._values(), 'method')

    @classmethod
    def parse(cls, text: str) -> Self:
        """A method from its name: ``'cake uniform 0.25'``, ``'h2o window=16 tokens=256'``, ``'full'``.

        Words behind the algorithm: an allocation, a ratio, or ``field=value`` of a PromptBudget.

        Raises:
            ValueError: as of the class; words that are none of these are listed.
        """
        algorithm, *words = text.split() or ['']
        given: dict[str, Any] = {}
        wrong = []
        for word in words:
            name, value = _field_of(word)
            if name is None or name in given:
                wrong.append(word)
            else:
                given[name] = value
        if wrong:
            raise Mistakes(
                'method',
                [
                    f'{word}: expected one allocation of {list(ALLOCATIONS)}, one ratio such as 0.25, or '
                    f'field=value, each once'
                    for word in wrong
                ],
            )
        own = {name: given.pop(name) for name in _OWN[1:] if name in given}
        return cls(algorithm, **own, options=given)

    @property
    def name(self) -> str:
        """What :meth:`parse` reads, such as ``'cake attention_based 0.25'``; the ratio is the last word."""
        others = [f'{name}={value}' for name, value in self.options.items()]
        tokens = [] if self.tokens is None else [f'tokens={self.tokens}']
        ratio = [] if self.ratio is None else [f'{self.ratio:g}']
        allocation = [] if self.allocation is None else [self.allocation]
        return ' '.join([self.algorithm, *allocation, *others, *tokens, *ratio])

    def budget(self) -> dict[str, Any] | None:
        """Fields of the PromptBudget; None for the full cache."""
        return None if self.algorithm == FULL else self._values()

    def fields(self) -> dict[str, Any]:
        """What a row of results says about the method."""
        return dict(
            method=self.name,
            algorithm=self.algorithm,
            allocation=self.allocation,
            ratio=1.0 if self.algorithm == FULL else self.ratio,
            budget_tokens=self.tokens,
            options=dict(self.options),
        )

    def _values(self) -> dict[str, Any]:
        given = dict(ratio=self.ratio, tokens=self.tokens, allocation=self.allocation)
        some = {name: value for name, value in given.items() if value is not None}
        return {'selection': self.algorithm, **some, **self.options}

    def _problems(self) -> list[str]:
        if self.algorithm not in ALGORITHMS:
            return [
                f'algorithm: expected one of {list(ALGORITHMS)}, got {self.algorithm!r}'
                f'{did_you_mean(str(self.algorithm), ALGORITHMS)}'
            ]
        if self.algorithm == FULL:
            given = [name for name in _OWN[1:] if getattr(self, name) is not None]
            return [f'{name}: the full cache has no budget; leave it out' for name in (*given, *self.options)]
        twice = [name for name in (*_OWN, 'selection') if name in self.options]
        return [f'{name}: it is a field of the method, write it outside of options' for name in twice]


def _field_of(word: str) -> tuple[str | None, Any]:
    """The field that a word of a name gives, and its value."""
    if word in ALLOCATIONS:
        return 'allocation', word
    name, equals, value = word.partition('=')
    if equals:
        return name or None, value_of(value)
    number = value_of(word)
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return ('ratio', float(number)) if is_number else (None, None)


def value_of(text: str) -> Any:
    """A number, True, False or None as Python or JSON writes them; any other text as it is."""
    try:
        return ast.literal_eval({'true': 'True', 'false': 'False', 'null': 'None'}.get(text, text))
    except (ValueError, SyntaxError):
        return text
