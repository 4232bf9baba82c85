"""Tokens of one layer under a budget, and attention over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lzero_kv.budget.attention import AttentionRecord, QueryAttention, at_least_float32
from lzero_kv.budget.selection import Kept, Selection, most_of, rank, room_of, select
from lzero_kv.budget.tokens import Tokens, gather_tokens, real_columns


@dataclass
class LayerCache:
    """Keys and values of one layer of a batch, with what a selection reads of them.

    ``B`` rows, ``H`` key-value heads, ``G`` groups of them that keep the same tokens (1 or ``H``), ``n``
    columns. Right-aligned: the newest token lies in the last column; columns in front of a row's ``lengths``
    newest tokens are finite and mean nothing. Methods change the layer in place.
    """

    keys: torch.Tensor
    """``[B, H, n, head_dim]``; under rotary positions with the rotation of their own position."""
    values: torch.Tensor
    """``[B, H, n, head_dim]``."""
    positions: torch.Tensor
    """int64 ``[B, G, n]``: logical positions; a token keeps its own when others are dropped."""
    lengths: torch.Tensor
    """int64 ``[B, G]``: tokens of each row."""
    record: AttentionRecord
    """Attention that the tokens were given; its ``window`` newest tokens are never dropped."""
    sinks: int | torch.Tensor = 0
    """First tokens, never dropped; int64 ``[B, 1, 1]`` where rows differ."""
    step: int = 1
    """Tokens that are kept or dropped together."""
    scores: torch.Tensor | None = None
    """``[B, G, n]``: scores to choose by in the place of a selection's; negative for a token that has none
    yet, fewer than ``n`` while tokens were appended that were not scored."""
    queries: torch.Tensor | None = None
    """``[B, heads, p, head_dim]``: newest queries whose attention was not read yet."""
    needed: torch.Tensor | None = None
    """int64 ``[B, G, n]``, between :meth:`rank` and :meth:`settle`: slots, less one, that keep each token."""

    @classmethod
    def of_prompt(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        record: AttentionRecord,
        sinks: int = 0,
        step: int = 1,
    ) -> LayerCache:
        """Layer of a prompt; ``lengths`` int64 ``[B]``, other arguments as the fields."""
        of_groups = lengths[:, None].repeat(1, record.groups)
        positions = Tokens.of_prompt(of_groups, keys.shape[2], window=record.window).positions
        return cls(keys, values, positions, of_groups, record, sinks, step)

    @property
    def columns(self) -> int:
        """Columns, ``n``."""
        return self.keys.shape[2]

    @property
    def tokens(self) -> Tokens:
        """The tokens as a selection sees them."""
        return Tokens(self.positions, self.lengths, self.record.window, self.sinks, self.step)

    @property
    def bytes(self) -> int:
        """Bytes of keys, values, positions, lengths, record and scores; of keys and values those to come and
        those that have left included, as long as their memory is held."""
        return sum(_memory(tensor) for _, _, tensor in self._tensors())

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
    ) -> None:
        """Add a block of tokens in new columns behind.

        Arguments:
            keys, values: ``[B, H, Q, head_dim]``.
            positions: int64 ``[B, Q]``; None for those that follow the newest token of each row.
            added: int64 ``[B]``: tokens of the block that a row gets, its last ones; None for all. Less than
                ``Q`` is for rows that are empty: what they do not get becomes padding.
        """
        self.extend(*self.joined(keys, values), positions, added)

    def joined(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layer with those of a block behind, which is not added yet."""
        return _joined(self.keys, keys), _joined(self.values, values)

    def extend(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None = None,
        added: torch.Tensor | None = None,
    ) -> None:
        """Take over what :meth:`joined` gave: as :meth:`append`, for a caller that attends in between.

        Arguments:
            keys, values: ``[B, H, n + Q, head_dim]``.
            positions, added: as of :meth:`append`.
        """
        block = keys.shape[2] - self.columns
        if positions is None:
            positions = self.positions[:, 0, -1:] + 1 + torch.arange(block, device=keys.device)
        self.keys, self.values = keys, values
        of_groups = positions[:, None].expand(-1, self.positions.shape[1], -1)
        self.positions = torch.cat([self.positions, of_groups], dim=2)
        self.lengths = self.lengths + (block if added is None else added[:, None])

    def visible(self, block: int, reach: int | None = None) -> torch.Tensor:
        """bool ``[B, G, block, n]``: the tokens that the newest ``block`` queries see.

        Arguments:
            block: queries; their own tokens are in the last columns.
            reach: positions that a query sees, its own included; None for all.
        """
        columns = self.columns
        seen = real_columns(self.lengths, columns)[:, :, None]
        if block > 1:
            column = torch.arange(columns, device=self.keys.device)
            seen = seen & (column <= column[columns - block :, None])
        if reach is not None:
            own = self.positions[:, :, columns - block :, None]
            seen = seen & (self.positions[:, :, None] > own - reach)
        return seen

    def observe(self, attention: torch.Tensor) -> None:
        """Record the attention of the newest tokens.

        Arguments:
            attention: ``[B, heads, Q, n]``, probabilities as of :meth:`AttentionRecord.observe`; with fewer
                columns than ``n`` those of tokens before the newest, which are observed later.

        Raises:
            ValueError: as :meth:`AttentionRecord.observe`; nothing is changed.
        """
        later = self.columns - attention.shape[3]
        self.record.observe(attention, (self.lengths - later).clamp(min=0))

    def read(
        self, reading: QueryAttention, recent: torch.Tensor | None, selection: Selection, horizon: int
    ) -> None:
        """Score the tokens by the attention of the newest queries.

        Attention of all queries is accumulated. A score that reads the last queries alone is averaged over
        readings, ``s <- s + min(1, P / horizon) (new - s)`` after ``P`` queries, so that one number for each
        token is all that is remembered; a token that had no score yet takes the new one.

        Arguments:
            reading: attention of the ``P`` queries since the last reading.
            recent: ``[B, heads, min(P, horizon), n]``: that of the last ones, where it was computed.
            selection: what the tokens are scored by.
            horizon: queries of the average, at least 1.
        """
        record, reads = self.record, selection.reads
        if 'accumulated' in reads:
            before = record.accumulated
            record.accumulated = reading.accumulated(record.groups, record.decay, before, recent)
        if 'recent' in reads and recent is not None:
            record.recent = recent
            count = reading.count(recent.shape[2])
            record.queries = None if count is None else count.expand(-1, record.groups)
        if reads:
            tokens = self.tokens
            new = selection.scores(record, tokens)
            record.recent = record.queries = None
            if self.scores is not None and 'recent' in reads:
                share = min(1.0, reading.queries.shape[2] / horizon)
                older = F.pad(self.scores, (0, new.shape[2] - self.scores.shape[2]), value=-1.0)
                new = torch.where(older < 0, new, older + share * (new - older))
            self.scores = torch.where(tokens.evictable, new, -1.0)

    def choose(self, slots: int | Sequence[int], selection: Selection) -> Kept:
        """The tokens that stay in ``slots`` columns: of every row, or one number for each.

        Raises:
            ValueError: window and sinks do not fit into ``slots``.
        """
        return select(self._scores(selection), self.tokens, slots)

    def _scores(self, selection: Selection) -> torch.Tensor:
        return selection.scores(self.record, self.tokens) if self.scores is None else self.scores

    def newest(self, columns: int) -> Kept:
        """The last columns, where it is known that no row has more tokens: nothing is scored."""
        indices = torch.arange(self.columns - columns, self.columns, device=self.keys.device)
        return Kept(indices.expand(*self.lengths.shape, -1), self.lengths)

    def keep(self, kept: Kept) -> None:
        """Drop all other tokens.

        Raises:
            RuntimeError: tokens were appended and their attention was not observed; nothing is changed.
        """
        observed = self.record.columns
        if observed is not None and observed != self.columns:
            raise RuntimeError(
                f'the attention of the newest {self.columns - observed} tokens is awaited; call observe '
                f'before tokens are dropped'
            )
        self.keys = gather_tokens(self.keys, kept.indices)
        self.values = gather_tokens(self.values, kept.indices)
        self.positions = gather_tokens(self.positions, kept.indices)
        self.lengths = kept.lengths
        self.record.keep(kept.indices)
        if self.scores is not None:
            self.scores = gather_tokens(self.scores, kept.indices)

    def shrink(self, slots: int | Sequence[int], selection: Selection) -> None:
        """Drop the tokens that are over ``slots`` (of every row, or one number for each), those with the
        lowest scores.

        Raises:
            ValueError: window and sinks do not fit into ``slots``; nothing is changed.
        """
        if self.columns > (slots if isinstance(slots, int) else min(slots)):
            self.keep(self.choose(slots, selection))

    def rank(self, selection: Selection) -> None:
        """Lay the tokens best first, to :meth:`truncate` them time and again; :meth:`settle` ends it. Nothing
        is appended or read in between."""
        best_first, needed = rank(self._scores(selection), self.tokens)
        self.keep(Kept(best_first, self.lengths))
        self.needed = needed.gather(-1, best_first)

    def truncate(self, columns: int) -> None:
        """Drop all but the best ``columns``."""
        for owner, name, tensor in self._tensors():
            if name not in ('lengths', 'queries'):
                first = tensor[:, :, :columns]
                # a view would keep the memory
                setattr(owner, name, first.contiguous() if name in ('keys', 'values') else first)

    def settle(self, slots: int | Sequence[int]) -> None:
        """Lay the best tokens by position again: ``slots`` of them, of every row or one number for each."""
        assert self.needed is not None
        place = torch.arange(self.columns, device=self.keys.device)
        stays = (place < self.lengths[..., None]) & (self.needed < room_of(slots, place.device))
        # stable, so that padding is the same on every device
        order = torch.where(stays, self.positions, -1).sort(dim=-1, stable=True).indices
        self.needed = None
        self.keep(Kept(order[..., self.columns - most_of(slots, self.columns) :], stays.sum(-1)))

    def expire(self, oldest: torch.Tensor) -> None:
        """Drop the tokens in front of position ``oldest``, int64 ``[B]``; their columns become padding."""
        within = (self.positions >= oldest[:, None, None]) & real_columns(self.lengths, self.columns)
        self.lengths = within.sum(-1)

    def trim(self, columns: int) -> None:
        """Drop all but the last ``columns``, where it is known that no row has more tokens."""
        front = self.columns - columns
        if front <= 0:
            return
        for owner, name, tensor in self._tensors():
            if name not in ('lengths', 'queries'):
                # what was not observed yet is missing behind: nothing may be left
                own: Any = tensor[..., front:] if name == 'recent' else tensor[:, :, front:]
                room = getattr(tensor, 'room', None)
                if front > _SPARE or (room is None and name in ('keys', 'values')):
                    own = own.clone()  # a view would keep the memory
                elif room is not None:
                    own.room = room[:, :, front:]
                setattr(owner, name, own)

    def pad(self, columns: int) -> None:
        """Put empty columns in front until there are ``columns``."""
        front = columns - self.columns
        if front <= 0:
            return
        for owner, name, tensor in self._tensors():
            if name not in ('lengths', 'queries'):
                behind = (0, 0) if name in ('keys', 'values') else ()
                setattr(owner, name, F.pad(tensor, (*behind, front, 0)))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row ``b`` becomes what row ``rows[b]`` was (int64 ``[N]``): the beams that go on."""
        for owner, name, tensor in self._tensors():
            setattr(owner, name, tensor.index_select(0, rows))

    def put_rows(self, rows: torch.Tensor, other: LayerCache) -> None:
        """Replace rows (int64 ``[N]``) by those of ``other``, in the memory of this layer's tensors: none may
        be expanded. A record that observed nothing takes nothing.

        Raises:
            ValueError: ``other`` has not ``N`` rows of the same shape, or its record observed less; nothing
                is changed.
        """
        pairs = []
        for owner, name, tensor in self._tensors():
            new = getattr(other if owner is self else other.record, name)
            expected = [len(rows), *tensor.shape[1:]], tensor.dtype
            got = (None, None) if new is None else ([*new.shape], new.dtype)
            if got != expected:
                raise ValueError(
                    f'{name} must be {expected[0]} of {expected[1]}, got {got[0]} of {got[1]}; bring both '
                    f'layers to the same columns with pad or shrink, and let both observe'
                )
            pairs.append((tensor, new))
        for tensor, new in pairs:
            tensor.index_copy_(0, rows, new)

    def _tensors(self) -> Iterator[tuple[LayerCache | AttentionRecord, str, torch.Tensor]]:
        """Every tensor with one entry a row: whose it is, its name, itself."""
        names = 'keys', 'values', 'positions', 'lengths', 'scores', 'queries', 'needed'
        own = ((self, name) for name in names)
        recorded = ((self.record, name) for name in ('accumulated', 'recent', 'queries'))
        for owner, name in (*own, *recorded):
            if (tensor := getattr(owner, name)) is not None:
                yield owner, name, tensor


_SPARE = 16
"""Columns to come for which room is made: so many single tokens copy none that is held."""


def _memory(tensor: torch.Tensor) -> int:
    room = getattr(tensor, 'room', None)
    return tensor.nbytes if room is None else room.untyped_storage().nbytes()


def _joined(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``[B, H, n + Q, d]``: ``new`` behind ``held``, in the memory behind it where there is room.

    The view that is returned brings the memory with it, so that both end together. Columns behind a view hold
    no token.
    """
    columns, end = held.shape[2], held.shape[2] + new.shape[2]
    room = getattr(held, 'room', None)
    if room is None or room.shape[2] < end:
        room = held.new_empty(*held.shape[:2], end + _SPARE, held.shape[3])
        room[:, :, :columns] = held
    room[:, :, columns:end] = new
    joined: Any = room[:, :, :end]
    joined.room = room
    return joined


