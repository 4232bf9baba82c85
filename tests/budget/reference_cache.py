"""A whole cache under a budget, slowly: the oracle of ``BudgetedCache``.

A row is a list of tokens per layer and group of heads, a token is a :class:`Token`. All layers see the prompt
first and shrink at the end; there are no cascades, columns or padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import reference

Attention = Callable[[int, int, int, int, list[int]], list[float]]
"""``attention(layer, row, query head, query position, key positions)``: one number for each key."""


@dataclass
class Token:
    """One token of one layer, row and group of heads."""

    position: int
    accumulated: float = 0.0


@dataclass
class Group:
    """Tokens that one group of heads of a row holds in one layer."""

    tokens: list[Token] = field(default_factory=list)
    recent: list[dict[int, list[float]]] = field(default_factory=list)
    """For each of the last queries: key position to the attention of each query head of the group."""

    @property
    def positions(self) -> list[int]:
        return [token.position for token in self.tokens]


class ReferenceCache:
    """Arguments: the numbers of the model, the sizes of the budget, and the attention that is given out."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        groups: int,
        lengths: list[int],
        total: int,
        window: int,
        sinks: int,
        minimum: int,
        step: int,
        allocation: dict[str, Any],
        selection: str,
        decay: float,
        parameters: dict[str, Any],
        attention: Attention,
    ) -> None:
        self.layers, self.heads, self.lengths = layers, heads, lengths
        self.total, self.window, self.sinks, self.minimum, self.step = total, window, sinks, minimum, step
        self.allocation, self.selection, self.decay = allocation, selection, decay
        self.parameters, self.attention = parameters, attention
        self.share = heads // groups
        self.groups = [[[Group() for _ in range(groups)] for _ in lengths] for _ in range(layers)]
        self.seen = 0
        self.weights: list[Any] = []

    def prompt(self) -> None:
        """All layers see the prompt, then all shrink."""
        self.seen = max(self.lengths)
        preferences = []
        for layer in range(self.layers):
            for row, length in enumerate(self.lengths):
                self._see(layer, row, list(range(length)))
            preferences.append(self._preference(layer))
        self.weights = reference.weights(layers=self.layers, preferences=preferences, **self.allocation)
        for layer, slots in enumerate(self.slots()):
            self._shrink(layer, slots)

    def block(self, tokens: int) -> None:
        """Every layer sees the same number of new tokens of each row, and shrinks."""
        self.seen += tokens
        for layer, slots in enumerate(self.slots()):
            for row in range(len(self.lengths)):
                first = self.groups[layer][row][0].positions[-1] + 1
                self._see(layer, row, list(range(first, first + tokens)))
            self._shrink(layer, slots)

    def slots(self) -> list[int]:
        """Slots of each layer now."""
        always = min(self.seen, self.window + self.sinks)
        cap = self.seen - always
        evictable = max(0, self.total - self.layers * (self.window + self.sinks))
        if evictable >= cap * self.layers:
            return [self.seen] * self.layers
        blocks = reference.apportion(
            self.weights,
            evictable // self.step,
            [(cap + self.step - 1) // self.step] * self.layers,
            (self.minimum + self.step - 1) // self.step,
        )
        return [min(self.seen, always + self.step * count) for count in blocks]

    def _see(self, layer: int, row: int, positions: list[int]) -> None:
        for number, group in enumerate(self.groups[layer][row]):
            group.tokens += [Token(position) for position in positions]
            for token in group.tokens:
                token.accumulated *= self.decay
            for query in positions:
                keys = [position for position in group.positions if position <= query]
                shares = range(number * self.share, (number + 1) * self.share)
                given = [self.attention(layer, row, head, query, keys) for head in shares]
                columns = {key: [of_head[place] for of_head in given] for place, key in enumerate(keys)}
                for token in group.tokens:
                    if token.position in columns:
                        token.accumulated += sum(columns[token.position]) / self.share
                group.recent = [*group.recent, columns][-self.window :]

    def _matrices(self, group: Group) -> list[list[list[float]]]:
        """For each query head of the group, the rows of the last queries over the tokens that are held."""
        nothing = [0.0] * self.share
        return [
            [[query.get(position, nothing)[head] for position in group.positions] for query in group.recent]
            for head in range(self.share)
        ]

    def _preference(self, layer: int) -> tuple[float, float]:
        measured = []
        for groups in self.groups[layer]:
            keys = reference.may_go(groups[0].positions, self.window, self.sinks, self.step)
            heads = [matrix for group in groups for matrix in self._matrices(group)]
            if keys:
                measured.append((reference.dispersion(heads, keys), reference.shift(heads, keys)))
        if not measured:
            return 0.0, 0.0
        return tuple(sum(column) / len(measured) for column in zip(*measured, strict=True))

    def _shrink(self, layer: int, slots: int) -> None:
        for groups in self.groups[layer]:
            for group in groups:
                places = reference.may_go(group.positions, self.window, self.sinks, self.step)
                scored = reference.scores(
                    self.selection,
                    places,
                    group.positions,
                    [token.accumulated for token in group.tokens],
                    self._matrices(group),
                    **self.parameters,
                )
                if len(group.tokens) > slots:
                    kept = reference.keep(scored, group.positions, slots, self.step)
                    group.tokens = [group.tokens[place] for place in kept]
