"""The slow way to the same logits: transformers' own eager attention over a full cache, in which the tokens
that a budget has dropped are hidden from each layer and head by a mask."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from lzero_kv.llm import BudgetCache

from .models import cache_name


class EagerWithMasks:
    """A model whose layers and heads do not see certain tokens.

    Arguments:
        model: a model; a copy of it is taken.
        padding: columns of padding in front of each row.
    """

    def __init__(self, model: Any, padding: tuple[int, ...]) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation('eager')
        self.cache = DynamicCache()
        config = model.config
        self.heads = config.num_attention_heads
        self.padding = padding
        windows = getattr(config, 'sliding_window', None)
        kinds = getattr(config, 'layer_types', None) or ['sliding_attention'] * config.num_hidden_layers
        self.windows = [windows if kind == 'sliding_attention' else None for kind in kinds]
        self.hidden: list[torch.Tensor] = []  # for each layer bool [B, heads, columns]
        for number, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(self._masking(number), with_kwargs=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, Q, vocabulary]`` of a block of tokens, padding in front of the first one included."""
        rows, block = ids.shape
        new = torch.zeros(rows, self.heads, block, dtype=torch.bool)
        if not self.hidden:
            for row, padding in enumerate(self.padding):
                new[row, :, :padding] = True
        self.hidden = [torch.cat([old, new], 2) for old in self.hidden] or [new.clone() for _ in self.windows]
        columns = self.hidden[0].shape[2]
        column = torch.arange(columns - block, columns)
        positions = (column - torch.tensor(self.padding)[:, None]).clamp(min=0)
        with torch.no_grad():
            return self.model(
                ids, position_ids=positions, use_cache=True, **{cache_name(self.model): self.cache}
            ).logits

    def hide_what_is_gone(self, cache: BudgetCache) -> None:
        """Hide what ``cache`` does not hold any more."""
        share = self.heads // cache[0].keys.shape[1]
        for layer, hidden in enumerate(self.hidden):
            held = cache[layer]
            for row, padding in enumerate(self.padding):
                for head in range(self.heads):
                    group = head // share if held.positions.shape[1] > 1 else 0
                    count = int(held.lengths[row, group])
                    kept = held.positions[row, group, held.columns - count :] + padding
                    hidden[row, head] = True
                    hidden[row, head, kept] = False

    def _masking(self, number: int) -> Any:
        def replace(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = self.hidden[number]
            block, columns = kwargs['hidden_states'].shape[1], hidden.shape[2]
            own = torch.arange(columns - block, columns)[:, None]
            column = torch.arange(columns)
            blocked = hidden[:, :, None] | (column > own)
            if self.windows[number] is not None:
                blocked = blocked | (column <= own - self.windows[number])
            # a query of padding sees nothing: finite, so that it does not become NaN
            mask = torch.zeros(blocked.shape, dtype=kwargs['hidden_states'].dtype).masked_fill(blocked, -1e9)
            return args, {**kwargs, 'attention_mask': mask}

        return replace
