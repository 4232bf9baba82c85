"""Layer budgets token by token: the oracle of what a world model holds and answers under a budget.

One environment at a time, a list of tokens for each layer and group of heads, no columns, padding, batches or
pools. The transformer is that of the recomputation, scores and choice are those of ``tests/budget``. A window
that is computed anew is one causal pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from lzero_kv.config import NodeBudget
from lzero_kv.validation.oracle import Oracle

from ..budget import reference


@dataclass(frozen=True)
class Held:
    """One token in one layer and group of heads."""

    position: int
    key: torch.Tensor
    """[heads of the group, head_dim], like the value."""
    value: torch.Tensor


@dataclass
class Group:
    tokens: list[Held] = field(default_factory=list)
    accumulated: dict[int, float] = field(default_factory=dict)
    """By position."""
    recent: list[dict[int, list[float]]] = field(default_factory=list)
    """For each of the last queries: key position to the attention of each head."""

    def copy(self) -> Group:
        """Tokens and the attention of past queries are shared: nothing changes them in place."""
        return Group(list(self.tokens), dict(self.accumulated), list(self.recent))

    @property
    def positions(self) -> list[int]:
        return [token.position for token in self.tokens]

    def matrices(self, heads: int) -> list[list[list[float]]]:
        """For each head the rows of the last queries over the tokens that are held."""
        nothing = [0.0] * heads
        return [
            [[query.get(position, nothing)[head] for position in self.positions] for query in self.recent]
            for head in range(heads)
        ]


@dataclass
class History:
    groups: list[list[Group]]
    """Of each layer."""
    window: list[tuple[torch.Tensor, int]] = field(default_factory=list)
    """Raw embeddings and logical positions of the whole window, dropped tokens included."""

    def copy(self) -> History:
        return History([[group.copy() for group in layer] for layer in self.groups], list(self.window))


@dataclass
class Answer:
    """A root or a node: what it left, and its logits."""

    history: History
    value: torch.Tensor
    policy: torch.Tensor
    reward: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    seen: History | None = None
    """A root's history before anything was dropped."""


