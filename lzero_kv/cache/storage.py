"""The tensor behind the pools: every slot is one row, one operator moves a batch of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.transfer import to_device

Ints = Sequence[int] | np.ndarray
Slots = Ints

_NO_LIMIT = np.iinfo(np.int64).max


class KVSlab:
    """``slots`` rows of one layout in one tensor, allocated at the first use and never handed out.

    Arguments:
        layout: shape of a row.
        slots: number of rows.
        max_bytes: bound of the tensor's bytes, also while it is resized; None for no bound.
        scratch: whether the tensor has one row more, behind the slots, that belongs to nobody: rows of a
            batch that stand for nobody read and write there. It does not count towards ``max_bytes``.

    Raises:
        ValueError: ``slots`` is not positive or does not fit into ``max_bytes``.
    """

    def __init__(
        self, layout: KVLayout, slots: int, max_bytes: int | None = None, *, scratch: bool = False
    ) -> None:
        if slots < 1:
            raise ValueError(f'slots must be at least 1, got {slots}')
        if max_bytes is not None and slots * layout.row_bytes > max_bytes:
            raise ValueError(_over_bound(layout, slots, max_bytes))
        self.layout = layout
        self.slots = int(slots)
        self.max_bytes = max_bytes
        self._scratch = int(scratch)
        self.lengths = np.zeros(self.slots, np.int64)
        """int64 ``[slots]``: tokens of the history in each slot."""
        self.next_positions = np.zeros(self.slots, np.int64)
        """int64 ``[slots]``: logical position of the next token of the history in each slot."""
        self._uniform = layout.uniform
        self._tokens = layout.max_tokens
        self._data: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the tensor now; 0 until it is allocated."""
        return 0 if self._data is None else len(self._data) * self.layout.row_bytes

    @property
    def tensor(self) -> torch.Tensor:
        """The tensor itself, ``[slots, 2 * layers, tokens, embed_dim]`` (uniform layouts) and the scratch row
        behind them; replaced by :meth:`resize`. For a step that gathers and scatters on its own."""
        return self._columns(None)

    def allocate(self) -> None:
        """Allocate the tensor unless it is there.

        Raises:
            RuntimeError: there is no memory for it; nothing is changed.
        """
        if self._data is None:
            self._data = self._new(self.slots)

    def load(
        self, slots: Slots, *, newest: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Copy rows out, with one ``index_select``.

        Arguments:
            slots: ``B`` slot numbers.
            newest: copy only the last ``newest`` columns (uniform layouts); None for all.
            out: where to copy to, of the result's shape, dtype and device; may be a strided view.

        Returns:
            ``[B, 2 * layers, newest, embed_dim]``, or ``[B, row_elements]`` when the layout is not uniform:
            ``out`` or a new tensor that the caller owns.

        Raises:
            ValueError: a slot is out of range, or ``newest`` or the shape or device of ``out`` is wrong.
            TypeError: the dtype of ``out`` is wrong.
        """
        index = self.check_slots(slots)
        if newest is not None or out is not None:
            shape = self.layout.batch_shape(len(index), newest)
            if out is not None:
                self._check(out, 'out', shape)
        with torch.no_grad():
            columns = self._columns(newest)
            if out is None:
                return torch.index_select(columns, 0, to_device(index, self.layout.device))
            return torch.index_select(columns, 0, to_device(index, self.layout.device), out=out)

    def store(self, slots: Slots, rows: torch.Tensor, *, newest: int | None = None) -> None:
        """Copy rows in, with one ``index_copy_``; no gradient flows into the slab.

        Arguments:
            slots: ``B`` different slot numbers.
            rows: ``[B, 2 * layers, n, embed_dim]``, strided or not, written to the last ``n`` columns of the
                slots; or ``[B, row_elements]`` when the layout is not uniform.
            newest: ``n``, when the caller wants it checked.

        Raises:
            ValueError: a slot is out of range, or the shape or device of ``rows`` is wrong.
            TypeError: the dtype of ``rows`` is wrong.
        """
        index = self.check_slots(slots)
        self._scatter(index, rows, self.check_rows(rows, len(index), newest))

    def write(
        self, slots: np.ndarray, rows: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """:meth:`store` for slots that a pool handed out and a batch that :meth:`check_batch` accepted,
        together with the histories' lengths and next positions (int64 ``[B]``); nothing is checked again."""
        self._scatter(slots, rows, rows.shape[2] if self._uniform else None)
        self.lengths[slots] = lengths
        self.next_positions[slots] = next_positions

    def _scatter(self, index: np.ndarray, rows: torch.Tensor, width: int | None) -> None:
        with torch.no_grad():
            self._columns(width).index_copy_(0, to_device(index, self.layout.device), rows)

    def resize(self, slots: int, *, keep: int | None = None) -> None:
        """Change the number of slots. The old tensor is freed before the new one is allocated; the kept rows
        alone exist twice meanwhile, and count towards ``max_bytes``.

        Arguments:
            slots: the new number.
            keep: how many leading slots keep their contents; None for as many as fit.

        Raises:
            ValueError: ``slots`` or ``keep`` is out of range.
            RuntimeError: the bound or the memory does not allow it; size and kept slots are as before.
        """
        if slots < 1:
            raise ValueError(f'slots must be at least 1, got {slots}')
        keep = min(self.slots, slots) if keep is None else keep
        if not 0 <= keep <= min(self.slots, slots):
            raise ValueError(f'keep must be in [0, {min(self.slots, slots)}], got {keep}')
        if slots == self.slots:
            return
        twice = keep if self._data is not None else 0
        peak = (max(slots, self.slots if twice else 0) + twice) * self.layout.row_bytes
        if self.max_bytes is not None and peak > self.max_bytes:
            raise RuntimeError(_over_bound(self.layout, slots, self.max_bytes, twice))
        if self._data is not None:
            self._replace(slots, keep)
        for name in ('lengths', 'next_positions'):
            fresh = np.zeros(slots, np.int64)
            fresh[:keep] = getattr(self, name)[:keep]
            setattr(self, name, fresh)
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

    def check_rows(self, rows: torch.Tensor, count: int, newest: int | None = None) -> int | None:
        """Raise what :meth:`store` would raise for these rows.

        Returns:
            The columns they have; None when the layout is not uniform.
        """
        if newest is None and self._uniform and rows.ndim == 4 and rows.shape[2] <= self._tokens:
            newest = rows.shape[2]
        self._check(rows, 'rows', self.layout.batch_shape(count, newest))
        return newest

    def check_batch(
        self, count: int, rows: torch.Tensor, lengths: Ints, next_positions: Ints, newest: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raise what a :meth:`write` of ``count`` such histories would raise.

        Returns:
            ``lengths`` and ``next_positions`` as int64 ``[count]``.

        Raises:
            ValueError, TypeError: as :meth:`store`, or there is not one length and one position for each
                history, or a length is not in ``[0, n]`` with ``n`` the columns of ``rows``, or a position is
                negative.
        """
        width = self.check_rows(rows, count, newest)
        limit = self._tokens if width is None else width
        checked = []
        for name, numbers, top in (
            ('lengths', lengths, limit),
            ('next_positions', next_positions, _NO_LIMIT),
        ):
            array = _integers(numbers, name)
            if array.shape != (count,):
                raise ValueError(
                    f'{name} must be one integer for each of the {count} keys, got shape {array.shape}'
                )
            if count and array.view(np.uint64).max() > top:
                raise ValueError(f'{name} must be in [0, {top}], got {array.tolist()}')
            checked.append(array)
        return checked[0], checked[1]

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

    def _columns(self, newest: int | None) -> torch.Tensor:
        self.allocate()
        data = self._data
        if data is None:
            raise RuntimeError('the slab has no tensor after allocate()')
        if newest is None or newest == self._tokens:
            return data
        return data[:, :, self._tokens - newest :]

    def _new(self, slots: int) -> torch.Tensor:
        try:
            # Zeros, because masked attention multiplies the columns never written by weight 0, and 0 * NaN is
            # NaN. A tensor made in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                shape = self.layout.batch_shape(slots + self._scratch)
                return torch.zeros(shape, dtype=self.layout.dtype, device=self.layout.device)
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(
                f'no memory for {slots} slots of the KV cache: {slots * self.layout.row_bytes:,} bytes '
                f'wanted on {self.layout.device}, {_available(self.layout.device)} available; '
                f'lower kv_cache.max_bytes, kv_cache.recurrent_slots or num_simulations'
            ) from error

    def _replace(self, slots: int, keep: int) -> None:
        kept = self._data[:keep].clone() if self._data is not None else None
        self._data = None
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


def _integers(numbers: Ints, name: str) -> np.ndarray:
    array = np.array(numbers)
    if array.dtype.kind not in 'iu' and array.size:
        raise TypeError(f'{name} must be integers, got {array.dtype}')
    return array.astype(np.int64, copy=False)


def _over_bound(layout: KVLayout, slots: int, max_bytes: int, twice: int = 0) -> str:
    resize = f' and {twice} kept ones held twice meanwhile' if twice else ''
    return (
        f'{slots} slots{resize} need {(slots + twice) * layout.row_bytes:,} bytes '
        f'({layout.row_bytes:,} each), max_bytes is {max_bytes:,}; '
        f'raise kv_cache.max_bytes, or lower the number of slots'
    )


def _available(device: torch.device) -> str:
    try:
        if device.type == 'cuda':
            return f'{torch.cuda.mem_get_info(device)[0]:,} bytes'
        return f'{os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):,} bytes'
    except (RuntimeError, ValueError, OSError, AttributeError):
        return 'an unknown number of bytes'
