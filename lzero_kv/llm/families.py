"""The models that a budget is known to be right for."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

FAMILIES: dict[str, str] = {
    'llama': 'Llama 2 and 3, TinyLlama, SmolLM2',
    'mistral': 'Mistral, with a sliding window or without',
    'qwen2': 'Qwen2 and Qwen2.5, with sliding layers or without',
}
"""``model_type`` of a configuration, and the models that have it. A new row needs rotary positions, products
scaled by one factor, and attention through transformers' attention interface."""


def check_family(config: Any) -> None:
    """Refuse a model that is not in :data:`FAMILIES`.

    Raises:
        TypeError: ``config`` is not a model's configuration.
        ValueError: its ``model_type`` is unknown.
    """
    kind = getattr(config, 'model_type', None)
    if kind is None or not hasattr(config, 'num_hidden_layers'):
        raise TypeError(f'expected the configuration of a model, model.config, got {type(config).__name__}')
    if kind not in FAMILIES:
        known = ', '.join(f'{name!r} ({models})' for name, models in FAMILIES.items())
        raise ValueError(f'model_type must be one of {known}; got {kind!r}')


def check_attention(config: Any) -> None:
    """Refuse a model whose attention cannot be watched.

    Raises:
        ValueError: the attention implementation is not ``'sdpa'``.
    """
    chosen = getattr(config, '_attn_implementation', None)
    if chosen not in (None, 'sdpa'):
        raise ValueError(
            f"a budget needs attn_implementation='sdpa', got {chosen!r}; write "
            f"model.set_attn_implementation('sdpa') or from_pretrained(..., attn_implementation='sdpa')"
        )


def sliding_windows(config: Any) -> list[int | None]:
    """Positions that a query sees in each layer, its own included; None for all."""
    window = getattr(config, 'sliding_window', None)
    kinds = getattr(config, 'layer_types', None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == 'sliding_attention' else None for kind in kinds]


@cache
def cache_argument(model: type) -> str:
    """The name under which ``forward`` of a model's class takes the cache: transformers 5.24 renamed it."""
    return 'cache' if 'cache' in inspect.signature(model.forward).parameters else 'past_key_values'
