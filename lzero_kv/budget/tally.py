"""What was dropped, layer by layer: counts and the attention that went with it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lzero_kv.budget.preference import at_least_float32
from lzero_kv.budget.selection import Kept
from lzero_kv.budget.tokens import Tokens, gather_tokens, mean_of_groups, real_columns


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
        return LayerLoss(
            self.dropped_tokens - previous.dropped_tokens,
            self.rows - previous.rows,
            self.mass - previous.mass,
        )


class BudgetTally:
    """Counts of dropped tokens and of the attention they had.

    Arguments:
        layers: number of layers.
    """

    def __init__(self, layers: int) -> None:
        # kept where the attention is until somebody asks
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
