"""Budgets while a model runs: slots that follow the attention, counters of what was dropped, a snapshot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch

from lzero_kv.budget.allocation import allocate
from lzero_kv.budget.attention import Preference, at_least_float32, check_finite_preferences
from lzero_kv.budget.config import BudgetConfig
from lzero_kv.budget.selection import Kept
from lzero_kv.budget.tokens import Tokens, gather_tokens, mean_of_groups, real_columns


class BudgetTracker:
    """Slots of each layer for a model whose layers all hold ``context`` tokens.

    Preferences are averaged as they are observed; the slots change in :meth:`advance` alone, which is called
    between searches, and only when the weights have moved by more than ``hysteresis``.

    Arguments:
        config: what was chosen.
        layers: layers of the model.
        context: tokens that a layer would hold without a budget.
        smoothing: weight of the past in the average of the preferences, from 0 to below 1.
        hysteresis: part of the weights, from 0 to 1, that has to move before the slots do.

    Raises:
        ValueError: the budget does not hold what is always kept.
    """

    def __init__(
        self, config: BudgetConfig, layers: int, context: int, *, smoothing: float, hysteresis: float
    ) -> None:
        self.smoothing = smoothing
        self.hysteresis = hysteresis
        self.layers = layers
        self.context = context
        self.sizes = config.sizes(layers, context)
        self._allocation = config.allocator()
        self.preferences: tuple[Preference, ...] = ()
        """Averages of what was observed, one for each layer; empty before the first observation."""
        # nothing is known yet: every layer the same
        self._weights = self._shares([Preference(0.0, 0.0)] * layers)
        self.slots: tuple[int, ...] = self._slots()
        """Tokens that each layer holds."""

    @property
    def needs_preference(self) -> bool:
        """Whether :meth:`observe` changes anything."""
        return self._allocation.needs_preference

    def observe(self, preferences: Sequence[Preference]) -> None:
        """Average one measurement of every layer; the slots stay as they are.

        ``x <- smoothing x + (1 - smoothing) new``; the first one is taken as it is.

        Raises:
            ValueError: there is not one preference for each layer, or one is not finite; nothing is changed.
        """
        if len(preferences) != self.layers:
            raise ValueError(
                f'expected a preference for each of {self.layers} layers, got {len(preferences)}'
            )
        check_finite_preferences(preferences)
        keep = self.smoothing
        self.preferences = tuple(
            Preference(*(keep * past + (1 - keep) * now for past, now in zip(*pair, strict=True)))
            for pair in zip(self.preferences or preferences, preferences, strict=True)
        )

    def advance(self) -> bool:
        """Bring the slots up to date; whether they changed."""
        if not self.needs_preference or not self.preferences:
            return False
        weights = self._shares(self.preferences)
        moved = sum(abs(new - old) for new, old in zip(weights, self._weights, strict=True)) / 2
        if moved <= self.hysteresis:
            return False
        before, self._weights = self.slots, weights
        self.slots = self._slots()
        return self.slots != before

    def _shares(self, preferences: Sequence[Preference]) -> list[Fraction]:
        weights = self._allocation.weights(self.layers, preferences)
        return [weight / sum(weights) for weight in weights]

    def _slots(self) -> tuple[int, ...]:
        contexts = [self.context] * self.layers
        return allocate(self._weights, contexts=contexts, **self.sizes._asdict())


class LayerLoss(NamedTuple):
    """What one layer has dropped."""

    dropped_tokens: int = 0
    """Tokens, over all rows; the mean over groups of heads."""
    rows: int = 0
    """Rows that dropped any while the attention was read."""
    mass: float = 0.0
    """The newest query's attention to the dropped tokens, summed over those rows."""

    @property
    def lost_mass(self) -> float | None:
        """Mean part of the newest query's attention that went to dropped tokens; None where no attention was
        read."""
        return self.mass / self.rows if self.rows else None

    def since(self, previous: LayerLoss) -> LayerLoss:
        """What came after ``previous``."""
        passed: list[Any] = [now - before for now, before in zip(self, previous, strict=True)]
        return LayerLoss(*passed)


class BudgetCounters:
    """Counts of dropped tokens and of the attention they had.

    Arguments:
        layers: number of layers.
    """

    def __init__(self, layers: int) -> None:
        # on the device of the attention until they are read
        self._sums: list[torch.Tensor | None] = [None] * layers

    def dropped(self, layer: int, tokens: Tokens, kept: Kept, newest: torch.Tensor | None) -> None:
        """Take in one choice.

        Arguments:
            layer: number of the layer.
            tokens: the tokens that it chose from.
            kept: those that stay.
            newest: attention of the newest query, ``[B, heads, n]``; None where it was not read.
        """
        gone = tokens.lengths - kept.lengths
        count = gone.double().mean(1).sum()
        rows = mass = torch.zeros_like(count)
        if newest is not None:
            given = mean_of_groups(at_least_float32(newest.detach()), tokens.lengths.shape[1])
            total = torch.where(tokens.real, given, 0.0).sum(-1)
            stays = real_columns(kept.lengths, kept.indices.shape[2])
            left = torch.where(stays, gather_tokens(given, kept.indices), 0.0).sum(-1)
            some = (gone > 0).any(1)
            rows, mass = some.double().sum(), torch.where(some, (total - left).mean(1), 0.0).double().sum()
        sums = torch.stack([count, rows, mass])
        before = self._sums[layer]
        self._sums[layer] = sums if before is None else before + sums

    def losses(self) -> tuple[LayerLoss, ...]:
        """What each layer dropped so far."""
        found = (None if sums is None else sums.tolist() for sums in self._sums)
        return tuple(
            LayerLoss() if sums is None else LayerLoss(round(sums[0]), round(sums[1]), sums[2])
            for sums in found
        )


@dataclass(frozen=True)
class BudgetSnapshot:
    """What layers may hold, why, and what they do hold.

    Attributes:
        context: tokens that a layer would hold without a budget.
        slots: tokens that each layer may hold.
        preferences: averages of what was read off the attention, one for each layer; empty where nothing was.
        losses: what each layer has dropped.
        kept: for each layer the places (int64, 0 for the oldest token of a window) of the tokens that the
            latest roots of all environments hold; of the first group of heads.
        root: the same of one root alone.
    """

    context: int
    slots: tuple[int, ...]
    preferences: tuple[Preference, ...]
    losses: tuple[LayerLoss, ...]
    kept: tuple[np.ndarray, ...]
    root: tuple[np.ndarray, ...]

    def since(self, previous: BudgetSnapshot | None) -> BudgetSnapshot:
        """The same moment with the losses that came after ``previous``; with all, if counting began anew."""
        if previous is None:
            return self
        pairs = list(zip(self.losses, previous.losses, strict=True))
        if any(before.dropped_tokens > now.dropped_tokens or before.rows > now.rows for now, before in pairs):
            return self
        return replace(self, losses=tuple(now.since(before) for now, before in pairs))
