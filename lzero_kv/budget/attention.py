"""What is read off the attention of a layer: the preference of the layer, and a record for its tokens."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lzero_kv.budget.tokens import Tokens, gather_tokens, mean_of_groups, real_columns


class Preference(NamedTuple):
    """What one layer's attention says about its need, mean over the rows of a batch."""

    dispersion: float
    """``H``, in nats."""
    shift: float
    """``V``."""


def dispersion_and_shift(
    attention: torch.Tensor, evictable: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``H = -sum a log a`` over heads, queries and keys, and ``V``: the sum over heads and keys of the sample
    variance over the queries, 0 for a single one (CAKE).

    Arguments:
        attention: ``[B, heads, W, n]``, probabilities of the last ``W`` queries. A row with a key that may be
            evicted is longer than the window, so that none of its queries is padding.
        evictable: bool ``[B, n]``: the keys that count.

    Returns:
        ``[B]`` each, ``H`` in nats; float32 (float64 for a float64 attention).
    """
    attention = at_least_float32(attention)
    attention = torch.where(evictable[:, None, None], attention, attention.new_zeros(()))
    queries = torch.full((1, 1), attention.shape[2], device=attention.device)
    # xlogy is 0 at 0
    dispersion = -torch.special.xlogy(attention, attention).sum((1, 2, 3))
    return dispersion, query_moments(attention, queries)[1].sum((1, 2))


def query_moments(attention: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sample variance over the queries that are no padding: ``[B, heads, n]`` each.

    Arguments:
        attention: ``[B, heads, W, n]``; 0 where a query is padding.
        queries: int64 ``[B, heads]`` or ``[B, 1]``: the last ones of the ``W`` queries that are no padding.
    """
    count = queries[..., None].to(attention.dtype)
    mean = attention.sum(2) / count.clamp(min=1)
    window = attention.shape[2]
    real = torch.arange(window, device=attention.device) >= window - queries[..., None]
    deviation = torch.where(real[..., None], attention - mean[:, :, None], attention.new_zeros(()))
    return mean, deviation.square().sum(2) / (count - 1).clamp(min=1)


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
    evictable = tokens.evictable[:, 0]
    rows = int(evictable.any(-1).sum())
    if not rows:
        return Preference(0.0, 0.0)
    return Preference(*(float(values.sum() / rows) for values in dispersion_and_shift(recent, evictable)))


class AttentionRecord:
    """Attention that the tokens of one layer were given, as long as they stay.

    ``B`` rows, ``G`` groups of heads that keep tokens of their own, ``n`` columns, right-aligned.

    Arguments:
        groups: ``G``; divides the query heads.
        window: queries that are remembered.
        decay: factor of the accumulated attention at each observation, ``rho``.
        reads: what to keep, of ``'accumulated'`` and ``'recent'``; the latter takes ``heads * window``
            numbers for a token.
    """

    def __init__(self, groups: int, window: int, decay: float, reads: Collection[str]) -> None:
        self.groups = groups
        self.window = window
        self.decay = decay
        self.reads = frozenset(reads)
        self.accumulated: torch.Tensor | None = None
        """``[B, G, n]``: ``s <- decay s + sum_q a_q`` at every observation, mean over a group's heads."""
        self.recent: torch.Tensor | None = None
        """``[B, heads, window, n]``: attention of the last queries; 0 where there was none."""
        self.queries: torch.Tensor | None = None
        """int64 ``[B, G]``: the last ones of those queries that are no padding."""

    def observe(
        self, attention: torch.Tensor, lengths: torch.Tensor, *, token_by_token: bool = False
    ) -> None:
        """Take in the attention of a block of new tokens over all tokens that are held, themselves included.

        Arguments:
            attention: ``[B, heads, Q, n]``, probabilities; the last of the ``Q`` queries is the newest token.
                What it says about padding is not read.
            lengths: int64 ``[B, G]``: tokens of each row, the new ones included.
            token_by_token: accumulate as if every token of the block were observed by itself.
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
        if 'accumulated' in self.reads:
            self._accumulate(attention, token_by_token)
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
        if self.recent is None or self.queries is None:
            raise RuntimeError('no attention was observed; call observe before asking for scores')
        shares = self.recent.shape[1] // self.groups
        mean, variance = query_moments(self.recent, self.queries.repeat_interleave(shares, dim=1))
        return mean_of_groups(mean, self.groups), mean_of_groups(variance, self.groups)

    def _accumulate(self, attention: torch.Tensor, token_by_token: bool) -> None:
        decay, block = self.decay, attention.shape[2]
        if token_by_token and decay < 1:
            ages = torch.arange(block - 1, -1, -1, device=attention.device)
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


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """``values`` in float32, or as they are in float64: half precision cannot add up attention."""
    return values if values.dtype == torch.float64 else values.float()
