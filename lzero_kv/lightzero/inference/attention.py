"""The host's transformer over keys and values that stand beside their rows: a few new tokens (decode), or
whole histories (prefill).

Keys and values are laid out head by head, ``[..., 2, heads, tokens, head_dim]`` (0: keys, 1: values), because
attention reads one head's tokens one after another. Rows are right-aligned: all rows write their next token
to the same column, whatever their lengths, and the columns in front of a shorter row are masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from lzero_kv.cache.transfer import to_device

from .weights import InferenceWeights

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
        own: for each layer ``[B, 2, heads, n, head_dim]``, views of the last columns of keys and values.
        masks: for each layer ``[B, 1, n, n_l]`` of :func:`additive_mask`; None when every new token may look
            at every column.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    own: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor | None]


class WindowsBeside(NamedTuple):
    """Windows that are computed from their raw tokens in the pass of other tokens: the products of a few rows
    cost what reading their weights costs, so more rows are nearly free.

    Attributes:
        x: ``[P, T, embed]`` embeddings with their learned position, where positions are learned.
        rotation: complex ``[P, T, head_dim / 2]`` or None.
        mask: ``[P or 1, 1, T, T]`` of :func:`causal_mask`.
        out: ``[P or B, layers, 2, heads, T, head_dim]``, where their keys and values are written.
        rows: int64 ``[P]``, the rows of ``out``; None for all of them in order.
    """

    x: torch.Tensor
    rotation: Rotation
    mask: torch.Tensor
    out: torch.Tensor
    rows: torch.Tensor | None


Watch = Callable[[int, torch.Tensor], None]
"""Told the number of a layer and its attention probabilities ``[B, heads, n, n_l]``."""


def decode(
    weights: InferenceWeights,
    columns: Columns,
    x: torch.Tensor,
    rotation: Rotation,
    *,
    windows: WindowsBeside | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Run new tokens of every row through the transformer and write their keys and values to their columns.

    Args:
        weights: the transformer.
        columns: what the tokens attend to; written in place.
        x: ``[B, n, embed]``, embeddings with their learned position, where positions are learned.
        rotation: complex ``[B, n, head_dim / 2]`` rotary factors, None where positions are learned.
        windows: computed on the way. What they write may be among the columns of this pass.
        watch: reads the attention, which the fused kernel does not tell.

    Returns:
        ``[B, embed]``, the transformer's output of each row's last token.
    """
    rows, new, embed = x.shape
    heads, layers = weights.heads, len(weights.blocks)
    x = x.reshape(rows * new, embed)
    rotation = None if rotation is None else rotation.flatten(0, 1)
    ahead = 0  # tokens of windows, which stand in front of the new ones
    if windows is not None:
        beside, steps = windows.x.shape[:2]
        ahead = beside * steps
        x = torch.cat([windows.x.reshape(ahead, embed), x])
        if rotation is not None and windows.rotation is not None:
            rotation = torch.cat([windows.rotation.flatten(0, 1), rotation])
    rotation = None if rotation is None else rotation[:, None, None]
    for layer, block in enumerate(weights.blocks):
        qkv = block.qkv(block.norm1(x)).view(-1, 3, heads, embed // heads)
        if rotation is not None:
            rotate(qkv[:, :2], rotation)
        if windows is not None:
            window = qkv[:ahead].view(beside, steps, 3, heads, -1)
            place, kv = windows.out[:, layer], window[:, :, 1:].permute(0, 2, 3, 1, 4)
            if windows.rows is None:
                place.copy_(kv)
            else:
                place.index_copy_(0, windows.rows, kv)
        own = qkv[ahead:].view(rows, new, 3, heads, -1).permute(2, 0, 3, 1, 4)
        columns.own[layer].copy_(own[1:].transpose(0, 1))
        queries, mask = own[0], columns.masks[layer]
        last = layer + 1 == layers
        if last:  # the output of the tokens in front of the last one is not asked for
            x = x[ahead:].view(rows, new, embed)[:, -1]
            queries, mask = queries[:, :, -1:], None if mask is None else mask[:, :, -1:]
        keys, values = columns.keys[layer], columns.values[layer]
        if watch is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        else:
            probabilities = attention_probabilities(queries, keys, mask)
            watch(layer, probabilities)
            attended = probabilities @ values
        attended = attended.transpose(1, 2).reshape(-1, embed)
        if windows is not None and not last:
            seen = F.scaled_dot_product_attention(
                *window.permute(2, 0, 3, 1, 4).unbind(0), attn_mask=windows.mask
            )
            attended = torch.cat([seen.transpose(1, 2).reshape(ahead, embed), attended])
        x = block.finish(x, attended)
    return weights.norm(x)


class Projected(NamedTuple):
    """One layer's view of whole histories: queries, keys and values ``[B, heads, T, head_dim]`` and the mask
    ``[B or 1, 1, T, T]`` of :func:`causal_mask`; under rotary positions queries and keys are rotated."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor


def prefill(
    weights: InferenceWeights, x: torch.Tensor, lengths: np.ndarray, rotation: Rotation
) -> Iterator[Projected]:
    """Run whole histories through the transformer without any cache, and show each layer's keys and values.

    What follows a layer is computed when the next one is asked for.

    Args:
        weights: the transformer.
        x: ``[B, T, embed]`` right-aligned embeddings with their learned position, where positions are
            learned.
        lengths: int64 ``[B]``, how many of the last columns belong to the row.
        rotation: complex ``[B, T, head_dim / 2]`` or None.
    """
    rows, steps, embed = x.shape
    heads = weights.heads
    mask = causal_mask(lengths, steps, x)
    rotation = None if rotation is None else rotation[:, :, None, None]
    x = x.reshape(rows * steps, embed)
    for block in weights.blocks:
        qkv = block.qkv(block.norm1(x)).view(rows, steps, 3, heads, -1)
        if rotation is not None:
            rotate(qkv[:, :, :2], rotation)
        query, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        yield Projected(query, keys, values, mask)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = block.finish(x, attended.transpose(1, 2).reshape(rows * steps, embed))


def prefilled(
    weights: InferenceWeights, x: torch.Tensor, lengths: np.ndarray, rotation: Rotation
) -> torch.Tensor:
    """Keys and values of whole histories, ``[B, layers, 2, heads, T, head_dim]``, zero in front of a row;
    arguments as of :func:`prefill`."""
    steps, parts = x.shape[1], list[torch.Tensor]()
    for layer in prefill(weights, x, lengths, rotation):
        parts.append(torch.stack([layer.keys, layer.values], dim=1))
        if len(parts) == len(weights.blocks):
            break  # what follows the last layer's keys and values is not asked for
    out = torch.stack(parts, dim=1)
    if int(lengths.min()) < steps:
        outside = np.arange(steps) < steps - lengths[:, None]
        out.masked_fill_(to_device(outside, x.device)[:, None, None, None, :, None], 0.0)
    return out


def causal_mask(lengths: np.ndarray, steps: int, like: torch.Tensor) -> torch.Tensor:
    """What the tokens of right-aligned histories may attend to, ``[B or 1, 1, steps, steps]``.

    One mask serves all rows when they are full. Not ``is_causal``: that kernel turns nan scores into zeros,
    and broken weights would go unnoticed.
    """
    if int(lengths.min()) == steps:
        return _full_mask(steps, like.dtype, like.device)
    inside = np.arange(steps) >= steps - lengths[:, None]
    visible = np.tril(np.ones((steps, steps), dtype=bool)) & inside[:, None, :]
    # a column outside the row sees itself, so that no softmax runs over nothing
    return additive_mask(visible | np.eye(steps, dtype=bool), like)[:, None]


@cache
def _full_mask(steps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    visible = np.tril(np.ones((1, 1, steps, steps), dtype=bool))
    return additive_mask(visible, torch.empty(0, dtype=dtype, device=device))


def additive_mask(visible: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """0 where attention may look (bool ``visible``), -inf elsewhere, in the dtype and on the device of
    ``like``; rows begin at multiples of :data:`MASK_ROW` numbers."""
    width = visible.shape[-1]
    mask = np.zeros((*visible.shape[:-1], width + -width % MASK_ROW), dtype=np.float32)
    np.copyto(mask[..., :width], -np.inf, where=~visible)
    return to_device(mask, like.device).to(like.dtype)[..., :width]


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> None:
    """Rotary position embedding (Su et al. 2021, RoFormer, section 3.4.2) of ``[..., head_dim]``, in place;
    numbers of less than float32 are rotated in float32.

    ``rotation`` is complex ``[..., head_dim / 2]`` and broadcasts: one factor for each pair of neighbouring
    features.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    torch.view_as_complex(wide.view(*x.shape[:-1], -1, 2)).mul_(rotation)
    if wide is not x:
        x.copy_(wide)


def attention_probabilities(
    queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """``[B, heads, Q, n]`` of queries ``[B, heads, Q, head_dim]`` over keys ``[B, heads, n, head_dim]``, with
    an additive mask that broadcasts."""
    scores = (queries @ keys.transpose(-2, -1)) * (1.0 / math.sqrt(queries.shape[-1]))
    return F.softmax(scores if mask is None else scores + mask, dim=-1)
