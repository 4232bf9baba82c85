"""Keys and values of layers that hold different numbers of tokens, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lzero_kv.budget.selection import Kept
from lzero_kv.budget.tokens import gather_tokens, real_columns


@dataclass
class LayerKV:
    """Tokens of one layer, right-aligned: the newest one in the last column.

    ``B`` rows, ``H`` key-value heads, ``G`` groups of them that keep the same tokens (1 or ``H``), ``n``
    columns. What lies in front of a row's ``lengths`` newest tokens is finite and means nothing.
    """

    keys: torch.Tensor
    """``[B, H, n, head_dim]``; under rotary positions with the rotation of their own position."""
    values: torch.Tensor
    """``[B, H, n, head_dim]``."""
    positions: torch.Tensor
    """int64 ``[B, G, n]``: logical positions; a token keeps its own when others are dropped."""
    lengths: torch.Tensor
    """int64 ``[B, G]``: tokens of each row."""

    @property
    def tokens(self) -> int:
        """Columns, ``n``."""
        return self.keys.shape[2]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> LayerKV:
        """This layer with new tokens, one block for all rows.

        Arguments:
            keys, values: ``[B, H, Q, head_dim]``.
            positions: int64 ``[B, Q]``.
        """
        groups, block = self.positions.shape[1], keys.shape[2]
        return LayerKV(
            torch.cat([self.keys, keys], dim=2),
            torch.cat([self.values, values], dim=2),
            torch.cat([self.positions, positions[:, None].expand(-1, groups, -1)], dim=2),
            self.lengths + block,
        )

    def keep(self, kept: Kept) -> LayerKV:
        """This layer with the kept tokens alone."""
        return LayerKV(
            gather_tokens(self.keys, kept.indices),
            gather_tokens(self.values, kept.indices),
            gather_tokens(self.positions, kept.indices),
            kept.lengths,
        )


def attend(queries: torch.Tensor, layer: LayerKV) -> tuple[torch.Tensor, torch.Tensor]:
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
    columns = layer.tokens
    keys = layer.keys.repeat_interleave(heads // layer.keys.shape[1], dim=1)
    values = layer.values.repeat_interleave(heads // layer.values.shape[1], dim=1)
    real = real_columns(layer.lengths, columns).repeat_interleave(heads // layer.lengths.shape[1], dim=1)
    column = torch.arange(columns, device=queries.device)
    causal = column <= column[columns - block :, None]
    logits = queries @ keys.transpose(2, 3) / head_dim**0.5
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # the smallest number instead of -inf: a query that is padding sees nothing and must not become NaN
    visible = real[:, :, None] & causal
    logits = logits.to(dtype).masked_fill(~visible, torch.finfo(dtype).min)
    probabilities = logits.softmax(-1)
    return probabilities.to(values.dtype) @ values, probabilities
