"""One forward pass over a prompt for several caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from lzero_kv.llm.cache import BudgetCache, BudgetLayer, uncompiled
from lzero_kv.llm.families import cache_argument


@torch.no_grad()
def prefill(
    model: Any,
    input_ids: torch.Tensor,
    caches: Sequence[BudgetCache],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a prompt once and fill several caches with it.

    What is dropped of a prompt of one block is dropped behind its attention, so keys, values and queries are
    the same under every budget.

    Arguments:
        model: a causal language model of transformers.
        input_ids: int64 ``[B, n]``.
        caches: empty ones; each is as if it had been passed to ``model`` alone.
        attention_mask: int64 ``[B, n]``, padding on the left; None without any.

    Returns:
        Logits of the last token, ``[B, vocabulary]``.

    Raises:
        ValueError: there is no cache, or one is not empty; nothing is changed.
    """
    if not caches or any(cache.get_seq_length() for cache in caches):
        raise ValueError(f'expected at least one cache, all of them empty, got {len(caches)} caches')
    output = model(
        input_ids,
        attention_mask=attention_mask,
        use_cache=True,
        logits_to_keep=1,
        **{cache_argument(type(model)): SharedPrefill(caches)},
    )
    return output.logits[:, -1]


class SharedPrefill(Cache):
    """Several caches that take in the same prompt."""

    def __init__(self, caches: Sequence[BudgetCache]) -> None:
        layers = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[SharedLayer(list(shares)) for shares in layers])


class SharedLayer(CacheLayerMixin):
    """One layer of several caches; to transformers and :func:`budget_attention` it is the first one's."""

    is_compileable = False
    is_croppable = False
    whole = True
    """As :attr:`BudgetLayer.whole`: nothing has been dropped while a first block is attended."""

    def __init__(self, layers: Sequence[BudgetLayer]) -> None:
        super().__init__()
        self._layers = layers
        self.is_sliding = layers[0].is_sliding

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        self.is_initialized = True

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Join the block to every cache; they hold the same tensors until tokens are dropped."""
        keys: Any = key_states.contiguous()
        values = value_states.contiguous()
        for layer in self._layers:
            layer.update(keys, values)
        keys.budget_layer = self
        return keys, values

    def begin(self, mask: torch.Tensor | None, queries: torch.Tensor) -> torch.Tensor | None:
        """As :meth:`BudgetLayer.begin`."""
        for layer in self._layers:
            layer.begin(mask, queries)
        return mask

    def end(self, queries: torch.Tensor, scale: float | None) -> None:
        """As :meth:`BudgetLayer.end`."""
        for layer in self._layers:
            layer.end(queries, scale)

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        return self._layers[0].get_mask_sizes(query_length)

    def get_seq_length(self, *_: Any) -> int:
        return self._layers[0].get_seq_length()

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length
