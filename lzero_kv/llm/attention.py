"""The place where a budget sees a model's queries: transformers' own ``sdpa`` attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


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
