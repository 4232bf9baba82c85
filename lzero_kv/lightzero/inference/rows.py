"""Keys and values that stand beside the rows of a batch while it computes: windows, paths, new tokens.

A row's columns are ``[window | path | new tokens]``. The window is a copy of a stored one, right-aligned
against the path; the path are the steps of the nodes between the window and the row's node. Columns that no
token stands in are masked. What stands beside a row already is not copied again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.transfer import sender
from lzero_kv.cache.window import TOKENS_PER_STEP

from .attention import Columns


@dataclass(frozen=True)
class Geometry:
    """How the windows of a model lie in the manager's storage, and beside the rows.

    Attributes:
        heads, head_dim: of a layer.
        widths: for each layer, tokens of a stored window; all the same unless a budget says otherwise. The
            layers divide a slot among themselves in this order.
    """

    heads: int
    head_dim: int
    widths: tuple[int, ...]

    @cached_property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.widths)

    @cached_property
    def window(self) -> int:
        """Columns of a window beside a row: those of the widest layer."""
        return max(self.widths)

    @cached_property
    def column(self) -> int:
        """Numbers of one token in all layers."""
        return 2 * self.layers * self.heads * self.head_dim

    def sources(self, storage: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
        """Layers, and their windows ``[slots, layers, 2, heads, width, head_dim]``: views of the storage's
        tensor; one block where a slot holds every layer of its own, else one for each layer."""
        if storage.shape[1] == 2 * self.layers:
            return [(slice(0, self.layers), storage.unflatten(1, (self.layers, 2)))]
        parts = storage[:, :, :, : sum(self.widths)].split(self.widths, dim=3)
        return [(slice(layer, layer + 1), part[:, None]) for layer, part in enumerate(parts)]


class ResidentRows:
    """What stands beside ``rows`` rows.

    Args:
        geometry: of the model's windows.
        manager: whose storage windows are copied from.
        memory: flat, at least :meth:`elements` finite numbers of no meaning.
        rows: of the batch.
        room: columns behind the window.

    Attributes:
        buffer: ``[B, layers, 2, heads, window + room, head_dim]``.
    """

    def __init__(
        self, geometry: Geometry, manager: KVCacheManager, memory: torch.Tensor, rows: int, room: int
    ) -> None:
        self.geometry = geometry
        self._storage = manager.storage
        self._send = sender(memory.device)
        self._window = geometry.window
        shape = (rows, geometry.layers, 2, geometry.heads, self._window + room, geometry.head_dim)
        self.buffer = memory[: self.elements(geometry, rows, room)].view(shape)

    @staticmethod
    def elements(geometry: Geometry, rows: int, room: int) -> int:
        """Numbers that so many rows take."""
        return rows * geometry.column * (geometry.window + room)

    def load(self, rows: np.ndarray, slots: np.ndarray, newest: int) -> None:
        """Copy the ``newest`` tokens of stored windows (``slots`` int64 ``[N]``) beside ``rows`` (int64
        ``[N]``)."""
        index = self._send(slots)
        at = None if len(rows) == len(self.buffer) else self._send(rows)
        for layers, source in self._stored():
            width = min(newest, source.shape[4])
            source = source[..., source.shape[4] - width :, :]
            place = self.buffer[:, layers, :, :, self._window - width : self._window]
            if at is None:
                torch.index_select(source, 0, index, out=place)
            else:
                place.index_copy_(0, at, source.index_select(0, index))

    def store(self, rows: np.ndarray, slots: np.ndarray, newest: int) -> None:
        """Copy the ``newest`` columns of windows of whole histories to slots (int64 ``[N]``)."""
        windows = self.buffer[..., self._window - newest : self._window, :]
        if len(rows) < len(self.buffer):
            windows = windows.index_select(0, self._send(rows))
        ((_, place),) = self._stored()
        place[..., place.shape[4] - newest :, :].index_copy_(0, self._send(slots), windows)

    def _stored(self) -> list[tuple[slice, torch.Tensor]]:
        """:meth:`Geometry.sources` of the storage, made once for each tensor that it has had."""
        views = self._storage.views
        if self.geometry not in views:
            views[self.geometry] = self.geometry.sources(self._storage.tensor)
        return views[self.geometry]

    def load_path(self, steps: torch.Tensor, at: np.ndarray) -> None:
        """Copy steps beside the windows.

        Args:
            steps: ``[N, layers, 2, heads, 2, head_dim]``, the two tokens of each.
            at: int64 ``[B, depth]``, which of them; right-aligned.
        """
        rows, depth = at.shape
        tokens = steps.index_select(0, self._send(at.reshape(-1)))
        place = self.buffer[..., self._window : self._window + TOKENS_PER_STEP * depth, :]
        place.unflatten(-2, (depth, TOKENS_PER_STEP)).copy_(
            tokens.unflatten(0, (rows, depth)).permute(0, 2, 3, 4, 1, 5, 6)
        )

    def columns(
        self,
        shown: torch.Tensor,
        begins: Sequence[int],
        end: int,
        new: int,
        mask: torch.Tensor | None,
    ) -> Columns:
        """What ``new`` tokens attend to that are written in front of column ``end``.

        Args:
            shown: a tensor like :attr:`buffer`.
            begins: the first column that is looked at, one number for all layers or one for each.
            mask: ``[B, 1 or layers, new, columns]`` from the first of them on; None where all is visible.
        """
        if len(begins) == 1:
            seen = shown[..., begins[0] : end, :]
            own = seen[..., seen.shape[4] - new :, :].unbind(1)
            keys, values = seen.unbind(2)
            return Columns(keys.unbind(1), values.unbind(1), own, [mask] * self.geometry.layers)
        keys, values, own, masks = [], [], [], []
        first = min(begins)
        for layer, begin in enumerate(begins):
            seen = shown[:, layer, :, :, begin:end]
            keys.append(seen[:, 0])
            values.append(seen[:, 1])
            own.append(seen[..., seen.shape[3] - new :, :])
            if mask is None:
                masks.append(None)
                continue
            columns = mask[:, layer : layer + 1, :, begin - first :]
            # a GPU's attention reads masks that begin at certain addresses alone
            masks.append(columns if begin == first else columns.clone())
        return Columns(keys, values, own, masks)


def visible_columns(prefix: np.ndarray, path: np.ndarray, depth: int, new: int) -> np.ndarray | None:
    """Which columns of ``[window | path | new]`` a token behind them may look at.

    Args:
        prefix: int64 ``[B, 1 or layers]``, visible tokens of each row's window.
        path: int64 ``[B]``, visible tokens of each row's path.
        depth: columns of the path.
        new: columns of new tokens, all visible.

    Returns:
        bool ``[B, 1 or layers, columns]``; None where all are visible. The window has as many columns as the
        largest of ``prefix``.
    """
    widest = int(prefix.max())
    if int(prefix.min()) == widest and int(path.min()) == depth:
        return None
    visible = np.ones((*prefix.shape, widest + depth + new), dtype=bool)
    visible[..., :widest] = np.arange(widest, 0, -1) <= prefix[..., None]
    visible[..., widest : widest + depth] = (np.arange(depth, 0, -1) <= path[:, None])[:, None]
    return visible
