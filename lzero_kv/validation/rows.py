"""One compared row: what the cache, the stock cache and the recomputation say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation.histories import Course, HistoryName

Logits = dict[str, torch.Tensor]
"""Answers by name: ``policy``, ``value``, ``reward``, ``latent``."""
Causes = frozenset[Cause]


@dataclass
class StockRow:
    """The stock cache's part of one compared row.

    Attributes:
        key: what it looked for, or why it looked for nothing.
        kv: ``[2 * layers, T, embed]`` that it was served; None for nothing.
        answers: logits by name, where the stock model ran.
        exact: both caches hold what was once stored for this very history, so they must be equal to the last
            bit.
        explain: the causes that are proven; None when the difference is not accounted for.
        moved: its answers, computed when asked for where its model did not run.
    """

    key: str
    kv: torch.Tensor | None
    answers: Logits = field(default_factory=dict)
    exact: bool = False
    explain: Callable[[], Causes | None] = lambda: None
    moved: Callable[[], Logits] = dict


@dataclass(frozen=True)
class Truth:
    """What a row must be served and must answer.

    Attributes:
        served: ``[2 * layers, T, embed]`` before the step; None where an episode begins.
        stored: the same after the step.
        answers: logits by name.
        positions: logical positions of the two tokens.
        action: embedding ``[embed]`` of the action; None where an episode begins.
        latent: ``[embed]`` of the observation token.
    """

    served: torch.Tensor | None
    stored: torch.Tensor
    answers: Logits
    positions: tuple[int, int]
    action: torch.Tensor | None
    latent: torch.Tensor


@dataclass(frozen=True)
class ComparedRow:
    """One row with all three answers.

    Attributes:
        kind: ``'roots'``, ``'nodes'`` or ``'reanalysis'``.
        name: the history that the row was to be served; at root inference, the new root.
        row: row of the batch.
        node: number of the parent; None at root inference.
        key: the cache's name of what was served.
        kv, answers: the cache's.
        truth: the recomputation's.
        stock: the stock cache's; None where it has none.
        lost: whether the cache should have had the entry and had not.
        course: how the true history came about.
    """

    kind: str
    name: HistoryName
    row: int
    node: int | None
    key: str
    kv: torch.Tensor | None
    answers: Logits
    truth: Truth
    stock: StockRow | None
    lost: bool
    course: Course
