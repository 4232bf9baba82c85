"""Events of inference, for observers. Without observers they cost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .heads import StepOutputs
from .inputs import RootInputs


@dataclass(frozen=True)
class Histories:
    """Keys and values of a batch of histories, as one step was handed them or left them.

    Attributes:
        kv: for each row a copy ``[2 * layers, length, embed]``.
        present: bool ``[B]``. Handed: rows whose keys and values were there, or never were stored before (the
            others were lost and computed again). Left: rows whose keys and values are there (the others are
            computed when they are asked for, and their part of ``kv`` is not theirs).
    """

    kv: Sequence[torch.Tensor]
    present: np.ndarray
    rounded: bool = False
    """Whether the next step is handed these numbers up to rounding: shifted positions are added to them."""

    def row(self, row: int) -> torch.Tensor:
        """``[2 * layers, length, embed]`` of one row."""
        return self.kv[row]


@dataclass(frozen=True)
class RootsInferred:
    """A root inference that is done.

    Attributes:
        inputs: what inference was given; its ``keys`` name the new roots.
        latents: ``[B, 1, embed]``.
        served: what the rows that continue were handed, where an observer needs it.
        stored: the new roots, likewise.
        outputs: the answers.
    """

    inputs: RootInputs
    latents: torch.Tensor
    served: Histories
    stored: Histories
    outputs: StepOutputs


@dataclass(frozen=True)
class SearchBegun:
    """A search whose roots stand.

    Attributes:
        latents: ``[B, 1, embed]`` of the roots.
        timestep: as the host gave it.
        from_roots: whether the roots are those of the latest root inference, else each history is its latent
            state alone.
        next_positions: int64 ``[B]``, logical position of each root's next token.
        capacity: derived windows that the pool may come to hold.
    """

    latents: np.ndarray
    timestep: Any
    from_roots: bool
    next_positions: np.ndarray
    capacity: int


@dataclass(frozen=True)
class NodesExpanded:
    """One simulation: a child for every row.

    Attributes:
        simulation: number of the children, from 1.
        parents: int64 ``[B]``, number of each row's parent (0: its root).
        actions: int64 ``[B]``, or ``[B, action_space_size]`` where actions are continuous.
        served: the parents, where an observer needs them.
        stored: the children, likewise.
        outputs: the answers.
    """

    simulation: int
    parents: np.ndarray
    actions: torch.Tensor
    served: Histories
    stored: Histories
    outputs: StepOutputs


NO_HISTORIES = Histories((), np.empty(0, bool))
"""Where no observer needs them."""


@contextmanager
def observed() -> Iterator[None]:
    """Without gradients, outside of inference mode, whose tensors could not be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Observer:
    """Base of observers of a world model; every method does nothing."""

    needs_histories = False
    """Whether the events have to carry copies of keys and values."""

    def roots_inferred(self, event: RootsInferred) -> None:
        """A root inference is done."""

    def search_begun(self, event: SearchBegun) -> None:
        """A search begins."""

    def nodes_expanded(self, event: NodesExpanded) -> None:
        """A simulation is done."""

    def episodes_ended(self, env_ids: Sequence[int]) -> None:
        """These environments' histories are forgotten."""

    def caches_cleared(self) -> None:
        """All keys and values are dropped: the weights changed, or are about to be read anew."""

    def roots_cleared(self) -> None:
        """The keys and values of all roots are dropped."""

    def nodes_cleared(self) -> None:
        """Code outside dropped the nodes of the latest search."""

    def contexts_lost(self) -> None:
        """All environments' histories are forgotten: new pools, for another dtype, device or size."""
