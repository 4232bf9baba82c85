"""A layer budget in a transformer of one's own: a long prompt, a quarter of its tokens kept, then generation.

    python examples/own_transformer_budget.py

Each layer hands its new keys and values to the cache, attends to what the cache gives back, and shows it the
queries. What is kept is decided by their attention.
"""

from __future__ import annotations

import torch
from torch import nn

from lzero_kv.budget import BudgetConfig, BudgetedCache, attend

LAYERS, HEADS, HEAD_DIM, WORDS, ROWS, PROMPT = 3, 4, 5, 23, 2, 64
WIDTH = HEADS * HEAD_DIM


class Transformer(nn.Module):
    """Decoder without positions; where yours rotates, do so before `join`."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    @torch.no_grad()
    def forward(self, words: torch.Tensor, cache: BudgetedCache) -> torch.Tensor:
        """Logits [B, WORDS] of the word after ``words`` [B, T], which come behind what the cache holds."""
        x = self.word(words)
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            shape = (*words.shape, 3, HEADS, HEAD_DIM)
            queries, keys, values = qkv(x).view(shape).permute(2, 0, 3, 1, 4)
            cache.join(layer, keys, values)
            attended, _ = attend(queries, cache.append(layer))
            cache.observe(layer, queries)
            x = x + out(attended.transpose(1, 2).reshape(x.shape))
        return self.head(x[:, -1])


def main(ratio: float = 0.25) -> tuple[torch.Tensor, BudgetedCache]:
    """Read the prompt, generate, and show what each layer holds."""
    torch.manual_seed(0)
    model = Transformer()
    cache = BudgetedCache(BudgetConfig.read(dict(ratio=ratio, window=6, sinks=2)), LAYERS)
    words = torch.randint(WORDS, (ROWS, PROMPT))
    for _ in range(12):
        logits = model(words, cache)
        words = logits.argmax(-1, keepdim=True)
    print(f'{PROMPT + 11} tokens seen; each layer may hold, in each row: {cache.slots}')
    print('places kept in layer 0, head 0:', cache[0].positions[0, 0].tolist())
    return logits, cache


if __name__ == '__main__':
    main()
