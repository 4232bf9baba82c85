"""What is read off the attention of a layer: the preference of the layer, and a record for its tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lzero_kv.budget.tokens import Tokens, gather_tokens, mean_of_groups, real_columns


class Preference(NamedTuple):
    """What one layer's attention says about its need, mean over the rows of a batch."""

    dispersion: float
    """``H``, in nats."""
    shift: float
    """``V``."""


def check_finite_preferences(preferences: Sequence[Preference]) -> None:
    """Refuse preferences from which no weights follow.

    Raises:
        ValueError: names the layers.
    """
    wrong = [layer for layer, measured in enumerate(preferences) if not all(map(math.isfinite, measured))]
    if wrong:
        raise ValueError(f'expected finite preferences, got NaN or inf for layers {wrong}')


def dispersion_and_shift(
    attention: torch.Tensor, evictable: torch.Tensor, queries: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``H = -sum a log a`` over heads, queries and keys, and ``V``: the sum over heads and keys of the sample
    variance over the queries, 0 for a single one (CAKE).

    Arguments:
        attention: ``[B, heads, W, n]``, probabilities of the last ``W`` queries, 0 for a query that is
            padding. What is not finite counts as 0.
        evictable: bool ``[B, G, n]``: the keys that count; ``G`` divides ``heads``.
        queries: int64 ``[B, 1]``: the last ones of the ``W`` queries that are no padding; None for all.

    Returns:
        ``[B]`` each, ``H`` in nats; float32 (float64 for a float64 attention).
    """
    attention = torch.nan_to_num(at_least_float32(attention), nan=0.0, posinf=0.0, neginf=0.0)
    counts = evictable.repeat_interleave(attention.shape[1] // evictable.shape[1], dim=1)
    # a log a is 0 at 0
    entropy = attention.clamp_min(torch.finfo(attention.dtype).tiny).log_().mul_(attention).sum(2).neg_()
    variance = query_moments(attention, queries)[1]
    dispersion, shift = (part.masked_fill_(~counts, 0.0).sum((1, 2)) for part in (entropy, variance))
    return dispersion, shift


def query_moments(attention: torch.Tensor, queries: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sample variance over the queries that are no padding: ``[B, heads, n]`` each.

    Arguments:
        attention: ``[B, heads, W, n]``; 0 where a query is padding.
        queries: int64 ``[B, heads]`` or ``[B, 1]``: the last ones of the ``W`` queries that are no padding;
            None for all.
    """
    window = attention.shape[2]
    if queries is None:  # numbers of Python: a tensor of one would be copied to its device
        mean = attention.sum(2) / window
        return mean, (attention - mean[:, :, None]).square_().sum(2) / max(1, window - 1)
    count = queries[..., None].to(attention.dtype)
    mean = attention.sum(2) / count.clamp(min=1)
    deviation = (attention - mean[:, :, None]).mul_(real_columns(queries, window)[..., None])
    return mean, deviation.square_().sum(2) / (count - 1).clamp(min=1)


def layer_preference(
    attention: torch.Tensor, lengths: torch.Tensor, *, window: int, sinks: int = 0, step: int = 1
) -> Preference:
    """Dispersion and shift of one layer, from its attention over a prompt.

    Arguments:
        attention: ``[B, heads, Q, n]``, probabilities of the last ``Q`` queries, of which the newest
            ``window`` are read.
        lengths: int64 ``[B]``: tokens of each right-aligned row.
        window, sinks, step: tokens that cannot be evicted, as in :class:`Tokens`.

    Returns:
        Means over the rows that have a token to evict; zeros when there is none.
    """
    recent = attention[:, :, -window:]
    tokens = Tokens.of_prompt(lengths[:, None], recent.shape[3], window=window, sinks=sinks, step=step)
    evictable = tokens.evictable
    rows = int(evictable.any(-1).sum())
    if not rows:
        return Preference(0.0, 0.0)
    return Preference(*(float(values.sum() / rows) for values in dispersion_and_shift(recent, evictable)))


_PIECE = {'cpu': 64, 'cuda': 256}
"""Queries whose attention is held at once where all of them are summed up: on a CPU so few that its caches
hold them, on a GPU so many that launches do not count."""

_GROUPS_HEADS = 'enable_gqa' in (F.scaled_dot_product_attention.__doc__ or '')
"""Whether this torch's attention takes grouped query heads (from 2.5 on)."""


@dataclass(frozen=True)
class QueryAttention:
    """Attention of the newest queries over the keys of a layer, computed anew from both: no more than a few
    hundred queries are held at once, never ``[heads, n, n]``.

    ``B`` rows, ``H`` key-value heads, ``G`` groups of them that keep the same tokens, ``n`` columns.
    """

    queries: torch.Tensor
    """``[B, heads, P, head_dim]``, with their rotation; the last one is of the last column."""
    keys: torch.Tensor
    """``[B, H, n, head_dim]``, float32 at least."""
    counts: torch.Tensor | None
    """int64 ``[B]``: the last ones of the queries that are no padding; None for all."""
    hidden: torch.Tensor | None
    """bool ``[B, G, n]``: columns that hold no token; None for none."""
    positions: torch.Tensor | None
    """int64 ``[B, G, n]``, where a query sees :attr:`reach` positions alone; None where it sees all."""
    reach: int
    """Positions that a query sees, its own included."""
    scale: float
    """Factor of the products."""

    def newest(self, window: int) -> torch.Tensor:
        """``[B, heads, min(window, P), n]``: probabilities of the last queries, 0 for padding."""
        first = max(0, self.queries.shape[2] - window)
        probabilities = self._probabilities(first, self.queries.shape[2])
        real = self._real(first)
        return probabilities if real is None else probabilities * real[:, None, :, None]

    def count(self, queries: int) -> torch.Tensor | None:
        """int64 ``[B, 1]``: how many of the last ``queries`` are no padding; None for all."""
        return None if self.counts is None else self.counts[:, None].clamp(max=queries)

    def accumulated(
        self, groups: int, decay: float, before: torch.Tensor | None, recent: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, groups, n]``: ``s <- decay s + a_q`` for every query, mean over a group's heads; from
        ``before`` (of the first columns) on. ``recent`` is what :meth:`newest` gave, where it was asked."""
        total = self.queries.shape[2]
        if self._has_fused_kernel:
            sums = mean_of_groups(self.summed(decay), groups)
        else:
            sums = self._summed_in_pieces(groups, decay, recent)
        if before is not None:
            count = self.count(total)
            faded = decay**total if count is None else decay ** count[..., None].to(before.dtype)
            sums[..., : before.shape[2]] += faded * before
        return sums

    @property
    def _has_fused_kernel(self) -> bool:
        """Whether a GPU's attention kernel takes these queries: a prompt in half precision, all seen."""
        half = self.queries.dtype in (torch.bfloat16, torch.float16)
        whole = self.queries.shape[2] == self.keys.shape[2] > _PIECE['cuda'] and self.counts is None
        seen = self.hidden is None and self.positions is None
        return _GROUPS_HEADS and self.queries.is_cuda and half and whole and seen

    def summed(self, decay: float) -> torch.Tensor:
        """``[B, H, n]``: as :meth:`accumulated`, for as many queries as columns, none of them hidden, mean
        over the heads of a key-value head.

        The gradient of attention with respect to its values is ``P^T dO``. With the weights of the queries as
        ``dO`` it is their sum, which fused kernels compute in the precision of the queries, without the
        probabilities in memory.
        """
        queries, keys = self.queries, self.keys.to(self.queries.dtype)
        ages = torch.arange(queries.shape[2] - 1, -1, -1, device=keys.device)
        with torch.inference_mode(False), torch.enable_grad():
            # tensors of an inference mode take part in no gradient
            queries, keys = (part.clone() if part.is_inference() else part for part in (queries, keys))
            values = torch.zeros_like(keys).requires_grad_()
            attended = F.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=True
            )
            given = torch.zeros_like(attended)
            given[..., 0] = (decay ** ages.to(self.keys.dtype)).to(given.dtype)
            (sums,) = torch.autograd.grad(attended, values, given)
        return sums[..., 0].to(self.keys.dtype) / (queries.shape[1] // keys.shape[1])

    def _summed_in_pieces(self, groups: int, decay: float, recent: torch.Tensor | None) -> torch.Tensor:
        total, rows, columns = self.queries.shape[2], self.keys.shape[0], self.keys.shape[2]
        sums = self.keys.new_zeros(rows, groups, columns)
        ages = torch.arange(total - 1, -1, -1, device=self.keys.device)
        weights, real = decay ** ages.to(self.keys.dtype)[None], self._real(0)
        weights = weights if real is None else weights * real
        piece, known = _PIECE.get(self.keys.device.type, _PIECE['cuda']), 0
        if recent is not None:
            known = recent.shape[2]
            sums += self._weighted(weights[:, total - known :], recent, groups)
        for first in range(0, total - known, piece):
            end = min(total - known, first + piece)
            seen = self._weighted(weights[:, first:end], self._probabilities(first, end), groups)
            sums[..., : seen.shape[2]] += seen
        return sums

    @staticmethod
    def _weighted(weights: torch.Tensor, attention: torch.Tensor, groups: int) -> torch.Tensor:
        """``[B, groups, m]``: sums over the queries of ``[B, heads, Q, m]``, mean over a group's heads."""
        return mean_of_groups((weights[:, None, None] @ attention)[:, :, 0], groups)

    def _real(self, first: int) -> torch.Tensor | None:
        """``[B, P - first]``: 1 for a query, 0 for padding; None where all are queries."""
        if self.counts is None:
            return None
        total = self.queries.shape[2]
        number = torch.arange(first, total, device=self.keys.device)
        return (number >= total - self.counts[:, None]).to(self.keys.dtype)

    def _probabilities(self, first: int, end: int) -> torch.Tensor:
        """``[B, heads, end - first, m]`` over the ``m`` columns up to the last one of these queries."""
        rows, heads, total, head_dim = self.queries.shape
        block, columns = end - first, self.keys.shape[2] - total + end
        keys = self.keys[:, :, :columns]
        queries = self.queries[:, :, first:end].to(keys.dtype) * self.scale
        grouped = queries.reshape(rows, keys.shape[1], -1, head_dim)
        logits = (grouped @ keys.transpose(2, 3)).view(rows, keys.shape[1], -1, block, columns)
        # the smallest number instead of -inf: a query that is padding sees nothing and must not become NaN
        least = torch.finfo(logits.dtype).min
        later = torch.ones(block, block, dtype=torch.bool, device=keys.device).triu_(1)
        logits[..., columns - block :].masked_fill_(later, least)
        if self.hidden is not None:
            logits.masked_fill_(self.hidden[:, :, None, None, :columns], least)
        if self.positions is not None:
            own = self.positions[..., columns - block : columns, None]
            far = self.positions[..., None, :columns] <= own - self.reach
            logits.masked_fill_(far[:, :, None], least)
        probabilities = torch.nan_to_num_(logits.softmax(-1), nan=0.0)
        return probabilities.view(rows, heads, block, columns)


class AttentionRecord:
    """Attention that the tokens of one layer were given, as long as they stay.

    ``B`` rows, ``G`` groups of heads that keep tokens of their own, ``n`` columns, right-aligned.

    Arguments:
        groups: ``G``; divides the query heads.
        window: queries that are remembered; :attr:`window` may be int64 ``[B, 1, 1]``, one for each row.
        decay: factor of the accumulated attention at each query, ``rho``.
        reads: what to keep, of ``'accumulated'`` and ``'recent'``; the latter takes ``heads * window``
            numbers for a token.
    """

    def __init__(self, groups: int, window: int, decay: float, reads: Collection[str]) -> None:
        self.groups = groups
        self.window: Any = window
        self.decay = decay
        self.reads = frozenset(reads)
        self.accumulated: torch.Tensor | None = None
        """``[B, G, n]``: ``s <- decay s + a_q`` for every query, mean over a group's heads."""
        self.recent: torch.Tensor | None = None
        """``[B, heads, window, n]``: attention of the last queries; 0 where there was none."""
        self.queries: torch.Tensor | None = None
        """int64 ``[B, G]``: the last ones of those queries that are no padding; None where that is known of
        all."""

    def observe(self, attention: torch.Tensor, lengths: torch.Tensor) -> None:
        """Take in the attention of a block of new tokens over all tokens that are held, themselves included.
        Every token of the block is an observation of its own.

        Arguments:
            attention: ``[B, heads, Q, n]``, probabilities; the last of the ``Q`` queries is the newest token.
                What it says about padding is not read.
            lengths: int64 ``[B, G]``: tokens of each row, the new ones included.

        Raises:
            ValueError: attention to a token is negative or not finite; names the rows, nothing is changed.
        """
        if not self.reads:
            return
        if 'accumulated' not in self.reads:
            attention = attention[:, :, -self.window :]
        block, columns = attention.shape[2:]
        queries = lengths.clamp(max=block)
        shares = attention.shape[1] // self.groups
        keys = real_columns(lengths, columns).repeat_interleave(shares, dim=1)
        rows = real_columns(queries, block).repeat_interleave(shares, dim=1)
        attention = at_least_float32(attention.detach())
        attention = torch.where(keys[:, :, None] & rows[..., None], attention, attention.new_zeros(()))
        _check_probabilities(attention)
        if 'accumulated' in self.reads:
            self._accumulate(attention)
        if 'recent' in self.reads:
            self._remember(attention, queries)

    @property
    def columns(self) -> int | None:
        """Columns that were observed, ``n``; None where nothing is recorded."""
        known = self.recent if self.accumulated is None else self.accumulated
        return None if known is None else known.shape[-1]

    def keep(self, indices: torch.Tensor) -> None:
        """Forget the tokens that were dropped; ``indices`` as of :class:`Kept`."""
        if self.accumulated is not None:
            self.accumulated = gather_tokens(self.accumulated, indices)
        if self.recent is not None:
            self.recent = gather_tokens(self.recent.transpose(2, 3), indices).transpose(2, 3)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and sample variance over the remembered queries, mean over the heads of a group: ``[B, G, n]``
        each.

        Raises:
            RuntimeError: nothing was observed.
        """
        if self.recent is None:
            raise RuntimeError('no attention was observed; call observe before asking for scores')
        queries = self.queries
        if queries is not None:
            queries = queries.repeat_interleave(self.recent.shape[1] // self.groups, dim=1)
        mean, variance = query_moments(self.recent, queries)
        return mean_of_groups(mean, self.groups), mean_of_groups(variance, self.groups)

    def _accumulate(self, attention: torch.Tensor) -> None:
        decay, block = self.decay, attention.shape[2]
        if decay < 1:
            ages = torch.arange(block - 1, -1, -1, dtype=attention.dtype, device=attention.device)
            attention, decay = attention * (decay**ages)[:, None], decay**block
        new = mean_of_groups(attention.sum(2), self.groups)
        if self.accumulated is not None:
            new = new + decay * F.pad(self.accumulated, (0, new.shape[2] - self.accumulated.shape[2]))
        self.accumulated = new

    def _remember(self, attention: torch.Tensor, queries: torch.Tensor) -> None:
        if self.recent is not None and self.queries is not None:
            # older queries did not see the new keys
            older = F.pad(self.recent, (0, attention.shape[3] - self.recent.shape[3]))
            attention, queries = torch.cat([older, attention], dim=2), self.queries + queries
        # cut to the window, or filled up; a copy: a view would keep the block's whole attention alive
        self.recent = F.pad(attention, (0, 0, self.window - attention.shape[2], 0))
        self.queries = queries.clamp(max=self.window)


def _check_probabilities(attention: torch.Tensor) -> None:
    if not attention.numel():
        return
    least, most = torch.aminmax(attention)
    if least >= 0 and most < torch.inf:  # false for NaN, too
        return
    wrong = ~((attention >= 0) & (attention < torch.inf)).flatten(1).all(1)
    raise ValueError(
        f'expected attention of finite numbers of at least 0, got others in rows '
        f'{wrong.nonzero().flatten().tolist()}; check the queries and keys. Nothing was recorded'
    )


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """``values`` in float32, or as they are in float64: half precision cannot add up attention."""
    return values if values.dtype == torch.float64 else values.float()
