"""One compared row: what the manager, the old system and the recomputation say about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lzero_kv.lightzero.validation.histories import Course
from lzero_kv.lightzero.validation.twin import HistoryName
from lzero_kv.validation.causes import Cause

Opinion = tuple[torch.Tensor | None, dict[str, torch.Tensor]]
"""Keys and values that were served, ``[2 * layers, T, embed]``, and answers by name."""


@dataclass
class HostOpinion:
    """The old system's part of one compared row.

    Attributes:
        key: what it looked for, or why it looked for nothing.
        kv: ``[2 * layers, T, embed]`` that it was served; None for nothing.
        answers: logits by name, where the old system's model ran.
        exact: both systems hold what was once stored for this very history, so they must be equal to the last
            bit.
        explain: the causes that are proven; None when the difference is not accounted for.
        moved: its answers, computed when asked for where its model did not run.
    """

    key: str
    kv: torch.Tensor | None
    answers: dict[str, torch.Tensor] = field(default_factory=dict)
    exact: bool = False
    explain: Callable[[], frozenset[Cause] | None] = lambda: None
    moved: Callable[[], dict[str, torch.Tensor]] = dict


@dataclass(frozen=True)
class RowTruth:
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
    answers: dict[str, torch.Tensor]
    positions: tuple[int, int]
    action: torch.Tensor | None
    latent: torch.Tensor


@dataclass(frozen=True)
class Compared:
    """One row with all three opinions.

    Attributes:
        kind: ``'roots'``, ``'nodes'`` or ``'reanalysis'``.
        name: the history that the row was to be served; at root inference, the new root.
        row: row of the batch.
        node: number of the parent; None at root inference.
        manager_key: the manager's name of what was served.
        kv, answers: the manager's.
        truth: the recomputation's.
        host: the old system's; None where it has none.
        lost: whether the manager should have had the entry and had not.
        course: how the true history came about.
    """

    kind: str
    name: HistoryName
    row: int
    node: int | None
    manager_key: str
    kv: torch.Tensor | None
    answers: dict[str, torch.Tensor]
    truth: RowTruth
    host: HostOpinion | None
    lost: bool
    course: Course
