"""The host's transformer over keys and values that lie in one buffer: a few new tokens of every row, or whole
windows.

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

from lzero_kv.cache.transfer import to_device
from lzero_kv.lightzero.inference.weights import Prepared

Rotation = torch.Tensor | None

MASK_ROW = 8
"""Numbers. Before each fused attention on a GPU torch copies a mask whose rows begin elsewhere; where the
mask itself begins elsewhere, the kernel fails on a misaligned address (pytorch issue 183484)."""


class Columns(NamedTuple):
    """What the ``n`` new tokens of every row attend to in each layer, their own columns last, and where they
    are written.

    Layers may hold different numbers of tokens, ``n_l``.

    Attributes:
        keys, values: for each layer ``[B, heads, n_l, head_dim]``.
        own: for each layer ``[B, 2, n, heads, head_dim]``, views of the last columns of keys and values.
        masks: for each layer ``[B, n, n_l]`` of :func:`additive_mask`; None when every new token may look at
            every column.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    own: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor | None]

    @classmethod
    def of_buffer(
        cls, buffer: torch.Tensor, columns: tuple[int, int], new: int, heads: int, mask: torch.Tensor | None
    ) -> Columns:
        """Columns ``first`` up to, but not including, ``end`` of a buffer ``[B, 2 * layers, tokens, embed]``,
        the last ``new`` of them the new tokens'; ``mask`` ``[B, new, end - first]`` serves all layers."""
        first, end = columns
        by_head = buffer.unflatten(-1, (heads, -1))
        seen = by_head[:, :, first:end].transpose(2, 3).unbind(1)
        written = by_head[:, :, end - new : end].unflatten(1, (-1, 2)).unbind(1)
        return cls(seen[::2], seen[1::2], written, [mask] * len(written))


class WindowsBeside(NamedTuple):
    """Full windows that are computed from their raw tokens in the pass of other tokens: the products of a few
    rows cost what reading their weights costs, so more rows are nearly free.

    Attributes:
        x: ``[P, T, embed]`` embeddings with their learned position, where positions are learned.
        rotation: complex ``[P, T, head_dim / 2]`` or None.
        out: ``[P or B, 2 * layers, T, embed]``, where their keys and values are written.
        rows: int64 ``[P]``, the rows of ``out``; None for all of them in order.
    """

    x: torch.Tensor
    rotation: Rotation
    out: torch.Tensor
    rows: torch.Tensor | None

    def write(self, layer: int, kv: torch.Tensor) -> None:
        """Put a layer's keys and values ``[P, 2, T, embed]`` into place."""
        place = self.out[:, 2 * layer : 2 * layer + 2]
        if self.rows is None:
            place.copy_(kv)
        else:
            place.index_copy_(0, self.rows, kv)

    def written(self) -> torch.Tensor:
        """``[P, 2 * layers, T, embed]``, what was written."""
        return self.out if self.rows is None else self.out.index_select(0, self.rows)


Watch = Callable[[int, torch.Tensor], None]
"""Told the number of a layer and its attention probabilities ``[B, heads, n, n_l]``."""


def append_tokens(
    prepared: Prepared,
    columns: Columns,
    x: torch.Tensor,
    rotation: Rotation,
    *,
    windows: WindowsBeside | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Run new tokens of every row through the transformer and write their keys and values to their columns.

    Args:
        prepared: the transformer.
        columns: what the tokens attend to; written in place.
        x: ``[B, n, embed]``, embeddings with their learned position, where positions are learned.
        rotation: complex ``[B, n, head_dim / 2]`` rotary factors, None where positions are learned.
        windows: computed on the way. What they write may be among the columns of this pass.
        watch: who wants to see the attention; the fused kernel does not tell it.

    Returns:
        ``[B, embed]``, the transformer's output of each row's last token.
    """
    rows, new, embed = x.shape
    x = x.reshape(rows * new, embed)
    rotation = None if rotation is None else rotation.flatten(0, 1)
    ahead = 0  # tokens of windows, which stand in front of the new ones
    if windows is not None:
        beside, steps = windows.x.shape[:2]
        ahead = beside * steps
        x = torch.cat([windows.x.reshape(ahead, embed), x])
        causal = _full_mask(steps, x.dtype, x.device)
        if rotation is not None and windows.rotation is not None:
            rotation = torch.cat([windows.rotation.flatten(0, 1), rotation])
    for layer, block in enumerate(prepared.blocks):
        last = layer + 1 == len(prepared.blocks)
        qkv = block.qkv(block.norm1(x)).view(-1, 3, embed)
        if rotation is not None:
            qkv[:, :2] = rotate(qkv[:, :2], rotation[:, None], prepared.heads)
        own = qkv[ahead:].view(rows, new, 3, embed)
        columns.own[layer].copy_(own[:, :, 1:].transpose(1, 2).unflatten(-1, (prepared.heads, -1)))
        if windows is not None:
            window = qkv[:ahead].view(beside, steps, 3, embed)
            windows.write(layer, window[:, :, 1:].transpose(1, 2))
        queries, mask = own[:, :, 0], columns.masks[layer]
        if last:  # nobody asks what becomes of the tokens in front of the last one
            x = x[ahead:].view(rows, new, embed)[:, -1]
            queries, mask = queries[:, -1:], None if mask is None else mask[:, -1:]
        keys, values = columns.keys[layer], columns.values[layer]
        attended = _attend(prepared, layer, queries, keys, values, mask, watch).reshape(-1, embed)
        if windows is not None and not last:
            parts = [_by_head(part, prepared.heads) for part in window.unbind(2)]
            seen = F.scaled_dot_product_attention(*parts, attn_mask=causal)
            attended = torch.cat([seen.transpose(1, 2).reshape(ahead, embed), attended])
        x = block.finish(x, attended)
    return prepared.norm(x)


def _attend(
    prepared: Prepared,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    watch: Watch | None,
) -> torch.Tensor:
    """``[B, n, heads, head_dim]`` for queries ``[B, n, embed]``."""
    queries = _by_head(queries, prepared.heads)
    mask = None if mask is None else mask[:, None]
    if watch is None and not prepared.as_host:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)
    probabilities = attention_probabilities(queries, keys, mask)
    if watch is not None:
        watch(layer, probabilities)
    return (probabilities @ values).transpose(1, 2)


def _by_head(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, T, embed]`` as ``[B, heads, T, head_dim]``."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


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
        query, keys, values = (_by_head(part, prepared.heads) for part in (query, keys, values))
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
        out.masked_fill_(to_device(~inside, x.device)[:, None, :, None], 0.0)


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
    ``like``; rows begin at multiples of :data:`MASK_ROW` numbers."""
    width = visible.shape[-1]
    mask = np.zeros((*visible.shape[:-1], width + -width % MASK_ROW), dtype=np.float32)
    np.copyto(mask[..., :width], -np.inf, where=~visible)
    return to_device(mask, like.device).to(like.dtype)[..., :width]


def columns_of_mask(mask: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Columns of a mask, copied where they begin at an address that a GPU's attention cannot read."""
    columns = mask[..., first:end]
    return columns if columns.storage_offset() % MASK_ROW == 0 else columns.clone()


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
