"""What is compared: methods as published, every allocation with every selection, and hybrids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lzero_kv.budget import ALLOCATIONS, SELECTIONS

WINDOW = 4
"""Tokens of the two newest steps; at an eighth of 61 tokens that is half of a layer's."""
SINKS = 2
"""The first step."""
STEP = 2
"""UniZero drops an observation with its action."""
ALONE: dict[str, Any] = dict(sinks=0, per_head=True)
"""Each head keeps tokens of its own, and nothing is kept for being first: as in most publications."""

FINE: dict[str, Any] = dict(ALONE, window=2, step=1, kernel=1, gamma=0.0)
"""Token by token: an observation stays without its action, and no token for its neighbour's sake; of the
newest step alone it is certain that it stays."""


@dataclass(frozen=True)
class Method:
    """A `kv_cache.budget` without its ratio; sizes are written out, so that other defaults change nothing."""

    name: str
    kind: str
    """'published', 'grid' or 'hybrid'."""
    options: dict[str, Any]

    def budget(self, ratio: float) -> dict[str, Any]:
        """What to write as `kv_cache.budget`."""
        return dict(self.options, ratio=ratio)


def published() -> list[Method]:
    """As their authors define them, in whole steps and in single tokens: each head keeps tokens of its own,
    no sinks but for StreamingLLM, all of the weights from the attention for CAKE."""
    return [
        _method('published', allocation, selection, name + more, step=step, **options)
        for step, more in ((2, ''), (1, ', step 1'))
        for allocation, selection, name, options in (
            ('uniform', 'streaming', 'StreamingLLM', {}),
            ('uniform', 'h2o', 'H2O', ALONE),
            ('uniform', 'snapkv', 'SnapKV', ALONE),
            ('pyramid', 'snapkv', 'PyramidKV', ALONE),
            ('attention_based', 'cake', 'CAKE', dict(ALONE, alpha=1.0)),
        )
    ]


def grid() -> list[Method]:
    """Every allocation with every selection, alike in the rest: sinks, heads together."""
    return [
        _method('grid', allocation, selection, f'{selection} + {allocation}')
        for selection in SELECTIONS
        for allocation in ALLOCATIONS
    ]


def hybrids() -> list[Method]:
    """Candidates for the best: the accumulated attention mixed with CAKE's score, and what surrounds it."""
    found = [_hybrid(allocation, f'{allocation}, window 2', window=2) for allocation in ALLOCATIONS]
    return [
        *found,
        _hybrid('uniform', 'window 2, no sinks', window=2, sinks=0),
        _hybrid('uniform', 'no sinks', sinks=0),
        _hybrid('uniform', 'own heads, window 2', window=2, per_head=True),
        _hybrid('uniform', 'window 2, mix 0.25', window=2, mix=0.25),
        _hybrid('uniform', 'window 2, mix 0.75', window=2, mix=0.75),
        _hybrid('uniform', 'window 2, theta 0.1', window=2, theta=0.1),
        _hybrid('uniform', 'window 2, time decay', window=2, strategy='time_decay'),
        _hybrid('uniform', 'window 2, gamma 0', window=2, gamma=0.0),
        _hybrid('uniform', 'window 2, kernel 1', window=2, kernel=1),
        _hybrid('uniform', 'window 2, no sinks, kernel 1', window=2, sinks=0, kernel=1),
        _hybrid('uniform', 'alone, mix 0.25', mix=0.25, **ALONE),
        _hybrid('uniform', 'alone, mix 0.1', mix=0.1, **ALONE),
        _hybrid('uniform', 'alone, gamma 0, mix 0.25', gamma=0.0, mix=0.25, **ALONE),
        *(
            _hybrid(allocation, f'{allocation}, alone, gamma 0, mix 0.1', gamma=0.0, mix=0.1, **ALONE)
            for allocation in ALLOCATIONS
        ),
        _hybrid('uniform', 'alone, gamma 0, mix 0.1, window 2', gamma=0.0, mix=0.1, window=2, **ALONE),
        _method('hybrid', 'adaptive', 'snapkv', 'snapkv + adaptive, alone', **ALONE),
        _method('hybrid', 'attention_based', 'snapkv', 'snapkv + attention_based, alone', **ALONE),
        _method('hybrid', 'uniform', 'cake', 'cake + uniform, alone', **ALONE),
        _method('hybrid', 'uniform', 'cake', 'cake + uniform, alone, gamma 5', gamma=5.0, **ALONE),
        _method('hybrid', 'uniform', 'cake', 'cake + uniform, alone, gamma 20', gamma=20.0, **ALONE),
        _hybrid('uniform', 'alone, gamma 20, mix 0.05', gamma=20.0, mix=0.05, **ALONE),
        *(
            _hybrid(allocation, f'{allocation}, fine, mix {mix:g}', mix=mix, **FINE)
            for allocation in ('uniform', 'pyramid')
            for mix in (0.0, 0.25, 0.5)
        ),
        _hybrid('uniform', 'uniform, fine, mix 0, window 1', mix=0.0, **(FINE | dict(window=1))),
    ]


def quick() -> list[Method]:
    """The published ones, in whole steps, and one hybrid."""
    return [method for method in published() if method.options['step'] == STEP] + hybrids()[:1]


def _hybrid(allocation: str, name: str, **options: Any) -> Method:
    return _method('hybrid', allocation, 'hace', f'hace, {name}', **options)


def _method(kind: str, allocation: str, selection: str, name: str, **options: Any) -> Method:
    chosen = dict(allocation=allocation, selection=selection, window=WINDOW, sinks=SINKS, step=STEP)
    chosen['per_head'] = False
    if selection == 'hace':
        chosen |= dict(gamma=200.0) if 'strategy' in options else dict(gamma=200.0, mix=0.5)
    if allocation == 'attention_based':
        chosen['alpha'] = 0.5
    return Method(name, kind, chosen | options)
