"""One batch of histories in flight: loaded with one gather, two tokens appended, stored with one scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.config import KVCacheConfig
from lzero_kv.keys import NO_SLOT
from lzero_kv.manager import KVCacheManager
from lzero_kv.window import TOKENS_PER_STEP, Window

from .observer import Histories
from .positions import positions_of
from .prepared import Prepared
from .transformer import Columns, additive_mask, append_token, causal_pass, position_shift

SHARED_FROM = 24
"""Searches share histories where windows keep at least so many tokens; shorter ones are as quick to copy."""


def is_exact(config: KVCacheConfig) -> bool:
    """Whether windows that drop a step are rebuilt."""
    return config.window == 'rebuild' or (config.window == 'auto' and config.padding != 'host')


def shares_histories(config: KVCacheConfig, window: Window) -> bool:
    """Whether searches keep their nodes in trees that share the roots' histories."""
    return is_exact(config) and window.kept >= SHARED_FROM


class Flights:
    """Makes flights: binds the host's transformer, the manager, the window and one reused buffer."""

    def __init__(self, world_model: Any, manager: KVCacheManager, config: KVCacheConfig) -> None:
        self.manager = manager
        self.window = Window(world_model.context_length)
        self.positions = positions_of(world_model)
        self.layers = int(world_model.num_layers)
        self.host_padding = config.padding == 'host'
        rotary = world_model.config.rotary_emb
        self.exact_window = is_exact(config)
        self.shares_histories = shares_histories(config, self.window)
        self._learned = None if rotary else world_model.pos_emb
        self._world_model = world_model
        self._prepared: Prepared | None = None
        self._buffer: torch.Tensor | None = None

    @property
    def prepared(self) -> Prepared:
        """Transformer and heads by the weights of the latest :meth:`take_weights`."""
        if self._prepared is None:
            self._prepared = Prepared(self._world_model, self.host_padding)
        return self._prepared

    def take_weights(self) -> None:
        """Notice weights that changed; called where a root inference or a search begins."""
        if self._prepared is not None and self._prepared.stale():
            self._prepared = None

    def forget_weights(self) -> None:
        """The weights changed, whether that can be seen or not."""
        self._prepared = None

    def begin_roots(self) -> None:
        """A root inference begins: what may change between searches alone changes now."""
        self.take_weights()

    def load(self, slots: np.ndarray, *, watched: bool = False) -> Flight:
        """Load the histories in ``slots`` (int64 ``[B]``); a row with ``NO_SLOT`` starts empty, for the
        caller to restore.

        Args:
            watched: this is a root inference, the only one whose attention decides about anything.
        """
        buffer, kept = self._buffer_of(len(slots)), self.window.kept
        present = slots != NO_SLOT
        lengths = np.zeros(len(slots), dtype=np.int64)
        next_positions = np.zeros(len(slots), dtype=np.int64)
        if present.any():
            known = slots[present]
            lengths[present] = self.manager.lengths(known)
            next_positions[present] = self.manager.next_positions(known)
            newest = kept if self.host_padding else int(lengths.max())
            filled = slots if present.all() else np.where(present, slots, known[0])
            self.manager.load(filled, newest=newest, out=buffer[:, :, kept - newest : kept])
        if self.host_padding and not present.all():
            buffer[torch.from_numpy(~present)] = 0.0  # the host's attention sees the padding, as zeros
        return Flight(self, buffer, lengths, next_positions)

    def window_shift(self) -> torch.Tensor | None:
        """The host's position correction by the present weights, None where positions need none."""
        if self._learned is None or self.exact_window:
            return None
        return position_shift(self._world_model.transformer, self._learned, self.window.kept)

    def widths(self, tokens: int) -> list[int]:
        """Tokens that each layer holds of histories of at most ``tokens`` tokens."""
        return [tokens] * self.layers

    def recompute(
        self,
        tokens: torch.Tensor,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keys and values of the newest ``lengths`` tokens of each row, from their raw embeddings alone.

        Args:
            tokens: ``[B, T, embed]`` raw embeddings, right-aligned.
            lengths, next_positions: int64 ``[B]``.
            out: ``[B, 2 * layers, T, embed]``, where to write them; None for a new tensor.

        Returns:
            ``out``.
        """
        rows, width, embed = tokens.shape
        if out is None:
            out = tokens.new_empty(rows, 2 * self.layers, width, embed)
        causal_pass(self.prepared, *self.placed(tokens, lengths, next_positions), out)
        return out

    def placed(
        self, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
        """Whole histories with their positions: what a pass of the transformer takes; arguments as of
        :meth:`recompute`."""
        columns = np.arange(-tokens.shape[1], 0)
        x, rotation = self.positions.place(
            tokens, lengths[:, None] + columns, next_positions[:, None] + columns
        )
        return x, lengths, rotation

    def compute(
        self, keys: Sequence[Any], tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """Compute histories from their raw tokens alone and store them under their keys; arguments as of
        :meth:`recompute`."""
        self.manager.store(keys, self.recompute(tokens, lengths, next_positions), lengths, next_positions)

    def forget_buffer(self) -> None:
        """Drop the reused buffer, after a failure that may have left non-finite numbers in it."""
        self._buffer = None

    def _buffer_of(self, rows: int) -> torch.Tensor:
        layout = self.manager.layout
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = torch.zeros(
                rows,
                2 * self.layers,
                self.window.in_flight,
                layout.embed_dim,
                dtype=layout.dtype,
                device=layout.device,
            )
        return self._buffer[:rows]


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
        at = torch.from_numpy(rows).to(kv.device)
        self.buffer[:, :, kept - kv.shape[2] : kept].index_copy_(0, at, kv)
        if kv.shape[2] < kept:
            self.buffer[:, :, : kept - kv.shape[2]].index_fill_(0, at, 0.0)
        self.lengths[rows], self.next_positions[rows] = lengths, next_positions

    def pad_as_host(self, rows: np.ndarray) -> None:
        """Count the zeros in front of the shorter of ``rows`` (bool ``[B]``) as tokens, as the host does at
        its roots."""
        self.lengths[rows] = self.lengths[rows].max()

    def skip(self) -> None:
        """Leave out a token in every row: the column stays in front of what begins after it."""
        self._begins[:] = True
        self._column += 1

    def append(self, x: torch.Tensor, absent: np.ndarray | None = None) -> torch.Tensor:
        """Append one token to every row.

        Args:
            x: ``[B, embed]`` raw embeddings.
            absent: bool ``[B]``: rows that have no such token; what is computed for them is to be thrown
                away.

        Returns:
            ``[B, embed]``, the transformer's output.
        """
        flights, own = self._flights, self._column
        placed, rotation = flights.positions.place(x, self.lengths, self.next_positions)
        visible = self.lengths + 1
        widest = int(visible.max())
        if absent is not None:
            self._begins = absent
        if flights.host_padding:
            visible = np.where(self._begins, visible, widest)
        mask = None
        if int(visible.min()) < widest:
            inside = np.arange(widest)[None, :] >= widest - visible[:, None]
            mask = additive_mask(inside, x)
        prepared = flights.prepared
        columns = Columns.of_buffer(self.buffer, (own + 1 - widest, own), prepared.heads, mask)
        hidden = append_token(prepared, columns, placed, rotation)
        grown = 1 if absent is None else (~absent).astype(np.int64)
        self.lengths = self.lengths + grown
        self.next_positions = self.next_positions + grown
        self._column += 1
        return hidden

    def slide(self, shift: torch.Tensor | None) -> np.ndarray:
        """Let the oldest step of full windows go; afterwards :attr:`kept` holds what stays.

        Args:
            shift: what :meth:`Flights.window_shift` gave, None where no correction applies.

        Returns:
            bool ``[B]``: rows whose window moved. Where windows are exact, their part of :attr:`kept` still
            knows what left: :meth:`rebuild` it, or do not store it.
        """
        self.kept = self.buffer[:, :, TOKENS_PER_STEP:]
        self.lengths, moved = self._flights.window.advance(self.lengths)
        if shift is not None and moved.all():
            self.kept += shift
        elif shift is not None and moved.any():
            self.kept.addcmul_(torch.from_numpy(moved).to(self.kept)[:, None, None, None], shift)
        return moved

    def histories(self, present: np.ndarray) -> Histories:
        """A copy of what the rows hold between steps: before the first token, or after :meth:`slide`."""
        begun = self._column == self._flights.window.kept
        kept = self.buffer[:, :, : self._flights.window.kept] if begun else self.kept
        return Histories(kept.clone(), self.lengths.copy(), present)

    def rebuild(self, rows: np.ndarray, tokens: torch.Tensor) -> None:
        """Compute what stays of windows that moved from their raw tokens alone.

        Args:
            rows: int64 ``[N]``.
            tokens: ``[N, kept, embed]`` raw embeddings of their newest tokens.
        """
        out = self.kept if len(rows) == len(self.kept) else None
        kv = self._flights.recompute(tokens, self.lengths[rows], self.next_positions[rows], out)
        if out is None:
            self.kept.index_copy_(0, torch.from_numpy(rows).to(kv.device), kv)

    def begin_trees(self, layers: Sequence[torch.Tensor]) -> np.ndarray:
        """Copy the histories to where trees begin, for each layer ``[B, 2, width_l, embed]``.

        Returns:
            int64 ``[B, 1]``: tokens of the rows, the same in every layer.
        """
        kept = self._flights.window.kept
        for number, layer in enumerate(layers):
            layer.copy_(self.buffer[:, 2 * number : 2 * number + 2, kept - layer.shape[2] : kept])
        return self.lengths[:, None]

    def store(self, keys: Sequence[Any], rows: np.ndarray | None = None) -> None:
        """Store rows (int64 ``[N]``; None for all) under their keys, one for each."""
        kept = self._flights.window.kept
        kv, lengths, next_positions = self.kept, self.lengths, self.next_positions
        if rows is not None and len(rows) < len(lengths):
            kv, lengths, next_positions = kv[torch.from_numpy(rows)], lengths[rows], next_positions[rows]
        newest = kept if self._flights.host_padding else int(lengths.max())
        self._flights.manager.store(keys, kv[:, :, kept - newest :], lengths, next_positions, newest=newest)