class SlowBudgets:
    """Arguments: the world model, its budget, and the tokens of each layer, which may be changed."""

    def __init__(self, world_model: Any, budget: NodeBudget, slots: tuple[int, ...]) -> None:
        self.oracle = Oracle(world_model, 'rebuild')
        self.budget, self.slots = budget, slots
        self.groups = world_model.num_heads if budget.per_head else 1
        self.share = world_model.num_heads // self.groups
        self.layers = len(slots)
        sizes = budget.sizes(self.layers, self.oracle.kept)
        self.window, self.sinks = sizes.window, sizes.sinks

    def begin(self) -> History:
        return History([[Group() for _ in range(self.groups)] for _ in range(self.layers)])

    @torch.no_grad()
    def root(self, before: History | None, action: Any, observation: torch.Tensor, first: int = 0) -> Answer:
        """The root behind ``before`` (None: of an episode whose first logical position is ``first``)."""
        if before is None:
            history, position = self.begin(), first
        else:
            history, position = before.copy(), before.window[-1][1] + 1
            self._append(history, self.oracle.embed_action(action), position, watched=True)
            position += 1
        features = self._append(history, self.oracle.encode(observation), position, watched=True)
        answer = Answer(history, self.oracle.value(features), self.oracle.policy(features))
        answer.seen = history.copy()
        answer.history = self._moved(history) or self.shrunk(history)
        return answer

    @torch.no_grad()
    def child(self, parent: Answer, action: Any, latent: torch.Tensor) -> Answer:
        history = parent.history.copy()
        position = history.window[-1][1] + 1
        features = self._append(history, self.oracle.embed_action(action), position)
        reward, predicted = self.oracle.reward(features), self.oracle.latent(features)
        features = self._append(history, latent, position + 1)
        value, policy = self.oracle.value(features), self.oracle.policy(features)
        return Answer(self._moved(history) or history, value, policy, reward, predicted)

    def shrunk(self, history: History) -> History:
        """Every layer cut to its slots, in place."""
        names = ('gamma', 'kernel', 'theta')
        parameters = {name: getattr(self.budget, name) for name in names}
        selector = self.budget.selector()
        parameters['mix'] = getattr(selector, 'accumulated_share', 0.5)
        budget = self.budget
        for slots, groups in zip(self.slots, history.groups, strict=True):
            for group in groups:
                if len(group.tokens) <= slots:
                    continue
                places = reference.may_go(group.positions, self.window, self.sinks, budget.step)
                scores = reference.scores(
                    budget.selection,
                    places,
                    group.positions,
                    [group.accumulated.get(position, 0.0) for position in group.positions],
                    group.matrices(self.share),
                    **parameters,
                )
                kept = reference.keep(scores, group.positions, slots, budget.step)
                group.tokens = [group.tokens[place] for place in kept]
        return history

    def preference(self, history: History, layer: int) -> tuple[float, float] | None:
        """Dispersion and shift of a layer; None where nothing may go."""
        groups, budget = history.groups[layer], self.budget
        keys = reference.may_go(groups[0].positions, self.window, self.sinks, budget.step)
        heads = [matrix for group in groups for matrix in group.matrices(self.share)]
        return (reference.dispersion(heads, keys), reference.shift(heads, keys)) if keys else None

    def _moved(self, history: History) -> History | None:
        """A window that is over its length, computed anew and chosen from; None where it is not."""
        if len(history.window) <= self.oracle.kept:
            return None
        return self.shrunk(self.computed(history.window[-self.oracle.kept :]))

    @torch.no_grad()
    def computed(self, window: list[tuple[torch.Tensor, int]]) -> History:
        """All tokens of a window in one causal pass, nothing dropped."""
        oracle, history = self.oracle, History(self.begin().groups, window)
        x = torch.stack([embedding for embedding, _ in window])
        positions = torch.tensor([position for _, position in window])
        if not oracle.rotary:
            x = x + oracle.model.pos_emb.weight[: len(window)]
        future = torch.ones(len(window), len(window), dtype=torch.bool).triu(1)
        for block, groups in zip(oracle.blocks, history.groups, strict=True):
            query, key, value = oracle._projected(block, x)
            if oracle.rotary:
                query, key = (oracle._rotate(part, positions[:, None, None]) for part in (query, key))
            scores = torch.einsum('qhd,khd->qkh', query, key) / math.sqrt(oracle.head_dim)
            weights = scores.masked_fill(future[..., None], -math.inf).softmax(1)
            x = oracle._residual(block, x, torch.einsum('qkh,khd->qhd', weights, value).flatten(1))
            for own, group in zip(self._heads, groups, strict=True):
                for place, (_, position) in enumerate(window):
                    group.tokens.append(Held(position, key[place, own], value[place, own]))
                    self._watch(group, weights[place, : place + 1, own].tolist())
        return history

    @property
    def _heads(self) -> list[slice]:
        """Of each group."""
        return [slice(first, first + self.share) for first in range(0, self.groups * self.share, self.share)]

    def _append(
        self, history: History, embedding: torch.Tensor, position: int, watched: bool = False
    ) -> torch.Tensor:
        model, oracle, x = self.oracle.model, self.oracle, embedding
        if not oracle.rotary:
            x = x + model.pos_emb.weight[len(history.window)]
        history.window.append((embedding, position))
        for block, groups in zip(model.transformer.blocks, history.groups, strict=True):
            query, key, value = oracle._projected(block, x)
            if oracle.rotary:
                query, key = oracle._rotate(query, position), oracle._rotate(key, position)
            mixed = []
            for own, group in zip(self._heads, groups, strict=True):
                group.tokens.append(Held(position, key[own], value[own]))
                keys = torch.stack([token.key for token in group.tokens])  # [tokens, heads, head_dim]
                weights = ((keys * query[own]).sum(-1) / math.sqrt(oracle.head_dim)).softmax(0)
                mixed.append((weights[..., None] * torch.stack([t.value for t in group.tokens])).sum(0))
                if watched:
                    self._watch(group, weights.tolist())
            x = oracle._residual(block, x, torch.cat(mixed).flatten())
        return model.transformer.ln_f(x)

    def _watch(self, group: Group, weights: list[list[float]]) -> None:
        decay = self.budget.selector().decay
        columns = dict(zip(group.positions, weights, strict=True))
        for position, of_heads in columns.items():
            past = group.accumulated.get(position, 0.0)
            group.accumulated[position] = decay * past + sum(of_heads) / self.share
        group.recent = [*group.recent, columns][-self.window :]
