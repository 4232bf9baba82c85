"""The host's transformer over keys and values that lie in one buffer: one token at a time, or a whole window.

The buffer is ``[B, 2 * layers, tokens, embed]``: the blocks k_0, v_0, k_1, v_1, ... of every row. Rows are
right-aligned: all rows write their next token to the same column, whatever their lengths, and the columns in
front of a shorter row are masked.

The layers are those of :class:`Prepared`; nothing here holds a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .prepared import Prepared

Rotation = torch.Tensor | None


class Columns(NamedTuple):
    """What one new token of every row attends to in each layer, its own column last, and where it is written.

    Layers may hold different numbers of tokens, ``n_l``.

    Attributes:
        keys, values: for each layer ``[B, heads, n_l, head_dim]``.
        own: for each layer ``[B, 2, embed]``, views of the last column of keys and values.
        masks: for each layer ``[B, n_l]`` of :func:`additive_mask`; None when every column belongs to its
            row.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    own: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor | None]

    @classmethod
    def of_buffer(
        cls, buffer: torch.Tensor, columns: tuple[int, int], heads: int, mask: torch.Tensor | None
    ) -> Columns:
        """Columns ``first .. own``, both included, of a buffer ``[B, 2 * layers, tokens, embed]``; ``mask``
        ``[B, own - first + 1]`` serves all layers."""
        first, own = columns
        seen = buffer[:, :, first : own + 1].unflatten(-1, (heads, -1)).transpose(2, 3).unbind(1)
        written = buffer[:, :, own].unflatten(1, (-1, 2)).unbind(1)
        return cls(seen[::2], seen[1::2], written, [mask] * len(written))


Watch = Callable[[int, torch.Tensor], None]
"""Told the number of a layer and its attention probabilities ``[B, heads, 1, n_l]``."""


