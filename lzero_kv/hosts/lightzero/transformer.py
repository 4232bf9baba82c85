"""The host's transformer, one token at a time, over keys and values that lie in one buffer.

The buffer is ``[B, 2 * layers, tokens, embed]``: the blocks k_0, v_0, k_1, v_1, ... of every row. Rows are
right-aligned: all rows write their next token to the same column, whatever their lengths, and the columns in
front of a shorter row are masked. Projections write straight into the buffer, so that appending a token costs
no operator beside the model's own.

The modules are the host's own (``ln1``, ``attn``, ``gate1``, ``mlp``, heads); nothing here holds a weight.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Rotation = torch.Tensor | None


def append_token(
    transformer: Any,
    buffer: torch.Tensor,
    columns: tuple[int, int],
    x: torch.Tensor,
    mask: torch.Tensor | None,
    rotation: Rotation,
    host_arithmetic: bool,
) -> torch.Tensor:
    """Run one token of every row through the transformer and write its keys and values into ``buffer``.

    Args:
        transformer: the host's ``Transformer``.
        buffer: ``[B, 2 * layers, tokens, embed]``, written in place at column ``columns[1]``.
        columns: ``(first, own)``: the token attends to ``first .. own``, both included, and is written to
            ``own``.
        x: ``[B, embed]``, embeddings with their learned position, where positions are learned.
        mask: ``[B, own - first + 1]`` of :func:`additive_mask`; None when every column belongs to its row.
        rotation: complex ``[B, head_dim / 2]`` rotary factors, None where positions are learned.
        host_arithmetic: use the host's own sequence of operators for attention, to the last bit, instead of
            the fused one.

    Returns:
        ``[B, embed]``, the transformer's output of this token.
    """
    first, own = columns
    for layer, block in enumerate(transformer.blocks):
        keys, values = buffer[:, 2 * layer], buffer[:, 2 * layer + 1]
        attention = block.attn
        normed = block.ln1(x)
        query = attention.query(normed)
        if rotation is None:
            _project(attention.key, normed, keys[:, own])
        else:
            heads = attention.num_heads
            query = rotate(query, rotation, heads)
            keys[:, own] = rotate(attention.key(normed), rotation, heads)
        _project(attention.value, normed, values[:, own])
        attended = _attend(
            query.unsqueeze(1),
            keys[:, first : own + 1],
            values[:, first : own + 1],
            attention.num_heads,
            None if mask is None else mask[:, None, None, :],
            host_arithmetic,
        )
        x = _residual(block, x, attention.proj(attended.squeeze(1)))
    return transformer.ln_f(x)


def causal_pass(
    transformer: Any, x: torch.Tensor, lengths: np.ndarray, rotation: Rotation, out: torch.Tensor
) -> None:
    """Compute the keys and values of whole histories in one pass, without any cache.

    Args:
        transformer: the host's ``Transformer``.
        x: ``[B, T, embed]`` right-aligned embeddings with their learned position, where positions are
            learned.
        lengths: int64 ``[B]``, how many of the last columns belong to the row.
        rotation: complex ``[B, T, head_dim / 2]`` or None.
        out: ``[B, 2 * layers, T, embed]``, written in place; the columns in front of a row become zero.
    """
    steps = x.shape[1]
    inside = np.arange(steps)[None, :] >= steps - lengths[:, None]
    visible = np.tril(np.ones((steps, steps), dtype=bool))[None] & inside[:, None, :]
    # A column outside the row sees itself, so that no softmax runs over nothing.
    visible |= np.eye(steps, dtype=bool)[None]
    mask = additive_mask(visible, x)[:, None]
    blocks = []
    for block in transformer.blocks:
        attention = block.attn
        normed = block.ln1(x)
        keys, values = attention.key(normed), attention.value(normed)
        if rotation is not None:
            keys = rotate(keys, rotation, attention.num_heads)
        blocks += [keys, values]
        if len(blocks) == out.shape[1]:
            break  # what follows the last layer's keys and values is not asked for
        query = attention.query(normed)
        if rotation is not None:
            query = rotate(query, rotation, attention.num_heads)
        x = _residual(
            block, x, attention.proj(_attend(query, keys, values, attention.num_heads, mask, False))
        )
    torch.stack(blocks, dim=1, out=out)
    if not inside.all():
        out.masked_fill_(torch.from_numpy(~inside).to(x.device)[:, None, :, None], 0.0)


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
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], heads, -1, 2))
    return torch.view_as_real(pairs * rotation.unsqueeze(-2)).reshape(x.shape).type_as(x)


def _project(linear: nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
    """``out[...] = linear(x)``; a plain biased Linear writes there by itself, with the same arithmetic."""
    if type(linear) is nn.Linear and linear.bias is not None and out.dtype == x.dtype:
        torch.addmm(linear.bias, x, linear.weight.t(), out=out)
    else:
        out.copy_(linear(x))


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    host_arithmetic: bool,
) -> torch.Tensor:
    """Attention of ``[B, T, embed]`` queries over ``[B, N, embed]`` keys and values, ``[B, T, embed]``."""
    batch, steps, embed = query.shape
    head_dim = embed // heads
    query, keys, values = (t.unflatten(-1, (heads, head_dim)).transpose(1, 2) for t in (query, keys, values))
    if host_arithmetic:
        scores = (query @ keys.transpose(-2, -1)) * (1.0 / math.sqrt(head_dim))
        if mask is not None:
            scores = scores + mask
        attended = F.softmax(scores, dim=-1) @ values
    else:
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return attended.transpose(1, 2).reshape(batch, steps, embed)


def _residual(block: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """The rest of a block after its attention: residual or gated (GTrXL, Parisotto et al. 2020), then the
    MLP."""
    if block.gru_gating:
        x = block.gate1(x, attended)
        return block.gate2(x, block.mlp(block.ln2(x)))
    x = x + attended
    return x + block.mlp(block.ln2(x))
