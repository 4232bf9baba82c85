"""What is compared: every allocation with every selection, and hybrids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lzero_kv.budget import ALLOCATIONS, SELECTIONS

WINDOW = 4
"""Tokens of the two newest steps; at an eighth of 64 tokens that is half of a layer's."""
STEP = 2
"""UniZero drops an observation with its action."""
SINKS = 2
"""The first step."""


@dataclass(frozen=True)
class Method:
    """A `budget` without its ratio."""

    name: str
    kind: str
    """'published', 'grid' (an allocation with a selection that nobody published together) or 'hybrid'."""
    options: dict[str, Any]

    def budget(self, ratio: float) -> dict[str, Any]:
        """What to write as `kv_cache.budget`."""
        return dict(self.options, ratio=ratio)


PUBLISHED = {
    ('uniform', 'streaming'): 'StreamingLLM',
    ('uniform', 'h2o'): 'H2O',
    ('uniform', 'snapkv'): 'SnapKV',
    ('pyramid', 'snapkv'): 'PyramidKV',
    ('attention_based', 'cake'): 'CAKE',
}


def grid() -> list[Method]:
    """Every allocation with every selection, alike in the rest."""
    return [
        _method(allocation, selection, name=None) for selection in SELECTIONS for allocation in ALLOCATIONS
    ]


def hybrids() -> list[Method]:
    """Candidates for the best: the accumulated attention mixed with CAKE's score, and what surrounds it."""
    sunk: dict[str, Any] = dict(sinks=SINKS)
    near: dict[str, Any] = dict(sinks=SINKS, window=2)
    mixed: dict[str, Any] = dict(alpha=0.5)
    return [
        *(_method(allocation, 'hace', 'sinks', **sunk) for allocation in ALLOCATIONS),
        *(_method(allocation, 'hace', 'sinks, window 2', **near) for allocation in ALLOCATIONS),
        _method('attention_based', 'hace', 'sinks, window 2, alpha 0.5', **near, **mixed),
        _method('uniform', 'hace', 'window 2', window=2),
        _method('uniform', 'hace', 'mix 0.25', mix=0.25),
        _method('uniform', 'hace', 'mix 0.75', mix=0.75),
        _method('uniform', 'hace', 'sinks, window 2, mix 0.75', mix=0.75, **near),
        _method('uniform', 'hace', 'theta 0.1', theta=0.1),
        _method('uniform', 'hace', 'time decay', strategy='time_decay'),
        _method('uniform', 'h2o', 'sinks, window 2', **near),
        _method('uniform', 'cake', 'sinks, window 2', **near),
    ]


def quick() -> list[Method]:
    """The published ones and one hybrid."""
    return [method for method in grid() if method.kind == 'published'] + hybrids()[:1]


def _method(allocation: str, selection: str, name: str | None, **options: Any) -> Method:
    """The name of a hybrid says what it adds."""
    published = PUBLISHED.get((allocation, selection)) if name is None else None
    chosen = dict(allocation=allocation, selection=selection, window=WINDOW, step=STEP)
    if selection == 'streaming':
        chosen['sinks'] = SINKS  # its authors' method is the sinks
    label = f'{selection} + {allocation}'
    kind = 'published' if published else 'grid' if name is None else 'hybrid'
    return Method(f'{label}, {name}' if name else label, kind, chosen | options)
