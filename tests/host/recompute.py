"""What the world model must answer for a node, recomputed from the node's own history.

No batch, no cache, no padding: one token after another through the host's own modules, with every window
rule spelled out. Slow and obvious on purpose; it is what the tests hold an engine against.

A history is a sequence of tokens: observation, action, observation, and so on. The window keeps ``kept =
max(1, W - 3)`` tokens between steps (W is the host's ``context_length``). A step appends an action and an
observation token; while more than ``kept`` tokens remain, the oldest step (two tokens) is dropped. What
happens to the tokens that stay depends on ``window``:

``shift``
    With learned positions a token that moves from window position p to p - 2 gets ``key(pos_emb[p - 2]) -
    key(pos_emb[p])`` added to its key in every layer, likewise for values: the host's rule, with the
    weights of now. With RoPE nothing changes, a token keeps the rotation of its logical position.
``rebuild``
    The tokens that stay are run again, in one causal pass without what was dropped, at window positions 0,
    1, 2 (learned) or at their logical positions (RoPE).

Logical positions: the observation of step t stands at 2t, the action after it at 2t + 1. A node at depth d
below a root of step t is reached by the action at 2(t + d) - 1 and carries its latent state at 2(t + d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Token:
    embedding: torch.Tensor
    """[embed], before any position is added."""
    position: int
    """Logical position in the episode."""


@dataclass(frozen=True)
class Window:
    """Tokens in sight, and their keys and values as they stand now."""

    tokens: tuple[Token, ...] = ()
    keys: tuple[tuple[torch.Tensor, ...], ...] = field(default=(), repr=False)
    """[layers][tokens], each [heads, head_dim]."""
    values: tuple[tuple[torch.Tensor, ...], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Answer:
    """One node: its window after the step, and the logits of its two tokens, each without a batch axis."""

    window: Window
    value: torch.Tensor
    policy: torch.Tensor
    reward: torch.Tensor | None = None
    """None at a root, like ``latent``."""
    latent: torch.Tensor | None = None
    """The latent state [embed] predicted from the action token."""


class Recompute:
    """Answers of ``world_model`` for whole histories; reads its weights anew at every call."""

    def __init__(self, world_model: Any, window: str = 'shift') -> None:
        if window not in ('shift', 'rebuild'):
            raise ValueError(f"expected window 'shift' or 'rebuild', got {window!r}")
        self.model = world_model
        self.rule = window
        self.kept = max(1, world_model.context_length - 3)
        self.layers = range(world_model.num_layers)
        self.heads = world_model.num_heads
        self.head_dim = world_model.embed_dim // world_model.num_heads
        self.rotary = bool(world_model.config.rotary_emb)

    @torch.no_grad()
    def root(
        self, observations: Sequence[torch.Tensor], actions: Sequence[Any], first_step: int = 0
    ) -> Answer:
        """The root after an episode of ``observations`` (each unbatched) and the ``actions`` between them,
        one fewer.
        """
        if len(observations) != len(actions) + 1:
            raise ValueError(
                f'expected one action fewer than observations, got {len(actions)} and {len(observations)}'
            )
        window = Window((), ((),) * len(self.layers), ((),) * len(self.layers))
        position = 2 * first_step
        window, out = self._append(window, Token(self.encode(observations[0]), position))
        for action, observation in zip(actions, observations[1:], strict=True):
            window, _ = self._append(window, Token(self.embed_action(action), position + 1))
            window, out = self._append(window, Token(self.encode(observation), position + 2))
            window = self._trim(window)
            position += 2
        return Answer(window, self._value(out), self._policy(out))

    @torch.no_grad()
    def child(self, parent: Answer, action: Any, latent: torch.Tensor | None = None) -> Answer:
        """The node that ``action`` leads to. ``latent`` [embed] is its latent state; None takes the
        predicted one.
        """
        position = parent.window.tokens[-1].position
        window, out = self._append(parent.window, Token(self.embed_action(action), position + 1))
        reward = self.model.head_rewards.head_module(out[None])[0]
        predicted = self.model.head_observations.head_module(out[None])[0]
        window, out = self._append(window, Token(predicted if latent is None else latent, position + 2))
        return Answer(self._trim(window), self._value(out), self._policy(out), reward, predicted)

    @torch.no_grad()
    def path(
        self,
        observations: Sequence[torch.Tensor],
        actions: Sequence[Any],
        path: Sequence[tuple[Any, torch.Tensor | None]],
    ) -> Answer:
        """The node at the end of ``path``, (action, latent) pairs below the root of the history; from
        scratch.
        """
        node = self.root(observations, actions)
        for action, latent in path:
            node = self.child(node, action, latent)
        return node

    def encode(self, observation: torch.Tensor) -> torch.Tensor:
        """[embed] of one raw observation."""
        return self.model.tokenizer.encode_to_obs_embeddings(observation[None]).reshape(-1)

    def embed_action(self, action: Any) -> torch.Tensor:
        """[embed] of one action: a number, or [action dimensions] when continuous."""
        if self.model.continuous_action_space:
            # The host turns continuous actions to torch's default dtype before embedding them.
            weights = next(self.model.act_embedding_table.parameters())
            return self.model.act_embedding_table(torch.as_tensor(action).to(weights.dtype)[None])[0]
        return self.model.act_embedding_table(torch.tensor(int(action)))

    @torch.no_grad()
    def causal(self, tokens: Sequence[Token]) -> tuple[torch.Tensor, Window]:
        """The second form: all tokens at once at window positions 0, 1, 2. Returns their features [tokens,
        embed] and window.
        """
        x = torch.stack([token.embedding for token in tokens])
        if not self.rotary:
            x = x + self.model.pos_emb.weight[: len(tokens)]
        future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
        keys, values = [], []
        for block in self.model.transformer.blocks:
            query, key, value = (
                project(block.ln1(x)).view(len(tokens), self.heads, self.head_dim)
                for project in (block.attn.query, block.attn.key, block.attn.value)
            )
            if self.rotary:
                query = torch.stack(
                    [self._rotate(query[i], token.position) for i, token in enumerate(tokens)]
                )
                key = torch.stack([self._rotate(key[i], token.position) for i, token in enumerate(tokens)])
            scores = torch.einsum('qhd,khd->hqk', query, key) / math.sqrt(self.head_dim)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            x = self._residual(block, x, torch.einsum('hqk,khd->qhd', weights, value).flatten(1))
            keys.append(tuple(key))
            values.append(tuple(value))
        return self.model.transformer.ln_f(x), Window(tuple(tokens), tuple(keys), tuple(values))

    def _append(self, window: Window, token: Token) -> tuple[Window, torch.Tensor]:
        """One token behind those in the window; returns the new window and the token's features [embed]."""
        x = token.embedding
        if not self.rotary:
            x = x + self.model.pos_emb.weight[len(window.tokens)]
        keys, values = [], []
        for layer, block in enumerate(self.model.transformer.blocks):
            normed = block.ln1(x)
            query, key, value = (
                project(normed).view(self.heads, self.head_dim)
                for project in (block.attn.query, block.attn.key, block.attn.value)
            )
            if self.rotary:
                query, key = self._rotate(query, token.position), self._rotate(key, token.position)
            keys.append((*window.keys[layer], key))
            values.append((*window.values[layer], value))
            scores = (torch.stack(keys[-1]) * query).sum(-1) / math.sqrt(self.head_dim)  # [tokens, heads]
            mixed = (scores.softmax(0)[..., None] * torch.stack(values[-1])).sum(0)
            x = self._residual(block, x, mixed.flatten())
        return Window((*window.tokens, token), tuple(keys), tuple(values)), self.model.transformer.ln_f(x)

    def _residual(self, block: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        attended = block.attn.proj(mixed)
        if block.gru_gating:
            x = block.gate1(x, attended)
            return block.gate2(x, block.mlp(block.ln2(x)))
        x = x + attended
        return x + block.mlp(block.ln2(x))

    def _trim(self, window: Window) -> Window:
        trimmed = window
        while len(trimmed.tokens) > self.kept:
            trimmed = self._drop_oldest_step(trimmed)
        if trimmed is not window and self.rule == 'rebuild':
            return self.causal(trimmed.tokens)[1]
        return trimmed

    def _drop_oldest_step(self, window: Window) -> Window:
        keys = [list(layer[2:]) for layer in window.keys]
        values = [list(layer[2:]) for layer in window.values]
        if not self.rotary:
            for layer, block in enumerate(self.model.transformer.blocks):
                for new in range(len(window.tokens) - 2):
                    keys[layer][new] = keys[layer][new] + self._position_change(block.attn.key, new + 2, new)
                    values[layer][new] = values[layer][new] + self._position_change(
                        block.attn.value, new + 2, new
                    )
        return Window(window.tokens[2:], tuple(map(tuple, keys)), tuple(map(tuple, values)))

    def _position_change(self, project: Any, old: int, new: int) -> torch.Tensor:
        table = self.model.pos_emb.weight
        return (project(table[new]) - project(table[old])).view(self.heads, self.head_dim)

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """[heads, head_dim] with each neighbouring pair turned by position * theta ** (-2i / head_dim)."""
        config = self.model.config
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        angle = (position % config.max_seq_len) * config.rope_theta ** (-pairs / self.head_dim)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def _value(self, out: torch.Tensor) -> torch.Tensor:
        return self.model.head_value.head_module(out[None])[0]

    def _policy(self, out: torch.Tensor) -> torch.Tensor:
        logits = self.model.head_policy.head_module(out[None])
        if isinstance(logits, dict):  # a continuous policy
            return torch.cat((logits['mu'], logits['sigma']), dim=-1)[0]
        return logits[0]
