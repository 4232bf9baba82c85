"""The place where a budget sees a model's queries: transformers' own ``sdpa`` attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lzero_kv.budget import LayerCache
from lzero_kv.budget.tokens import real_columns


def budget_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' ``sdpa`` attention; keys that a :class:`~lzero_kv.llm.BudgetCache` returned bring their
    layer with them, all others pass as they are."""
    layer = getattr(key, 'budget_layer', None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    # the layer holds these keys: without the way back both are freed with the last reference
    del key.budget_layer
    if others.get('output_attentions'):
        raise ValueError('output_attentions=True is not possible under a budget; leave it out')
    mask = layer.begin(attention_mask, query)
    output = sdpa_attention_forward(module, query, key, value, mask, **others)
    layer.end(query, others.get('scaling'))
    return output


def watch_attention() -> None:
    """Put :func:`budget_attention` under the name ``'sdpa'``, for every model of the process."""
    AttentionInterface.register('sdpa', budget_attention)


def visible(layer: LayerCache, block: int, window: int | None, heads: int) -> torch.Tensor:
    """bool ``[B, 1 or heads, block, n]``: the tokens that the newest ``block`` queries of a layer see.

    Arguments:
        layer: with the queries' own tokens in the last columns.
        block: number of the queries.
        window: positions that a query sees; None for all.
        heads: query heads.
    """
    columns, device = layer.columns, layer.keys.device
    seen = real_columns(layer.lengths, columns)[:, :, None]
    if block > 1:
        column = torch.arange(columns, device=device)
        seen = seen & (column <= column[columns - block :, None])
    if window is not None and block > 1:
        own = layer.positions[:, :, columns - block :, None]
        seen = seen & (layer.positions[:, :, None] > own - window)
    # groups drop as many tokens as each other, but not as many of them have left a sliding window
    alike = seen.shape[1] == 1 or (layer.step == 1 and window is None)
    return seen[:, :1] if alike else seen.repeat_interleave(heads // seen.shape[1], dim=1)
