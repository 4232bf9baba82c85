"""One batch of histories in flight: loaded with one gather, two tokens appended, stored with one scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP
from lzero_kv.lightzero.inference.attention import Columns, WindowsBeside, additive_mask, append_tokens
from lzero_kv.lightzero.inference.events import Histories

if TYPE_CHECKING:
    from lzero_kv.lightzero.inference.flights import Flights


class Flight:
    """A batch of histories between load and store.

    Attributes:
        buffer: ``[B, 2 * layers, kept + 2, embed]``, shared by all flights: one at a time.
        lengths: int64 ``[B]``, tokens of each history so far.
        next_positions: int64 ``[B]``, logical position of each history's next token.
        kept: ``[B, 2 * layers, kept, embed]``, what is left of the histories after :meth:`slide`; a view of
            the buffer.
    """

    def __init__(
        self, flights: Flights, buffer: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        self._flights = flights
        self._column = flights.window.kept
        self._begins = np.zeros(len(lengths), dtype=bool)
        self._awaited: tuple[WindowsBeside, np.ndarray] | None = None
        self._stays: WindowsBeside | None = None
        self._loaded, self._slid = lengths, False
        self.buffer = buffer
        self.kept = buffer[:, :, TOKENS_PER_STEP:]
        self.lengths = lengths
        self.next_positions = next_positions

    def restore(
        self, rows: np.ndarray, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """Compute rows (int64 ``[N]``) that were loaded empty from their raw tokens; other arguments as of
        :meth:`Flights.recompute`."""
        self.fill(rows, self._flights.recompute(tokens, lengths, next_positions), lengths, next_positions)

    def fill(
        self, rows: np.ndarray, kv: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """Put histories (``kv`` ``[N, 2 * layers, T, embed]``) into rows that were loaded empty; what is in
        front of them becomes zero."""
        kept = self._flights.window.kept
        at = to_device(rows, kv.device)
        self.buffer[:, :, kept - kv.shape[2] : kept].index_copy_(0, at, kv)
        if kv.shape[2] < kept:
            self.buffer[:, :, : kept - kv.shape[2]].index_fill_(0, at, 0.0)
        self.lengths[rows], self.next_positions[rows] = lengths, next_positions

    def pad_as_host(self, rows: np.ndarray) -> None:
        """Count the zeros in front of the shorter of ``rows`` (bool ``[B]``) as tokens, as the host does at
        its roots."""
        self.lengths[rows] = self.lengths[rows].max()

    def await_windows(
        self, rows: np.ndarray, tokens: torch.Tensor, next_positions: np.ndarray, slots: np.ndarray
    ) -> None:
        """Compute full windows of rows that were loaded empty in the pass of the next token, and store them.

        Args:
            rows: int64 ``[P]``.
            tokens: ``[P, kept, embed]`` raw embeddings.
            next_positions: int64 ``[P]``, behind the windows.
            slots: int64 ``[P]``, where they are stored.
        """
        kept = self._flights.window.kept
        self.lengths[rows], self.next_positions[rows] = kept, next_positions
        at = None if len(rows) == len(self.lengths) else to_device(rows, tokens.device)
        windows = self._flights.windows_beside(tokens, next_positions, self.buffer[:, :, :kept], at)
        self._awaited = windows, slots

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
        """Append an action and the observation behind it to every row, in one pass.

        Args:
            actions: ``[B, embed]`` raw embeddings; None where no row has one.
            observations: ``[B, embed]`` raw embeddings.
            first: bool ``[B]``: rows that begin with their observation and have no action.
            positions: int64 ``[B]``, logical positions of the observations in those rows.
            moving: int64 ``[N]``, rows whose exact window moves in this step: :meth:`Flights.moving`.
            stays: ``[N, kept, embed]`` raw embeddings of what stays of these windows; computed in the same
                pass, put into place by :meth:`slide`.

        Returns:
            ``[B, embed]``, the transformer's output of the observations.
        """
        if len(moving):
            next_positions = self.next_positions[moving] + TOKENS_PER_STEP
            out = stays.new_empty(len(stays), *self.kept.shape[1:])
            self._stays = self._flights.windows_beside(stays, next_positions, out, None)
        if actions is not None and not self._flights.host_padding:
            return self._append_both(actions, observations, first, positions)
        if actions is None:  # beginnings alone, and none of them moves
            self._begins = first
            self._column += 1
        else:  # the host's own order of operations; its windows shift
            self._append(actions, first)
        self.next_positions = np.where(first, positions, self.next_positions)
        return self.append(observations)

    def _append(self, x: torch.Tensor, absent: np.ndarray) -> torch.Tensor:
        """Append one token ``[B, embed]`` to every row; what is computed for ``absent`` rows (bool ``[B]``),
        which have none, is to be thrown away."""
        self._begins = self._begins | absent
        visible = self.lengths + 1
        widest = int(visible.max())
        if self._flights.host_padding:
            visible = np.where(self._begins, visible, widest)
        mask = None
        if int(visible.min()) < widest:
            inside = np.arange(widest)[None, :] >= widest - visible[:, None]
            mask = additive_mask(inside[:, None], x)
        awaited, self._awaited = self._awaited, None
        windows = None if awaited is None else awaited[0]
        places, logical = self.lengths[:, None], self.next_positions[:, None]
        hidden = self._run(x[:, None], places, logical, widest, mask, windows)
        if awaited is not None:
            self._flights.manager.slab.store(awaited[1], awaited[0].written())
        self.lengths = self.lengths + ~absent
        self.next_positions = self.next_positions + ~absent
        return hidden

    def _append_both(
        self, actions: torch.Tensor, observations: torch.Tensor, first: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        places = np.stack([self.lengths, self.lengths + ~first], axis=1)
        ahead = self.next_positions
        logical = np.stack([ahead, np.where(first, positions, ahead + 1)], axis=1)
        widest = int(places[:, 1].max()) + 1
        columns, own = np.arange(widest), np.array([widest - 2, widest - 1])
        behind = own[None, :, None] - columns  # how far in front of the token a column stands
        visible = (behind >= 0) & (behind <= places[:, :, None])
        mask = additive_mask(visible, observations)
        x = torch.stack([actions, observations], dim=1)
        hidden = self._run(x, places, logical, widest, mask, self._stays)
        self.lengths, self.next_positions = places[:, 1] + 1, logical[:, 1] + 1
        return hidden

    def _run(
        self,
        x: torch.Tensor,
        places: np.ndarray,
        logical: np.ndarray,
        widest: int,
        mask: torch.Tensor | None,
        windows: WindowsBeside | None,
    ) -> torch.Tensor:
        """Take new tokens ``[B, n, embed]`` into the next columns; they attend to the ``widest`` newest ones,
        ``mask`` ``[B, n, widest]``."""
        flights, new = self._flights, x.shape[1]
        self._column += new
        placed, rotation = flights.positions.place(x, places, logical)
        seen = self._column - widest, self._column
        columns = Columns.of_buffer(self.buffer, seen, new, flights.heads, mask)
        return append_tokens(flights.prepared, columns, placed, rotation, windows=windows)

    def slide(self, shift: torch.Tensor | None) -> np.ndarray:
        """Let the oldest step of full windows go; afterwards :attr:`kept` holds what stays.

        Args:
            shift: what :meth:`Flights.window_shift` gave, None where no correction applies.

        Returns:
            bool ``[B]``: rows whose window moved. Where windows are exact and what stays was not given to
            :meth:`append_step`, their part of :attr:`kept` still knows what left: do not store it.
        """
        self.lengths, moved = self._flights.window.advance(self.lengths)
        self._slid = True
        if self._stays is not None:
            if moved.all():
                self.kept.copy_(self._stays.out)
            else:
                self.kept.index_copy_(0, to_device(np.flatnonzero(moved), self.kept.device), self._stays.out)
        elif shift is not None and moved.all():
            self.kept += shift
        elif shift is not None and moved.any():
            ours = to_device(moved, self.kept.device).to(self.kept.dtype)
            self.kept.addcmul_(ours[:, None, None, None], shift)
        return moved

    def histories(self, present: np.ndarray) -> Histories:
        """A copy of what the rows hold between steps: until :meth:`slide` what they were handed, then what
        they leave."""
        kept = self._flights.window.kept
        kv, lengths = (self.kept, self.lengths) if self._slid else (self.buffer[:, :, :kept], self._loaded)
        return Histories(kv.clone(), lengths.copy(), present)

    def begin_trees(self, layers: Sequence[torch.Tensor]) -> np.ndarray:
        """Copy the histories to where trees begin, for each layer ``[B, 2, width_l, heads, head_dim]``.

        Returns:
            int64 ``[B, 1]``: tokens of the rows, the same in every layer.
        """
        kept = self._flights.window.kept
        by_head = self.buffer.unflatten(-1, (self._flights.heads, -1))
        for number, layer in enumerate(layers):
            layer.copy_(by_head[:, 2 * number : 2 * number + 2, kept - layer.shape[2] : kept])
        return self.lengths[:, None]

    def store(self, keys: Sequence[Any], rows: np.ndarray | None = None) -> None:
        """Store rows (int64 ``[N]``; None for all) under their keys, one for each."""
        kept = self._flights.window.kept
        kv, lengths, next_positions = self.kept, self.lengths, self.next_positions
        if rows is not None and len(rows) < len(lengths):
            kv = kv[to_device(rows, kv.device)]
            lengths, next_positions = lengths[rows], next_positions[rows]
        newest = kept if self._flights.host_padding else int(lengths.max())
        self._flights.manager.store(keys, kv[:, :, kept - newest :], lengths, next_positions, newest=newest)
