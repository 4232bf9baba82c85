"""Makes flights (:class:`Flight`): what batches of histories have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP, Window
from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero.inference.attention import WindowsBeside, causal_pass, position_shift
from lzero_kv.lightzero.inference.flight import Flight
from lzero_kv.lightzero.inference.positions import positions_of
from lzero_kv.lightzero.inference.weights import Prepared

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
        self.heads = int(world_model.num_heads)
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
            # the host's attention sees the padding, as zeros
            buffer.index_fill_(0, to_device(np.flatnonzero(~present), buffer.device), 0.0)
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

    def moving(self, lengths: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The rows (int64 ``[N]``) of histories of ``lengths`` tokens whose exact window moves in a step that
        brings an observation, and an action unless it is the row's first (bool ``[B]``)."""
        if not self.exact_window:
            return np.empty(0, dtype=np.int64)
        _, moved = self.window.advance(lengths + np.where(first, 1, TOKENS_PER_STEP))
        return np.flatnonzero(moved)

    def windows_beside(
        self,
        tokens: torch.Tensor,
        next_positions: np.ndarray,
        out: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> WindowsBeside:
        """Full windows of raw embeddings (``[P, kept, embed]``, ``next_positions`` behind them), for another
        pass to compute; ``out`` and ``rows`` as of :class:`WindowsBeside`."""
        lengths = np.full(len(tokens), tokens.shape[1])
        x, _, rotation = self.placed(tokens, lengths, next_positions)
        return WindowsBeside(x, rotation, out, rows)

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
