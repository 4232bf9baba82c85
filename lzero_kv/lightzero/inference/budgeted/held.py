"""What layers under a budget hold of a batch of histories, and how a history lies in one row of a pool.

A row of a pool has the same number of tokens whatever the budgets are, ``[2, total, embed]``: one run of
columns, of which each layer has its own part. What selection needs to know of the tokens (their positions,
the attention they were given) lies in the same order in :class:`HeldTable`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lzero_kv.budget import AttentionRecord, Kept, Tokens
from lzero_kv.cache.transfer import to_device


@dataclass(frozen=True)
class Terms:
    """What is the same for all histories of a model: ``G`` groups of heads that keep tokens of their own."""

    groups: int
    heads: int
    window: int
    sinks: int
    step: int
    decay: float
    reads: Collection[str]

    def record(self) -> AttentionRecord:
        """A record in which nothing was observed."""
        return AttentionRecord(self.groups, self.window, self.decay, self.reads)


@dataclass
class HeldLayer:
    """One layer of a batch of histories, right-aligned: the newest token in the last of ``n`` columns.

    Attributes:
        kv: ``[B, 2, n, embed]``; finite and without meaning in front of a row's tokens.
        positions: int64 ``[B, G, n]``, logical positions.
        lengths: int64 ``[B]``, tokens of each row; all groups hold the same number.
        record: what is remembered of their attention.
    """

    terms: Terms
    kv: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    record: AttentionRecord

    @property
    def tokens(self) -> Tokens:
        """The tokens as selection sees them."""
        terms = self.terms
        return Tokens(self.positions, self.lengths_of_groups, terms.window, terms.sinks, terms.step)

    @property
    def lengths_of_groups(self) -> torch.Tensor:
        """int64 ``[B, G]``."""
        return self.lengths[:, None].expand(-1, self.terms.groups)

    def newest(self, columns: int) -> Kept:
        """The last columns, for :meth:`keep` where nothing has to be chosen."""
        rows, groups, width = self.positions.shape
        indices = torch.arange(width - columns, width, device=self.kv.device)
        return Kept(indices.expand(rows, groups, -1), self.lengths_of_groups)

    def keep(self, kept: Kept) -> HeldLayer:
        """This layer with the kept tokens alone."""
        self.record.keep(kept.indices)
        by_group = self.kv.unflatten(-1, (self.terms.groups, -1))
        indices = kept.indices.transpose(1, 2)[:, None, :, :, None]
        kv = by_group.gather(2, indices.expand(-1, 2, -1, -1, by_group.shape[-1])).flatten(3)
        return HeldLayer(
            self.terms, kv, self.positions.gather(2, kept.indices), kept.lengths[:, 0], self.record
        )

    def widened(self, front: int, behind: int = 0) -> HeldLayer:
        """This layer with empty columns in front and behind; records never have columns behind."""
        record = self.record
        for name in ('accumulated', 'recent'):
            if (values := getattr(record, name)) is not None:
                setattr(record, name, F.pad(values, (front, 0)))
        kv = F.pad(self.kv, (0, 0, front, behind))
        return HeldLayer(self.terms, kv, F.pad(self.positions, (front, behind)), self.lengths, record)

    def put(self, rows: torch.Tensor, other: HeldLayer) -> None:
        """Replace rows (int64 ``[N]``) by those of ``other``, which has as many columns as the record."""
        columns = other.kv.shape[2]
        self.kv[:, :, :columns].index_copy_(0, rows, other.kv)
        self.positions[:, :, :columns].index_copy_(0, rows, other.positions)
        self.lengths.index_copy_(0, rows, other.lengths)
        for name in ('accumulated', 'recent', 'queries'):
            if (values := getattr(self.record, name)) is not None:
                values.index_copy_(0, rows, getattr(other.record, name))


class HeldTable:
    """What is known of the tokens in each slot of a pool, beside their keys and values.

    Args:
        terms: of the model.
        slots: tokens of each layer, the parts of a row.
        total: tokens of a row.
        roots: slots from 0 that hold roots; of others only the number of tokens is known.
        dtype, device: of the keys and values.
    """

    def __init__(
        self,
        terms: Terms,
        slots: Sequence[int],
        total: int,
        roots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.terms = terms
        self.total = total
        self.roots = roots
        self.slots = tuple(slots)
        scores: Any = dict(dtype=torch.promote_types(dtype, torch.float32), device=device)
        integers: Any = dict(dtype=torch.int64, device=device)
        groups, shape = terms.groups, (roots, terms.groups, total)
        self._positions = torch.zeros(shape, **integers)
        self._accumulated = torch.zeros(shape, **scores) if 'accumulated' in terms.reads else None
        recent = roots, terms.heads, terms.window, total
        self._recent = torch.zeros(recent, **scores) if 'recent' in terms.reads else None
        self._queries = torch.zeros(roots, groups, **integers)
        self._held = np.zeros((roots, len(self.slots)), dtype=np.int64)
        self._lengths = np.zeros(roots, dtype=np.int64)

    @property
    def bytes(self) -> int:
        """Bytes of what is remembered of the roots' attention and positions."""
        tensors = self._positions, self._accumulated, self._recent, self._queries
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def parts(self) -> list[slice]:
        """The columns of each layer in a row."""
        ends = np.cumsum(self.slots).tolist()
        return [slice(end - width, end) for end, width in zip(ends, self.slots, strict=True)]

    def lengths(self, slots: np.ndarray) -> np.ndarray:
        """int64 ``[B]``: tokens of the histories in these slots before anything was dropped."""
        return self._lengths[slots]

    def held(self, slots: np.ndarray) -> np.ndarray:
        """int64 ``[B, layers]``: tokens that each layer holds of the histories in these slots."""
        return self._held[slots]

    def positions(self, slots: np.ndarray) -> list[np.ndarray]:
        """For each layer int64 ``[B, columns]``: logical positions that the first group of heads holds in the
        last columns of these slots, which are roots."""
        of_slots = self._positions[to_device(slots, self._positions.device), 0].cpu().numpy()
        return [of_slots[:, part] for part in self.parts()]

    def unpack(
        self, rows: torch.Tensor, slots: np.ndarray, present: np.ndarray, watched: bool
    ) -> list[HeldLayer]:
        """Rows ``[B, 2, total, embed]`` of a pool as layers; those that are not ``present`` (bool ``[B]``)
        are empty.

        Args:
            watched: bring the attention along: of roots alone.
        """
        terms, count, device = self.terms, len(slots), rows.device
        at = to_device(np.where(present, slots, 0), device)
        known = to_device(present, device)[:, None, None]
        held = to_device(np.where(present[:, None], self._held[slots], 0), device)
        layers = []
        for layer, part in enumerate(self.parts()):
            record = terms.record()
            positions = rows.new_zeros(count, terms.groups, part.stop - part.start, dtype=torch.int64)
            if watched:
                positions = self._positions[at, :, part]
                if self._accumulated is not None:
                    record.accumulated = torch.where(known, self._accumulated[at, :, part], 0.0)
                if self._recent is not None:
                    record.queries = torch.where(known[:, 0], self._queries[at], 0)
                    record.recent = torch.where(known[..., None], self._recent[at, :, :, part], 0.0)
            layers.append(HeldLayer(terms, rows[:, :, part], positions, held[:, layer].clone(), record))
        return layers

    def pack(self, layers: Sequence[HeldLayer]) -> torch.Tensor:
        """Layers that have exactly their part of the columns as rows ``[B, 2, total, embed]``."""
        rows = torch.cat([layer.kv for layer in layers], dim=2)
        return F.pad(rows, (0, 0, 0, self.total - rows.shape[2]))

    def note(self, slots: np.ndarray, layers: Sequence[HeldLayer], lengths: np.ndarray) -> None:
        """Write down what is known of histories that were stored in ``slots`` (int64 ``[B]``).

        Args:
            lengths: int64 ``[B]``, their tokens before anything was dropped.
        """
        self._reach(int(slots.max()) + 1)
        self._lengths[slots] = lengths
        self._held[slots] = torch.stack([layer.lengths for layer in layers], dim=1).cpu().numpy()
        if slots.max() >= self.roots:
            return
        at = to_device(slots, self._positions.device)
        for layer, part in zip(layers, self.parts(), strict=True):
            record = layer.record
            self._positions[at, :, part] = layer.positions
            if self._accumulated is not None and record.accumulated is not None:
                self._accumulated[at, :, part] = record.accumulated
            if self._recent is not None and record.recent is not None and record.queries is not None:
                self._recent[at, :, :, part] = record.recent
                self._queries[at] = record.queries

    def _reach(self, slots: int) -> None:
        missing = slots - len(self._lengths)
        if missing > 0:  # the pool of nodes grew
            self._lengths = np.pad(self._lengths, (0, missing))
            self._held = np.pad(self._held, ((0, missing), (0, 0)))
