"""A batch of histories under layer budgets between load and store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lzero_kv.budget import layer_preference
from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP
from lzero_kv.lightzero.inference.attention import Columns, Watch, additive_mask, append_tokens
from lzero_kv.lightzero.inference.budgeted.held import HeldLayer
from lzero_kv.lightzero.inference.events import Histories

if TYPE_CHECKING:
    from lzero_kv.lightzero.inference.budgeted.flights import BudgetedFlights


class BudgetedFlight:
    """A batch of histories between load and store, as :class:`Flight`.

    Attributes:
        lengths: int64 ``[B]``, tokens of each history so far, dropped ones included.
        next_positions: int64 ``[B]``, logical position of each history's next token.
    """

    def __init__(
        self,
        flights: BudgetedFlights,
        layers: list[HeldLayer],
        lengths: np.ndarray,
        next_positions: np.ndarray,
        watched: bool,
    ) -> None:
        self._flights = flights
        self._layers = layers
        self._watched = watched
        self._column = 0
        self._grown = np.zeros(len(lengths), dtype=np.int64)
        self._stays: tuple[np.ndarray, torch.Tensor] | None = None
        self._newest: list[torch.Tensor] = []  # attention of the newest token, [B, heads, n_l]
        self.lengths = lengths
        self.next_positions = next_positions

    def restore(
        self, rows: np.ndarray, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """Compute rows (int64 ``[N]``) that were loaded empty from their raw tokens; other arguments as of
        :meth:`Flights.recompute`."""
        self._put(rows, self._flights.prefill(tokens, lengths, next_positions), lengths, next_positions)

    def _put(
        self, rows: np.ndarray, layers: Sequence[HeldLayer], lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        at = to_device(rows, layers[0].kv.device)
        for layer, other in zip(self._layers, layers, strict=True):
            layer.put(at, other)
        self.lengths[rows], self.next_positions[rows] = lengths, next_positions

    def await_windows(
        self, rows: np.ndarray, tokens: torch.Tensor, next_positions: np.ndarray, slots: np.ndarray
    ) -> None:
        """Compute full windows of rows that were loaded empty, and store them; arguments as of
        :meth:`Flight.await_windows`. What stays of a layer is chosen before the next layer is computed, so
        this pass is one of its own."""
        lengths = np.full(len(rows), tokens.shape[1])
        layers = self._flights.prefill(tokens, lengths, next_positions)
        self._put(rows, layers, lengths, next_positions)
        self._flights.write(slots, layers, lengths, next_positions)

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """Append one token to every row: raw embeddings ``[B, embed]`` to the transformer's output."""
        return self._append(x, np.zeros(len(x), dtype=bool))

    def append_step(
        self,
        actions: torch.Tensor | None,
        observations: torch.Tensor,
        first: np.ndarray,
        positions: np.ndarray,
        moving: np.ndarray,
        stays: torch.Tensor,
    ) -> torch.Tensor:
        """Append an action and the observation behind it to every row; arguments as of
        :meth:`Flight.append_step`. One after the other: each token's attention is seen by itself."""
        if len(moving):
            self._stays = moving, stays
        if actions is None:
            self._column += 1
        else:
            self._append(actions, first)
        self.next_positions = np.where(first, positions, self.next_positions)
        return self.append(observations)

    def _append(self, x: torch.Tensor, absent: np.ndarray) -> torch.Tensor:
        flights, prepared = self._flights, self._flights.prepared
        placed, rotation = flights.positions.place(
            x[:, None], self.lengths[:, None], self.next_positions[:, None]
        )
        grown = self._grown + ~absent
        columns = self._columns(x, flights.heads)
        next_positions = to_device(self.next_positions, x.device)[:, None]
        for layer in self._layers:
            own = layer.positions.shape[2] - TOKENS_PER_STEP + self._column
            layer.positions[:, :, own] = next_positions
        watch = self._watch(grown) if self._watched and flights.reads_attention else None
        hidden = append_tokens(prepared, columns, placed, rotation, watch=watch)
        self.lengths = self.lengths + grown - self._grown
        self.next_positions = self.next_positions + grown - self._grown
        self._grown = grown
        self._column += 1
        return hidden

    def _watch(self, grown: np.ndarray) -> Watch:
        """Who remembers the attention of a token, with which rows have grown by so many (int64 ``[B]``)."""
        added = to_device(grown, self._layers[0].kv.device)[:, None]
        self._newest = []

        def watch(number: int, probabilities: torch.Tensor) -> None:
            layer = self._layers[number]
            layer.record.observe(probabilities, layer.lengths_of_groups + added)
            self._newest.append(probabilities[:, :, -1])

        return watch

    def _columns(self, like: torch.Tensor, heads: int) -> Columns:
        keys, values, own, masks = [], [], [], []
        for layer in self._layers:
            end = layer.kv.shape[2] - TOKENS_PER_STEP + self._column + 1
            shown = layer.kv[:, :, :end].unflatten(-1, (heads, -1))
            keys.append(shown[:, 0].transpose(1, 2))
            values.append(shown[:, 1].transpose(1, 2))
            own.append(shown[:, :, end - 1 :])
            visible = layer.lengths.cpu().numpy() + self._grown + 1
            masks.append(additive_mask((np.arange(end) >= end - visible[:, None])[:, None], like))
        return Columns(keys, values, own, masks)

    def slide(self, shift: torch.Tensor | None) -> np.ndarray:
        """Drop what is over the budget, and let the oldest step of full windows go.

        Returns:
            bool ``[B]``: rows whose window moved. Where what stays was not given to :meth:`append_step`, do
            not store them.
        """
        self.lengths, moved = self._flights.window.advance(self.lengths)
        added = to_device(self._grown, self._layers[0].kv.device)
        for layer in self._layers:
            layer.lengths = layer.lengths + added
        if self._watched:
            self._observe_preferences()
        self._layers = [self._cut(number, layer) for number, layer in enumerate(self._layers)]
        if self._stays is not None:
            rows, tokens = self._stays
            self.restore(rows, tokens, self.lengths[rows], self.next_positions[rows])
        return moved

    def _cut(self, number: int, layer: HeldLayer) -> HeldLayer:
        kept = self._flights.choose(layer, number)
        newest = self._newest[number] if self._newest else None
        self._flights.tally.dropped(number, layer.tokens, kept, newest)
        return layer.keep(kept)

    def _observe_preferences(self) -> None:
        flights, terms = self._flights, self._flights.table.terms
        if not flights.tracker.needs_preference:
            return
        flights.tracker.observe(
            [
                layer_preference(
                    layer.record.recent,
                    layer.lengths,
                    window=terms.window,
                    sinks=terms.sinks,
                    step=terms.step,
                )
                for layer in self._layers
                if layer.record.recent is not None
            ]
        )

    def begin_trees(self, layers: Sequence[torch.Tensor]) -> np.ndarray:
        """Copy the histories to where trees begin, for each layer ``[B, 2, width_l, heads, head_dim]``.

        Returns:
            int64 ``[B, layers]``: tokens of each row in each layer.
        """
        for begin, layer in zip(layers, self._layers, strict=True):
            held = layer.kv.shape[2] - TOKENS_PER_STEP
            begin.copy_(layer.kv[:, :, held - begin.shape[2] : held].view_as(begin))
        return torch.stack([layer.lengths for layer in self._layers], dim=1).cpu().numpy()

    def histories(self, present: np.ndarray) -> Histories:
        """Whole histories are not there to be shown.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            'observers compare whole histories, and kv_cache.budget keeps a part of them; leave budget out'
        )

    def store(self, keys: Sequence[Any]) -> None:
        """Store all rows under their keys."""
        self._flights.put_away(keys, self._layers, self.lengths, self.next_positions)
