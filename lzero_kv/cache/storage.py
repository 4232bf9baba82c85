"""The tensor behind the pools: every slot is one row, one operator moves a batch of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.layout import CPU, KVLayout
from lzero_kv.cache.transfer import to_device

Ints = Sequence[int] | np.ndarray
Slots = Ints

SLOT_BYTES = 512
"""Bytes of main memory that a pool takes for a filled slot beside its row: key, numbers, age."""
_NO_LIMIT = np.iinfo(np.int64).max


class KVStorage:
    """``slots`` rows of one layout in one tensor, allocated at the first use.

    Arguments:
        layout: shape of a row; None takes that of the first :meth:`allocate`.
        slots: number of rows.
        scratch: whether the tensor has one row more, behind the slots: where rows of a batch read and write
            that stand for no history.

    Raises:
        ValueError: ``slots`` is not positive.
        RuntimeError: there is no memory for the numbers of so many slots.
    """

    def __init__(self, layout: KVLayout | None, slots: int, *, scratch: bool = False) -> None:
        if slots < 1:
            raise ValueError(f'slots must be at least 1, got {slots}')
        self.known_layout = layout
        """The layout, None until it is known."""
        self.slots = int(slots)
        self._scratch = int(scratch)
        self._data: torch.Tensor | None = None
        self._check_memory(slots)
        self.lengths = np.zeros(self.slots, np.int64)
        """int64 ``[slots]``: tokens of the history in each slot."""
        self.next_positions = np.zeros(self.slots, np.int64)
        """int64 ``[slots]``: logical position of the next token of the history in each slot."""
        self.views: dict[Any, Any] = {}
        """Views of the tensor, by who made them; dropped before another tensor takes its place, because a
        view that lives would keep the memory of the old one."""

    @property
    def layout(self) -> KVLayout:
        """Shape of a row.

        Raises:
            RuntimeError: it is not known yet.
        """
        if self.known_layout is None:
            raise RuntimeError(
                'the cache has no layout yet; pass layout=, or store a single history first: set(), '
                'set_init_cache() or set_recur_cache()'
            )
        return self.known_layout

    @property
    def bytes(self) -> int:
        """Bytes of the tensor now; 0 until it is allocated."""
        return 0 if self._data is None else self._data.nbytes

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor itself, ``[slots, 2 * layers, heads, tokens, head_dim]`` and the scratch row behind
        them; replaced by :meth:`resize`. For a step that gathers and scatters on its own."""
        return self.allocate() if self._data is None else self._data

    def allocate(self, layout: KVLayout | None = None) -> torch.Tensor:
        """The tensor, allocated unless it is there.

        Arguments:
            layout: shape of a row where none is known yet.

        Raises:
            RuntimeError: there is no memory for it, or no layout; nothing is changed.
        """
        if self._data is None:
            before, self.known_layout = self.known_layout, self.known_layout or layout
            try:
                self._data = self._new(self.slots)
            except RuntimeError:
                self.known_layout = before
                raise
        return self._data

    def load(
        self, slots: Slots, *, newest: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Copy rows out, with one ``index_select``.

        Arguments:
            slots: ``B`` slot numbers.
            newest: copy only the last ``newest`` columns; None for all.
            out: where to copy to, of the result's shape, dtype and device; may be a strided view.

        Returns:
            ``[B, 2 * layers, heads, newest, head_dim]``: ``out`` or a new tensor that the caller owns.

        Raises:
            ValueError: a slot is out of range, or ``newest`` or the shape or device of ``out`` is wrong.
            TypeError: the dtype of ``out`` is wrong.
        """
        index = self.check_slots(slots)
        shape = self.layout.batch_shape(len(index), newest)
        if out is not None:
            self._check(out, 'out', shape)
        with torch.no_grad():
            rows = to_device(index, self.layout.device)
            if out is None:
                return torch.index_select(self._columns(shape[3]), 0, rows)
            return torch.index_select(self._columns(shape[3]), 0, rows, out=out)

    def store(self, slots: Slots, rows: torch.Tensor) -> None:
        """Copy rows in, with one ``index_copy_``; no gradient flows into the storage.

        Arguments:
            slots: ``B`` different slot numbers.
            rows: ``[B, 2 * layers, heads, n, head_dim]``, strided or not, written to the last ``n`` columns
                of the slots.

        Raises:
            ValueError: a slot is out of range, or the shape or device of ``rows`` is wrong.
            TypeError: the dtype of ``rows`` is wrong.
        """
        index = self.check_slots(slots)
        self.check_rows(rows, len(index))
        self._scatter(index, rows)

    def write(
        self, slots: np.ndarray, rows: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """:meth:`store` for slots that a pool handed out and a batch that :meth:`check_batch` accepted,
        together with the histories' lengths and next positions (int64 ``[B]``); nothing is checked again."""
        self._scatter(slots, rows)
        self.lengths[slots] = lengths
        self.next_positions[slots] = next_positions

    def _scatter(self, index: np.ndarray, rows: torch.Tensor) -> None:
        with torch.no_grad():
            self._columns(rows.shape[3]).index_copy_(0, to_device(index, self.layout.device), rows)

    def resize(self, slots: int, *, keep: int | None = None) -> None:
        """Change the number of slots. The old tensor is freed before the new one is allocated; the kept rows
        alone exist twice meanwhile.

        Arguments:
            slots: the new number.
            keep: how many leading slots keep their contents; None for as many as fit.

        Raises:
            ValueError: ``slots`` or ``keep`` is out of range.
            RuntimeError: there is no memory for it; size and kept slots are as before.
        """
        if slots < 1:
            raise ValueError(f'slots must be at least 1, got {slots}')
        keep = min(self.slots, slots) if keep is None else keep
        if not 0 <= keep <= min(self.slots, slots):
            raise ValueError(f'keep must be in [0, {min(self.slots, slots)}], got {keep}')
        if slots == self.slots:
            return
        self._check_memory(slots, twice=keep if self._data is not None else 0)
        if self._data is not None:
            self._replace(slots, keep)
        self.lengths = resized(self.lengths[:keep], slots)
        self.next_positions = resized(self.next_positions[:keep], slots)
        self.slots = slots

    def check_slots(self, slots: Slots) -> np.ndarray:
        """``slots`` as int64 ``[B]``; ValueError when one is not in ``[0, slots)``."""
        index = _integers(slots, 'slots')
        if index.ndim != 1:
            raise ValueError(f'slots must be a flat sequence of slot numbers, got shape {index.shape}')
        # seen as unsigned numbers the negative ones are the largest: one reduction checks both ends
        if index.size and index.view(np.uint64).max() >= self.slots:
            raise ValueError(
                f'slots must be in [0, {self.slots}), got {index.tolist()}; a negative one means a miss'
            )
        return index

    def check_rows(self, rows: torch.Tensor, count: int) -> None:
        """Raise what :meth:`store` would raise for these rows."""
        fits = rows.ndim == 5 and rows.shape[3] <= self.layout.tokens
        self._check(rows, 'rows', self.layout.batch_shape(count, rows.shape[3] if fits else None))

    def check_batch(
        self, count: int, rows: torch.Tensor, lengths: Ints, next_positions: Ints
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raise what a :meth:`write` of ``count`` such histories would raise.

        Returns:
            ``lengths`` and ``next_positions`` as int64 ``[count]``.

        Raises:
            ValueError, TypeError: as :meth:`store`, or there is not one length and one position for each
                history, or a length is not in ``[0, n]`` with ``n`` the columns of ``rows``, or a position is
                negative.
        """
        self.check_rows(rows, count)
        return (
            _numbers(lengths, 'lengths', count, rows.shape[3]),
            _numbers(next_positions, 'next_positions', count, _NO_LIMIT),
        )

    def _check(self, tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f'{name} must have the shape {list(shape)} for {self.layout}, got {list(tensor.shape)}'
            )
        if tensor.dtype != self.layout.dtype:
            raise TypeError(
                f'{name} must be {self.layout.dtype}, got {tensor.dtype}; write .to({self.layout.dtype})'
            )
        device = self.layout.device
        if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
            raise ValueError(f"{name} must be on {device}, got {tensor.device}; move it with .to('{device}')")

    def _columns(self, newest: int) -> torch.Tensor:
        data, tokens = self.allocate(), self.layout.tokens
        return data if newest == tokens else data[:, :, :, tokens - newest :]

    def _new(self, slots: int) -> torch.Tensor:
        shape = self.layout.batch_shape(slots + self._scratch)
        self._check_memory(slots)
        try:
            # Zeros, because masked attention multiplies the columns never written by weight 0, and 0 * NaN is
            # NaN. A tensor made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                return torch.zeros(shape, dtype=self.layout.dtype, device=self.layout.device)
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(self._no_memory(slots)) from error

    def _replace(self, slots: int, keep: int) -> None:
        kept = self._data[:keep].clone() if self._data is not None else None
        self._data = None
        self.views.clear()
        try:
            self._data = self._new(slots)
        except RuntimeError:
            # the old size was there a moment ago; without kept rows it can wait until it is needed
            if keep:
                self._data = self._new(self.slots)
            raise
        finally:
            if self._data is not None and kept is not None:
                self._data[:keep] = kept

    def _check_memory(self, slots: int, twice: int = 0) -> None:
        # a CPU hands out more memory than it has, and kills the process that uses it
        layout = self.known_layout
        if layout is not None and layout.device.type == 'cpu':
            numbers = (slots + self._scratch + twice) * layout.row_bytes - self.bytes
        else:
            numbers = 0
        if numbers + slots * SLOT_BYTES > _available(CPU):
            raise RuntimeError(self._no_memory(slots))

    def _no_memory(self, slots: int) -> str:
        layout = self.known_layout
        device, row_bytes = (CPU, SLOT_BYTES) if layout is None else (layout.device, layout.row_bytes)
        return (
            f'no memory for {slots} slots of the KV cache: {slots * row_bytes:,} bytes wanted on '
            f'{device}, {_available(device):,} bytes available; lower kv_cache.max_bytes, '
            f'kv_cache.window_slots or num_simulations'
        )


def resized(array: np.ndarray, size: int) -> np.ndarray:
    """A copy of a flat array with ``size`` elements: cut off, or zeros behind."""
    fresh = np.zeros(size, array.dtype)
    fresh[: len(array)] = array[:size]
    return fresh


def _integers(numbers: Ints, name: str) -> np.ndarray:
    array = np.array(numbers)
    if array.dtype.kind not in 'iu' and array.size:
        raise TypeError(f'{name} must be integers, got {array.dtype}')
    return array.astype(np.int64, copy=False)


def _numbers(numbers: Ints, name: str, count: int, limit: int) -> np.ndarray:
    array = _integers(numbers, name)
    if array.shape != (count,):
        raise ValueError(f'{name} must be one integer for each of the {count} keys, got shape {array.shape}')
    if count and array.view(np.uint64).max() > limit:
        raise ValueError(f'{name} must be in [0, {limit}], got {array.tolist()}')
    return array


def _available(device: torch.device) -> float:
    """Bytes that can be allocated on a device; infinity where that is unknown."""
    try:
        if device.type == 'cuda':
            return torch.cuda.mem_get_info(device)[0]
        with open('/proc/meminfo') as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable:'))
    except (RuntimeError, ValueError, OSError, StopIteration):
        return math.inf
