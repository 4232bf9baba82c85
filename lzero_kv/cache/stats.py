"""Counters of a pool. Nothing here reads a clock or writes anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

_COUNTERS = (
    *('queries', 'hits', 'misses', 'stores', 'overwrites', 'evictions'),
    *('new_tokens', 'rebuilt_tokens', 'window_tokens', 'served_tokens'),
)


class Log2Histogram:
    """Counts of non-negative integers in buckets ``[0, 1), [1, 2), [2, 4), [4, 8), ...``."""

    __slots__ = ('counts',)

    def __init__(self, counts: list[int] | None = None) -> None:
        self.counts: list[int] = list(counts or [])
        """Values seen in each bucket; as long as the largest value needed."""

    def add(self, value: int) -> None:
        """Count one value; ValueError when it is negative."""
        self.add_all([value])

    def add_all(self, values: Sequence[int]) -> None:
        """Count many values.

        Raises:
            ValueError: one is negative. Nothing is counted.
        """
        if not values:
            return
        if min(values) < 0:
            raise ValueError(f'a histogram counts integers from 0, got {min(values)}')
        counts, buckets = self.counts, max(values).bit_length() + 1
        if buckets > len(counts):
            counts.extend([0] * (buckets - len(counts)))
        for value in values:
            counts[value.bit_length()] += 1

    @property
    def limits(self) -> list[int]:
        """Upper edge of each bucket (the first value that is not in it): 1, 2, 4, 8, ..."""
        return [1 << bucket for bucket in range(len(self.counts))]

    @property
    def total(self) -> int:
        """Number of values counted."""
        return sum(self.counts)

    def __add__(self, other: Log2Histogram) -> Log2Histogram:
        return Log2Histogram(_combine(self.counts, other.counts, 1))

    def __sub__(self, other: Log2Histogram) -> Log2Histogram:
        return Log2Histogram(_combine(self.counts, other.counts, -1))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Log2Histogram):
            return NotImplemented
        return not any(_combine(self.counts, other.counts, -1))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f'Log2Histogram({self.counts})'


@dataclass
class CacheStats:
    """What a pool did since it was made or since the last :meth:`reset`."""

    total_queries: int = 0
    """Keys looked up; ``queries`` is the same."""
    hits: int = 0
    """Queries that found their key."""
    misses: int = 0
    """Queries that did not."""
    stores: int = 0
    """Histories written, new ones and overwrites."""
    overwrites: int = 0
    """Stores under a key that was already there."""
    evictions: int = 0
    """Entries that had to make room for another."""
    new_tokens: int = 0
    """Tokens of new actions and observations, computed for the first time."""
    rebuilt_tokens: int = 0
    """Tokens recomputed because their history was not found."""
    window_tokens: int = 0
    """Tokens recomputed because a full window dropped its oldest step (``window='rebuild'``); no miss."""
    served_tokens: int = 0
    """Tokens of the histories behind them whose keys and values were there: a pass without a cache computes
    them again."""
    lifetime: Log2Histogram = field(default_factory=Log2Histogram)
    """Stores of the pool between an entry's first store and its removal (eviction, discard or clear)."""
    reuse_distance: Log2Histogram = field(default_factory=Log2Histogram)
    """Queries of the pool between a hit and the entry's previous access (hit or store)."""

    @property
    def queries(self) -> int:
        """The same as ``total_queries``."""
        return self.total_queries

    @property
    def computed_tokens(self) -> int:
        """New tokens, those of windows that moved, and rebuilt ones."""
        return self.new_tokens + self.window_tokens + self.rebuilt_tokens

    @property
    def saved_tokens(self) -> float:
        """Served tokens as a part of all that a pass without a cache computes; 0.0 before the first."""
        every = self.served_tokens + self.computed_tokens
        return self.served_tokens / every if every else 0.0

    @property
    def hit_rate(self) -> float:
        """Hits per query; 0.0 before the first query."""
        return self.hits / self.total_queries if self.total_queries else 0.0

    @property
    def miss_rate(self) -> float:
        """Misses per query; 1.0 before the first query, as LightZero's own manager has it."""
        return 1.0 - self.hit_rate

    def reset(self) -> None:
        """Set every counter to zero and empty the histograms."""
        for item in fields(self):
            setattr(self, item.name, type(getattr(self, item.name))())

    def snapshot(self) -> CacheStats:
        """A copy that later events do not change."""
        return self + CacheStats()

    def as_dict(self) -> dict[str, int | float]:
        """Counters and rates by name, without the histograms."""
        numbers: dict[str, int | float] = {name: getattr(self, name) for name in _COUNTERS}
        numbers |= {'computed_tokens': self.computed_tokens, 'saved_tokens': self.saved_tokens}
        return {**numbers, 'hit_rate': self.hit_rate, 'miss_rate': self.miss_rate}

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: CacheStats) -> CacheStats:
        return CacheStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


def _combine(left: list[int], right: list[int], sign: int) -> list[int]:
    size = max(len(left), len(right))
    left = left + [0] * (size - len(left))
    right = right + [0] * (size - len(right))
    return [a + sign * b for a, b in zip(left, right, strict=True)]
