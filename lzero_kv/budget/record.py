"""What is remembered of the attention that a layer's tokens were given, as long as they stay."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F

from lzero_kv.budget.preference import at_least_float32, query_moments
from lzero_kv.budget.tokens import gather_tokens, mean_of_groups, real_columns


class AttentionRecord:
    """Accumulated attention and the last queries' attention, for the tokens of one layer.

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
        """``[B, heads, Q, n]``: attention of the last ``Q <= window`` queries, 0 for padding."""
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

    def keep(self, indices: torch.Tensor, lengths: torch.Tensor) -> None:
        """Forget the tokens that were dropped; arguments as the fields of :class:`Kept`."""
        real = real_columns(lengths, indices.shape[2])
        if self.accumulated is not None:
            kept = gather_tokens(self.accumulated, indices)
            self.accumulated = torch.where(real, kept, kept.new_zeros(()))
        if self.recent is not None:
            heads, queries = self.recent.shape[1:3]
            columns = indices.repeat_interleave(heads // self.groups, dim=1)[:, :, None]
            kept = self.recent.gather(3, columns.expand(-1, -1, queries, -1))
            real = real.repeat_interleave(heads // self.groups, dim=1)[:, :, None]
            self.recent = torch.where(real, kept, kept.new_zeros(()))

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
        # a copy: a view would keep the block's whole attention alive
        self.recent = attention[:, :, -self.window :].clone()
        self.queries = queries.clamp(max=self.window)
