"""A whole cache under a budget, slowly: the oracle of ``BudgetedCache``.

A row is a list of tokens per layer and group of heads, a token is a :class:`Token`. All layers see a block
first and shrink at its end; there are no cascades, columns or padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from . import reference

Attention = Callable[[int, int, list[int]], list[float]]
"""``attention(query head of the group, query position, key positions)``: one number for each key."""


@dataclass
class Token:
    """One token of one layer, row and group of heads."""

    position: int
    accumulated: float = 0.0
    score: float | None = None


@dataclass
class Group:
    """Tokens that one group of heads of a row holds in one layer."""

    share: int
    """Query heads of the group."""
    tokens: list[Token] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    """Positions of the queries whose attention was not read yet."""
    recent: list[dict[int, list[float]]] = field(default_factory=list)
    """For each of the last queries: key position to the attention of each query head."""

    @property
    def positions(self) -> list[int]:
        return [token.position for token in self.tokens]

    def see(
        self, queries: Sequence[int], attention: Attention, decay: float, reach: float = math.inf
    ) -> None:
        """Read the attention of queries over the tokens that are held now."""
        for query in queries:
            keys = [position for position in self.positions if query - reach < position <= query]
            given = [attention(head, query, keys) for head in range(self.share)]
            columns = {key: [of_head[place] for of_head in given] for place, key in enumerate(keys)}
            for token in self.tokens:
                token.accumulated = (
                    decay * token.accumulated + sum(columns.get(token.position, [])) / self.share
                )
            self.recent.append(columns)

    def matrices(self) -> list[list[list[float]]]:
        """For each query head, the rows of the last queries over the tokens that are held."""
        nothing = [0.0] * self.share
        return [
            [[query.get(position, nothing)[head] for position in self.positions] for query in self.recent]
            for head in range(self.share)
        ]

    def scores(
        self, selection: str, parameters: dict[str, Any], window: int, sinks: int, step: int
    ) -> dict[int, float]:
        """Score of each token that may go, by its place."""
        places = reference.may_go(self.positions, window, sinks, step)
        accumulated = [token.accumulated for token in self.tokens]
        return reference.scores(selection, places, self.positions, accumulated, self.matrices(), **parameters)

    def shrink(self, scored: dict[int, float], slots: int, step: int) -> None:
        """Drop the tokens that are over ``slots``."""
        if len(self.tokens) > slots:
            kept = reference.keep(scored, self.positions, slots, step)
            self.tokens = [self.tokens[place] for place in kept]


@dataclass
class Row:
    """What one sequence holds in one layer."""

    groups: list[Group]
    count: int = 0
    """Tokens, at most: fewer where steps are kept whole or groups lost different ones."""


class ReferenceCache:
    """Arguments: the numbers of the model, those of the budget, and the attention that is given out.

    ``ratio``, ``tokens`` or ``heavy_ratio`` and ``recent_ratio`` are exact; ``reads`` is what the selection
    reads; ``attention(layer, row)`` is the attention of each query head over the whole row.
    """

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        groups: int,
        rows: int,
        limits: Sequence[int | None],
        dynamic: bool,
        interval: int,
        sizes: dict[str, Fraction | int],
        window: int,
        sinks: int,
        minimum: int,
        step: int,
        allocation: dict[str, Any],
        selection: str,
        reads: set[str],
        decay: float,
        parameters: dict[str, Any],
        attention: Callable[[int, int, int, int, list[int]], list[float]],
    ) -> None:
        self.layers, self.dynamic, self.interval = layers, dynamic, interval
        self.limits = [math.inf if limit is None else limit for limit in limits]
        self.given, self.window, self.sinks, self.step = sizes, window, sinks, step
        self.minimum = max(minimum, interval, math.ceil((interval - 1) / step) * step)
        self.allocation, self.selection, self.reads, self.decay = allocation, selection, reads, decay
        self.parameters, self.attention = parameters, attention
        self.share = heads // groups
        self.rows = [
            [Row([Group(self.share) for _ in range(groups)]) for _ in range(rows)] for _ in range(layers)
        ]
        self.seen: list[int] = []
        self.slots: list[tuple[int, ...]] = []
        self.preferences: list[list[tuple[float, float]]] = [[(0.0, 0.0)] * layers for _ in range(rows)]
        self.steps = -1

    # sizes

    @property
    def measures(self) -> bool:
        """Whether the allocation reads the attention."""
        return self.allocation['allocation'] == 'attention_based'

    @property
    def slack(self) -> int:
        """Tokens that are appended before the next choice."""
        return 0 if self.steps < 0 else self.interval - 1

    def window_of(self, seen: int) -> int:
        if 'recent_ratio' not in self.given:
            return self.window
        return max(1, math.floor(self.given['recent_ratio'] * seen))

    def total(self, seen: int) -> int:
        """Slots of all layers for a sequence of so many tokens."""
        window, given = self.window_of(seen), self.given
        contexts = [int(min(seen, limit)) for limit in self.limits]
        needed = sum(min(context, window + self.sinks + self.minimum) for context in contexts)
        if 'ratio' in given:
            return max(needed, math.floor(given['ratio'] * sum(contexts) + Fraction(1, 2)))
        if 'tokens' in given:
            return max(needed, self.layers * int(given['tokens']))
        heavy = max(1, math.floor(given['heavy_ratio'] * seen))
        return max(needed, self.layers * (window + self.sinks + heavy))

    def most(self, layer: int, row: int) -> int:
        """Tokens that a layer can hold at the next choice."""
        if not self.dynamic and self.steps >= 0:
            return int(min(10**9, self.limits[layer]))
        return int(min(self.rows[layer][row].count + self.slack, self.limits[layer]))

    def slots_of(self, row: int) -> tuple[int, ...]:
        """Slots of each layer now."""
        seen, most = self.seen[row], [self.most(layer, row) for layer in range(self.layers)]
        ahead = seen + self.slack
        whole = sum(min(ahead, limit) for limit in self.limits)
        if self.total(ahead) >= whole and (self.dynamic or self.steps < 0):
            return tuple(most)
        kept = self.window_of(seen) + self.sinks
        always = [min(context, kept) for context in most]
        caps = [context - least for context, least in zip(most, always, strict=True)]
        needed = sum(min(context, kept + self.minimum) for context in most)
        evictable = max(self.total(seen), needed) - sum(always)
        if evictable >= sum(caps):
            return tuple(most)
        weights = reference.weights(layers=self.layers, preferences=self.preferences[row], **self.allocation)
        blocks = reference.apportion(
            weights,
            evictable // self.step,
            [math.ceil(cap / self.step) for cap in caps],
            math.ceil(self.minimum / self.step),
        )
        shares = zip(always, most, blocks, strict=True)
        return tuple(min(context, least + self.step * count) for least, context, count in shares)

    # blocks

    def block(self, size: int, added: Sequence[int]) -> None:
        """Every layer sees the new tokens of each row, and shrinks."""
        before = self.seen or [0] * len(added)
        self.steps = self.steps + 1 if size == 1 and all(before) else -1
        begun = [row for row, past in enumerate(before) if past]
        begin = [row for row, past in enumerate(before) if not past]
        self.seen = [past + new for past, new in zip(before, added, strict=True)]
        for layer in self.rows:
            for row, past, seen in zip(layer, before, self.seen, strict=True):
                row.count += seen - past
                for group in row.groups:
                    group.tokens += [Token(position) for position in range(past, seen)]
                    # a query whose own token has left under the limit sees nothing that is held
                    group.pending = [
                        query for query in (*group.pending, *range(past, seen)) if query in group.positions
                    ]
        if self.given.get('ratio') == 1 or (self.steps > 0 and self.steps % self.interval):
            self._expire()
            return
        for row in begin:
            self.preferences[row] = [(0.0, 0.0)] * self.layers
        self.slots = self.slots or [()] * len(added)
        # the preferences of all layers are of one block: not yet of this one
        self._share_out(begun)
        self._read()
        # a row without tokens so far is treated as if this were the first block
        self._share_out(begin)
        self._cut()

    def select_rows(self, rows: Sequence[int]) -> None:
        """Rows go on as copies of others."""
        self.rows = [[deepcopy(layer[row]) for row in rows] for layer in self.rows]
        for name in ('seen', 'slots', 'preferences'):
            setattr(self, name, [deepcopy(getattr(self, name)[row]) for row in rows])

    def _share_out(self, rows: Sequence[int]) -> None:
        if self.dynamic or self.steps <= 0:
            for row in rows:
                self.slots[row] = self.slots_of(row)

    def _expire(self) -> None:
        for limit, layer in zip(self.limits, self.rows, strict=True):
            for row, seen in zip(layer, self.seen, strict=True):
                row.count = int(min(row.count, limit))
                for group in row.groups:
                    group.tokens = [token for token in group.tokens if token.position >= seen - limit]

    def _sinks_left(self, layer: int, row: int) -> int:
        return int(max(0, self.sinks - max(0, self.seen[row] - self.limits[layer])))

    def _read(self) -> None:
        for layer in range(self.layers):
            for row in range(len(self.seen)):
                for number, group in enumerate(self.rows[layer][row].groups):
                    group.recent = []

                    def attention(head: int, query: int, keys: list[int], at: Any = (layer, row, number)):
                        return self.attention(*at[:2], at[2] * self.share + head, query, keys)

                    group.see(group.pending, attention, self.decay, self.limits[layer] + 1)
        self._expire()
        for layer in range(self.layers):
            for row in range(len(self.seen)):
                if self.measures:
                    self._measure(layer, row)
                for group in self.rows[layer][row].groups:
                    self._score(layer, row, group)
                    group.pending = []

    def _measure(self, layer: int, row: int) -> None:
        groups, window = self.rows[layer][row].groups, self.window_of(self.seen[row])
        long = self.steps < 0 and len(groups[0].pending) >= window
        if not long and any(self.preferences[row][layer]):
            return
        dispersion = shift = 0.0
        for group in groups:
            keys = reference.may_go(group.positions, window, self._sinks_left(layer, row), self.step)
            heads = [matrix[-window:] for matrix in group.matrices()]
            dispersion += reference.dispersion(heads, keys)
            shift += reference.shift(heads, keys)
        self.preferences[row][layer] = dispersion, shift

    def _score(self, layer: int, row: int, group: Group) -> None:
        if not self.reads:
            return
        window = self.window_of(self.seen[row])
        group.recent = group.recent[-window:]
        scored = group.scores(
            self.selection, self.parameters, window, self._sinks_left(layer, row), self.step
        )
        share = min(1.0, len(group.pending) / window)
        for place, token in enumerate(group.tokens):
            new = scored.get(place)
            if new is None or token.score is None or 'recent' not in self.reads:
                token.score = new
            else:
                token.score += share * (new - token.score)

    def _cut(self) -> None:
        for layer in range(self.layers):
            for number, row in enumerate(self.rows[layer]):
                window, slots = self.window_of(self.seen[number]), self.slots[number][layer]
                if slots >= self.most(layer, number):
                    continue
                row.count = min(row.count, max(slots - self.slack, window + self.sinks))
                for group in row.groups:
                    places = reference.may_go(
                        group.positions, window, self._sinks_left(layer, number), self.step
                    )
                    scored = {
                        place: group.tokens[place].score if self.reads else group.positions[place]
                        for place in places
                    }
                    group.shrink(scored, row.count, self.step)
