"""What was dropped, layer by layer: counts and the attention that went with it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lzero_kv.budget.preference import at_least_float32
from lzero_kv.budget.selection import Kept
from lzero_kv.budget.tokens import Tokens, gather_tokens, mean_of_groups


class LayerLoss(NamedTuple):
    """What one layer dropped since the last :meth:`BudgetTally.take`."""

    dropped_tokens: int
    """Tokens, summed over rows; the mean over groups of heads."""
    lost_mass: float | None
    """Mean part of the newest query's attention that went to the dropped tokens, over the rows that dropped
    any; None where no attention was read or nothing was dropped."""


class BudgetTally:
    """Counts of dropped tokens and of the attention they had.

    Arguments:
        layers: number of layers.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._clear()

    def _clear(self) -> None:
        # sums, kept where the attention is until somebody asks for them
        self._tokens: list[float | torch.Tensor] = [0.0] * self.layers
        self._mass: list[float | torch.Tensor] = [0.0] * self.layers
        self._rows: list[float | torch.Tensor] = [0.0] * self.layers

    def dropped(self, layer: int, tokens: Tokens, kept: Kept, newest: torch.Tensor | None) -> None:
        """Take in one choice.

        Arguments:
            layer: number of the layer.
            tokens: the tokens that it chose from.
            kept: those that stay.
            newest: attention of the newest query, ``[B, heads, n]``; None where it was not read.
        """
        gone = tokens.lengths - kept.lengths
        self._tokens[layer] = self._tokens[layer] + gone.double().mean(1).sum()
        if newest is None:
            return
        groups = tokens.lengths.shape[1]
        mass = mean_of_groups(at_least_float32(newest.detach()), groups)
        place = torch.arange(kept.indices.shape[2], device=mass.device)
        real = place >= kept.indices.shape[2] - kept.lengths[..., None]
        stays = torch.where(real, gather_tokens(mass, kept.indices), 0.0).sum(-1)
        total = torch.where(tokens.real, mass, 0.0).sum(-1)
        rows = (gone > 0).any(1)
        lost = torch.where(rows, (total - stays).clamp(min=0).mean(1), 0.0)
        self._mass[layer] = self._mass[layer] + lost.double().sum()
        self._rows[layer] = self._rows[layer] + rows.double().sum()

    def take(self) -> list[LayerLoss]:
        """What each layer dropped since the last call; counting begins anew."""
        losses = []
        for sums in zip(self._tokens, self._mass, self._rows, strict=True):
            tokens, mass, rows = map(float, sums)
            losses.append(LayerLoss(round(tokens), mass / rows if rows else None))
        self._clear()
        return losses
