"""The layer budgets of one moment: what is reported of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lzero_kv.budget.preference import Preference
from lzero_kv.budget.tally import LayerLoss


@dataclass(frozen=True)
class BudgetReading:
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

    def since(self, previous: BudgetReading | None) -> BudgetReading:
        """The same moment with the losses that came after ``previous``; with all, if counting began anew."""
        if previous is None:
            return self
        pairs = list(zip(self.losses, previous.losses, strict=True))
        if any(before.dropped_tokens > now.dropped_tokens or before.rows > now.rows for now, before in pairs):
            return self
        return replace(self, losses=tuple(now.since(before) for now, before in pairs))