def append_token(
    prepared: Prepared,
    columns: Columns,
    x: torch.Tensor,
    rotation: Rotation,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Run one token of every row through the transformer and write its keys and values to its own column.

    Args:
        prepared: the transformer.
        columns: what the token attends to; written in place.
        x: ``[B, embed]``, embeddings with their learned position, where positions are learned.
        rotation: complex ``[B, head_dim / 2]`` rotary factors, None where positions are learned.
        watch: who wants to see the attention; the fused kernel does not tell it.

    Returns:
        ``[B, embed]``, the transformer's output of this token.
    """
    rows, embed = x.shape
    split = (prepared.heads, embed // prepared.heads)
    for layer, block in enumerate(prepared.blocks):
        qkv = block.qkv(block.norm1(x)).view(rows, 3, embed)
        query, own, mask = qkv[:, 0], columns.own[layer], columns.masks[layer]
        if rotation is None:
            own.copy_(qkv[:, 1:])
        else:
            rotated = rotate(qkv[:, :2], rotation[:, None], prepared.heads)
            query = rotated[:, 0]
            own[:, 0].copy_(rotated[:, 1])
            own[:, 1].copy_(qkv[:, 2])
        query = query.unflatten(-1, split).unsqueeze(2)
        mask = None if mask is None else mask[:, None, None]
        keys, values = columns.keys[layer], columns.values[layer]
        if watch is None and not prepared.as_host:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        else:
            probabilities = attention_probabilities(query, keys, mask)
            attended = probabilities @ values
            if watch is not None:
                watch(layer, probabilities)
        x = block.finish(x, attended.reshape(rows, embed))
    return prepared.norm(x)


class Projected(NamedTuple):
    """One layer's view of whole histories: queries, keys and values ``[B, heads, T, head_dim]`` and the mask
    ``[B or 1, 1, T, T]`` of :func:`additive_mask`; under rotary positions queries and keys are rotated."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


def layers_of_pass(
    prepared: Prepared, x: torch.Tensor, lengths: np.ndarray, rotation: Rotation
) -> Iterator[Projected]:
    """Run whole histories through the transformer without any cache, and show each layer's keys and values.

    What follows a layer is computed when the next one is asked for.

    Args:
        prepared: the transformer.
        x: ``[B, T, embed]`` right-aligned embeddings with their learned position, where positions are
            learned.
        lengths: int64 ``[B]``, how many of the last columns belong to the row.
        rotation: complex ``[B, T, head_dim / 2]`` or None.
    """
    rows, steps, embed = x.shape
    split = (prepared.heads, embed // prepared.heads)
    # One mask serves all rows when they are full. Not is_causal: that kernel turns nan scores into zeros, and
    # broken weights would go unnoticed.
    mask = (
        _full_mask(steps, x.dtype, x.device)
        if int(lengths.min()) == steps
        else additive_mask(_visible(lengths, steps), x)[:, None]
    )
    x = x.reshape(rows * steps, embed)
    for block in prepared.blocks:
        qkv = block.qkv(block.norm1(x)).view(rows, steps, 3, embed)
        query, keys, values = qkv.unbind(2)
        if rotation is not None:
            query, keys = rotate(qkv[:, :, :2], rotation[:, :, None], prepared.heads).unbind(2)
        query, keys, values = (t.unflatten(-1, split).transpose(1, 2) for t in (query, keys, values))
        yield Projected(query, keys, values, mask)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = block.finish(x, attended.transpose(1, 2).reshape(rows * steps, embed))


def causal_pass(
    prepared: Prepared, x: torch.Tensor, lengths: np.ndarray, rotation: Rotation, out: torch.Tensor
) -> None:
    """Compute the keys and values of whole histories in one pass; arguments as of :func:`layers_of_pass`.

    Args:
        out: ``[B, 2 * layers, T, embed]``, written in place; the columns in front of a row become zero.
    """
    steps, blocks = x.shape[1], []
    for layer in layers_of_pass(prepared, x, lengths, rotation):
        blocks += [layer.keys.transpose(1, 2).flatten(2), layer.values.transpose(1, 2).flatten(2)]
        if len(blocks) == out.shape[1]:
            break  # what follows the last layer's keys and values is not asked for
    torch.stack(blocks, dim=1, out=out)
    if int(lengths.min()) < steps:
        inside = np.arange(steps)[None, :] >= steps - lengths[:, None]
        out.masked_fill_(torch.from_numpy(~inside).to(x.device)[:, None, :, None], 0.0)


@cache
def _full_mask(steps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The causal mask of full windows, ``[1, 1, steps, steps]``."""
    return additive_mask(_visible(np.array([steps]), steps), torch.empty(0, dtype=dtype, device=device))[None]


def _visible(lengths: np.ndarray, steps: int) -> np.ndarray:
    """What the tokens of right-aligned histories may attend to, bool ``[B, steps, steps]``."""
    inside = np.arange(steps)[None, :] >= steps - lengths[:, None]
    visible = np.tril(np.ones((steps, steps), dtype=bool))[None] & inside[:, None, :]
    # A column outside the row sees itself, so that no softmax runs over nothing.
    return visible | np.eye(steps, dtype=bool)[None]


def additive_mask(visible: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """0 where attention may look (bool ``visible``), -inf elsewhere, in the dtype and on the device of
    ``like``."""
    return torch.from_numpy(np.where(visible, np.float32(0), np.float32('-inf'))).to(like)


def position_shift(transformer: Any, positions: nn.Embedding, kept: int) -> torch.Tensor:
    """What a key or value gains when its token moves two positions to the front, by the weights as they are
    now.

    The host's correction: the projection of the new learned position minus that of the old one. It leaves out
    that the position went through a LayerNorm and earlier layers, so it is an approximation
    (``window='rebuild'`` is exact).

    Returns:
        ``[2 * layers, kept, embed]``.
    """
    rows = []
    for block in transformer.blocks:
        for projection in (block.attn.key, block.attn.value):
            projected = projection(positions.weight)
            rows.append(projected[:kept] - projected[2 : kept + 2])
    return torch.stack(rows)


def rotate(x: torch.Tensor, rotation: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, RoFormer, section 3.4.2) of ``[..., heads * head_dim]`` in
    the dtype of ``x``.

    ``rotation`` is complex ``[..., head_dim / 2]``, one factor for each pair of neighbouring features.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs = torch.view_as_complex(wide.unflatten(-1, (heads, -1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(-2)).flatten(-3).type_as(x)


def attention_probabilities(
    queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """``[B, heads, Q, n]`` of queries ``[B, heads, Q, head_dim]`` over keys ``[B, heads, n, head_dim]``, with
    an additive mask that broadcasts; in the host's order of operations."""
    scores = (queries @ keys.transpose(-2, -1)) * (1.0 / math.sqrt(queries.shape[-1]))
    return F.softmax(scores if mask is None else scores + mask, dim=-1)
