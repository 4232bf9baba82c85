"""A small transformer with random weights and rotary positions, and a cache for it that hides tokens instead
of dropping them."""

from __future__ import annotations

import torch
from torch import nn

from lzero_kv.budget import AttentionRecord, BudgetedCache, LayerCache, Tokens, attend


class SmallModel(nn.Module):
    """Attention and a feed-forward layer, pre-normalised; grouped query heads; rotary positions."""

    def __init__(self, layers: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.layers, self.heads, self.kv_heads, self.head_dim = layers, heads, kv_heads, head_dim
        self.width = heads * head_dim
        narrow = kv_heads * head_dim
        self.query = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(layers))
        self.key = nn.ModuleList(nn.Linear(self.width, narrow) for _ in range(layers))
        self.value = nn.ModuleList(nn.Linear(self.width, narrow) for _ in range(layers))
        self.feed = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(layers))
        self.norm = nn.LayerNorm(self.width)
        self.requires_grad_(False)

    def heads_of(self, layer: int, x: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys and values ``[B, heads, Q, head_dim]``, rotated to their positions ``[B, Q]``."""
        x = self.norm(x)
        found = [
            table[layer](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for table in (self.query, self.key, self.value)
        ]
        return [self._rotated(3 * found[0], positions), self._rotated(found[1], positions), found[2]]

    def after(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of a layer."""
        x = x + attended.transpose(1, 2).flatten(2)
        return x + self.feed[layer](self.norm(x)).relu()

    def forward(self, x: torch.Tensor, cache: BudgetedCache, lengths: torch.Tensor | None) -> torch.Tensor:
        """One block of tokens ``[B, Q, width]`` through a cache under a budget."""
        for layer in range(self.layers):
            if lengths is None:
                positions = cache[layer].positions[:, 0, -1:] + 1 + torch.arange(x.shape[1])
            else:
                positions = Tokens.of_prompt(lengths[:, None], x.shape[1], window=1).positions[:, 0]
            queries, keys, values = self.heads_of(layer, x, positions)
            cache.join(layer, keys, values)
            held = cache.append(layer, None if lengths is None else lengths.tolist())
            attended, _ = attend(queries, held)
            cache.observe(layer, queries)
            x = self.after(layer, x, attended)
        return x

    def _rotated(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        angle = (positions[:, None, :, None] * 0.7 ** torch.arange(half)).to(x.dtype)
        one, other, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat(
            [one * angle.cos() - other * angle.sin(), one * angle.sin() + other * angle.cos(), rest], dim=-1
        )


class FullCacheWithMasks:
    """Every token stays; those that another cache has dropped are hidden by a mask."""

    def __init__(self, model: SmallModel) -> None:
        self.model = model
        self.caches: list[LayerCache] = []
        self.hidden: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """One block of tokens ``[B, Q, width]``."""
        model, block = self.model, x.shape[1]
        for layer in range(model.layers):
            if lengths is not None:
                tokens = Tokens.of_prompt(lengths[:, None], block, window=1)
                queries, keys, values = model.heads_of(layer, x, tokens.positions[:, 0])
                record = AttentionRecord(1, 1, 1.0, ())
                self.caches.append(LayerCache.of_prompt(keys, values, lengths, record))
                self.hidden.append(torch.zeros(x.shape[0], model.kv_heads, block, dtype=torch.bool))
            else:
                old = self.caches[layer]
                positions = old.positions[:, 0, -1:] + 1 + torch.arange(block)
                queries, keys, values = model.heads_of(layer, x, positions)
                old.append(keys, values, positions)
                new = torch.zeros(x.shape[0], model.kv_heads, block, dtype=torch.bool)
                self.hidden[layer] = torch.cat([self.hidden[layer], new], dim=2)
            x = model.after(layer, x, self._attend(layer, queries))
        return x

    def hide_what_is_gone(self, cache: BudgetedCache) -> None:
        """Hide what ``cache`` does not hold."""
        for layer, full in enumerate(self.caches):
            kv = cache[layer]
            real = torch.arange(kv.columns) >= kv.columns - kv.lengths[..., None]
            for row in range(kv.positions.shape[0]):
                for head in range(self.model.kv_heads):
                    held = set(kv.positions[row, head][real[row, head]].tolist())
                    gone = [position not in held for position in full.positions[row, 0].tolist()]
                    self.hidden[layer][row, head] = torch.tensor(gone)

    def _attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        kv, shares = self.caches[layer], self.model.heads // self.model.kv_heads
        if not self.hidden[layer].any():
            return attend(queries, kv)[0]
        block, columns = queries.shape[2], kv.columns
        keys, values = kv.keys.repeat_interleave(shares, 1), kv.values.repeat_interleave(shares, 1)
        column = torch.arange(columns)
        padding = (column < columns - kv.lengths[..., None])[:, :, None]
        gone = self.hidden[layer].repeat_interleave(shares, 1)[:, :, None]
        blocked = padding | gone | (column > column[-block:, None])
        logits = (queries @ keys.transpose(2, 3) / self.model.head_dim**0.5).masked_fill(blocked, -torch.inf)
        return logits.softmax(-1) @ values