def attend(queries: torch.Tensor, layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest tokens over a layer that holds them already.

    A query sees the tokens up to its own and no padding. Slow and plain: a host has its own kernel, and needs
    the probabilities of a few queries alone.

    Arguments:
        queries: ``[B, heads, Q, head_dim]``; neighbouring heads share a key-value head.
        layer: the layer, its last ``Q`` columns are the queries' own.

    Returns:
        Output ``[B, heads, Q, head_dim]`` and probabilities ``[B, heads, Q, n]``, float32 at least. Those of
        queries that are padding are finite and mean nothing.
    """
    heads, block, head_dim = queries.shape[1:]
    keys = layer.keys.repeat_interleave(heads // layer.keys.shape[1], dim=1)
    values = layer.values.repeat_interleave(heads // layer.values.shape[1], dim=1)
    visible = layer.visible(block).repeat_interleave(heads // layer.lengths.shape[1], dim=1)
    # products in float32 at least: those of half precision overflow before they are scaled
    logits = at_least_float32(queries) @ at_least_float32(keys).transpose(2, 3) / head_dim**0.5
    # the smallest number instead of -inf: a query that is padding sees nothing and must not become NaN
    logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    probabilities = logits.softmax(-1)
    return probabilities.to(values.dtype) @ values, probabilities
