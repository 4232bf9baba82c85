"""The cache in a search of one's own: a tiny transformer, a tiny Monte Carlo tree search, a bounded pool.

    python examples/own_search.py

A node stores the keys and values of its whole history. A simulation looks its parents up, decodes one token
beside what was loaded and stores the child. What the bound evicted is computed again from the node's path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lzero_kv import KVCacheManager
from lzero_kv.cache.keys import NO_SLOT, NodeKey

LAYERS, HEADS, HEAD_DIM, TOKENS, ACTIONS, ROWS, SIMULATIONS = 2, 3, 4, 16, 5, 4, 40
WIDTH, BEGIN = HEADS * HEAD_DIM, ACTIONS  # the token before the first action
SHAPE = dict(num_layers=LAYERS, num_heads=HEADS, embed_dim=WIDTH, context_length=TOKENS)


class Transformer(nn.Module):
    """Policy and value after a history of actions."""

    def __init__(self) -> None:
        super().__init__()
        self.action, self.position = nn.Embedding(ACTIONS + 1, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.policy, self.value = nn.Linear(WIDTH, ACTIONS), nn.Linear(WIDTH, 1)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, kv: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        """One token more: policy [B, ACTIONS], value [B] and the histories with it, [B, 2 * LAYERS, HEADS,
        TOKENS, HEAD_DIM]; before it they were ``kv``, right-aligned, ``lengths`` tokens long."""
        x, kept = self.action(tokens) + self.position(lengths), []
        seen = torch.arange(TOKENS) >= TOKENS - 1 - lengths[:, None]  # the columns in front hold nothing
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            query, *new = qkv(x).view(len(x), 3, HEADS, 1, HEAD_DIM).unbind(1)
            pair = [torch.cat([kv[:, 2 * layer + i, :, 1:], new[i]], 2) for i in (0, 1)]
            x = x + out(scaled_dot_product_attention(query, *pair, seen[:, None, None]).flatten(1))
            kept += pair
        return [self.policy(x).softmax(-1), self.value(x)[:, 0].tanh(), torch.stack(kept, 1)]

    def whole(self, history: list[int]) -> list[torch.Tensor]:
        """The same for one whole history, without any cache."""
        kv = torch.zeros(1, 2 * LAYERS, HEADS, TOKENS, HEAD_DIM)
        for length, token in enumerate(history):
            policy, value, kv = self.decode(torch.tensor([token]), kv, torch.tensor([length]))
        return [policy, value, kv]


@dataclass
class Node:
    """A history, and what the search knows of it."""

    history: list[int]
    prior: float = 1.0
    number: int | None = None  # the simulation that expanded it
    visits: int = 0
    total: float = 0.0
    children: list[Node] = field(default_factory=list)

    def best(self) -> Node:
        """The child to visit next, by PUCT."""
        scale = 1.5 * math.sqrt(self.visits)
        return max(self.children, key=lambda c: c.total / max(c.visits, 1) + scale * c.prior / (1 + c.visits))


class Search:
    """ROWS searches side by side."""

    def __init__(self, model: Transformer, max_bytes: int) -> None:
        self.model = model
        self.manager = KVCacheManager(SHAPE, ROWS, cache_config=dict(max_bytes=max_bytes))
        self.manager.begin_search(2 * ROWS, ROWS * (SIMULATIONS + 1))
        self.roots = [Node([BEGIN, row]) for row in range(ROWS)]
        outputs = zip(*(model.whole(root.history) for root in self.roots), strict=True)
        self._add([[root] for root in self.roots], 0, *map(torch.cat, outputs))

    def run(self) -> None:
        """All simulations."""
        for simulation in range(1, SIMULATIONS + 1):
            paths = [self._path(root) for root in self.roots]
            parents = [path[-2] for path in paths]
            kv, lengths = self._histories(parents)
            tokens = torch.tensor([path[-1].history[-1] for path in paths])
            self._add(paths, simulation, *self.model.decode(tokens, kv, lengths))

    def _path(self, node: Node) -> list[Node]:
        path = [node]
        while path[-1].children:
            path.append(path[-1].best())
        return path

    def _histories(self, nodes: list[Node]) -> tuple[torch.Tensor, torch.Tensor]:
        keys = [NodeKey(row, node.number) for row, node in enumerate(nodes)]
        lost = [row for row, slot in enumerate(self.manager.lookup(keys)) if slot == NO_SLOT]
        for row in lost:
            self.manager.count_rebuilt(len(nodes[row].history), roots=False)
            self._store([keys[row]], [nodes[row]], self.model.whole(nodes[row].history)[2])
        slots = self.manager.slots(keys)
        return self.manager.load(slots), torch.from_numpy(self.manager.lengths(slots))

    def _store(self, keys: list[NodeKey], nodes: list[Node], kv: torch.Tensor) -> None:
        lengths = [len(node.history) for node in nodes]
        self.manager.store(keys, kv, lengths, lengths)

    def _add(self, paths: list[list[Node]], number: int, *outputs: torch.Tensor) -> None:
        policy, value, kv = outputs
        for row, path in enumerate(paths):
            leaf = path[-1]
            leaf.number = number
            if len(leaf.history) < TOKENS:
                leaf.children = [Node([*leaf.history, a], float(policy[row, a])) for a in range(ACTIONS)]
            for node in path:
                node.visits += 1
                node.total += float(value[row])
        self._store([NodeKey(row, number) for row in range(ROWS)], [path[-1] for path in paths], kv)


def main(max_bytes: int = 200_000) -> Search:
    """Search, and show the visits of the first actions and what the cache did."""
    torch.manual_seed(0)
    search = Search(Transformer(), max_bytes)
    search.run()
    print(*([child.visits for child in root.children] for root in search.roots), sep='\n')
    print(search.manager.get_stats_summary()['nodes'])
    return search


if __name__ == '__main__':
    main()
