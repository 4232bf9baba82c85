"""Reference answers of the world model for a node, recomputed from the node's own history.

No batch, no cache, no padding: one token after another through the host's own modules, with every window
rule spelled out. Slow and obvious on purpose; tests and validation compare inference with it.

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
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lzero_kv.config import Precision, option_of
from lzero_kv.lightzero.host import feed_forward, policy_control
from lzero_kv.lightzero.inference.heads import predict_policy_value, predict_reward_latent
from lzero_kv.lightzero.inference.weights import InferenceWeights


@dataclass(frozen=True)
class Token:
    """One token of a history."""

    embedding: torch.Tensor
    """[embed], before any position is added."""
    position: int
    """Logical position in the episode."""


@dataclass(frozen=True)
class TokenWindow:
    """Tokens in sight, and their keys and values as they stand now."""

    tokens: tuple[Token, ...]
    keys: tuple[tuple[torch.Tensor, ...], ...] = field(repr=False)
    """[layers][tokens], each [heads, head_dim]."""
    values: tuple[tuple[torch.Tensor, ...], ...] = field(repr=False)

    @property
    def next_position(self) -> int:
        """Logical position of the token that comes next."""
        return self.tokens[-1].position + 1

    def kv(self) -> torch.Tensor:
        """Keys and values as ``[2 * layers, tokens, embed]``: k_0, v_0, k_1, v_1, ..."""
        pairs = zip(self.keys, self.values, strict=True)
        return torch.stack([torch.stack(block).flatten(1) for pair in pairs for block in pair])

    @classmethod
    def of(cls, kv: torch.Tensor, next_position: int, heads: int) -> TokenWindow:
        """A window with these keys and values (``[2 * layers, tokens, embed]``) and unknown tokens."""
        blocks = kv.unflatten(-1, (heads, -1))
        unknown = kv.new_empty(0)
        tokens = tuple(Token(unknown, next_position - kv.shape[1] + i) for i in range(kv.shape[1]))
        return cls(tokens, tuple(map(tuple, blocks[0::2])), tuple(map(tuple, blocks[1::2])))


@dataclass(frozen=True)
class Answer:
    """One node: its window after the step, and the logits of its two tokens, each without a batch axis."""

    window: TokenWindow
    value: torch.Tensor
    policy: torch.Tensor
    reward: torch.Tensor | None = None
    """None at a root, like ``latent``."""
    latent: torch.Tensor | None = None
    """The latent state [embed] predicted from the action token."""

    @property
    def logits(self) -> dict[str, torch.Tensor]:
        """The answers by name; those that a root has not are left out."""
        named = {name: getattr(self, name) for name in ('policy', 'value', 'reward', 'latent')}
        return {name: logits for name, logits in named.items() if logits is not None}


class Oracle:
    """Recomputation of ``world_model``'s answers for whole histories; reads its weights anew at every call.

    Args:
        world_model: the host's world model, or anything with its modules and configuration.
        window: ``'shift'`` or ``'rebuild'``, see above.

    Raises:
        ValueError: the window has another name.
    """

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

    def empty(self) -> TokenWindow:
        """A window without tokens."""
        nothing = ((),) * len(self.layers)
        return TokenWindow((), nothing, nothing)

    @torch.no_grad()
    def begin(self, token: Token) -> Answer:
        """The root whose history is one observation."""
        window, out = self.append(self.empty(), token)
        return Answer(window, self.value(out), self.policy(out))

    @torch.no_grad()
    def step(self, window: TokenWindow, action: Token, observation: Token) -> Answer:
        """The node that a window becomes with an action token and an observation token (or latent state)."""
        window, out = self.append(window, action)
        reward, predicted = self.reward(out), self.latent(out)
        window, out = self.append(window, observation)
        return Answer(self._trim(window), self.value(out), self.policy(out), reward, predicted)

    def encode(self, observation: torch.Tensor) -> torch.Tensor:
        """[embed] of one raw observation."""
        return self.model.tokenizer.encode_to_obs_embeddings(observation[None]).reshape(-1)

    def embed_action(self, action: Any) -> torch.Tensor:
        """[embed] of one action: a number, or [action dimensions] when continuous."""
        weight = next(self.model.act_embedding_table.parameters())
        if self.model.continuous_action_space:
            # The host turns continuous actions to torch's default dtype before embedding them.
            return self.model.act_embedding_table(torch.as_tensor(action).to(weight)[None])[0]
        return self.model.act_embedding_table(torch.tensor(int(action), device=weight.device))

    @torch.no_grad()
    def causal(self, tokens: Sequence[Token]) -> tuple[torch.Tensor, TokenWindow]:
        """Features [tokens, embed] and window of all tokens at once at window positions 0, 1, 2: the second
        form.
        """
        x = torch.stack([token.embedding for token in tokens])
        if not self.rotary:
            x = x + self.model.pos_emb.weight[: len(tokens)]
        future = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=x.device).triu(1)
        keys, values = [], []
        for block in self.blocks:
            query, key, value = self._projected(block, x)
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
        return self.model.transformer.ln_f(x), TokenWindow(tuple(tokens), tuple(keys), tuple(values))

    @torch.no_grad()
    def append(
        self, window: TokenWindow, token: Token, place: int | None = None
    ) -> tuple[TokenWindow, torch.Tensor]:
        """The window with one token more, and the token's features [embed].

        ``place`` is the learned position, where it is not the number of tokens before it.
        """
        x = token.embedding
        if not self.rotary:
            x = x + self.model.pos_emb.weight[len(window.tokens) if place is None else place]
        keys, values = [], []
        for layer, block in enumerate(self.blocks):
            query, key, value = self._projected(block, x)
            if self.rotary:
                query, key = self._rotate(query, token.position), self._rotate(key, token.position)
            keys.append((*window.keys[layer], key))
            values.append((*window.values[layer], value))
            scores = (torch.stack(keys[-1]) * query).sum(-1) / math.sqrt(self.head_dim)  # [tokens, heads]
            mixed = (scores.softmax(0)[..., None] * torch.stack(values[-1])).sum(0)
            x = self._residual(block, x, mixed.flatten())
        grown = TokenWindow((*window.tokens, token), tuple(keys), tuple(values))
        return grown, self.model.transformer.ln_f(x)

    def value(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [support] at an observation token's features [embed]."""
        return self.model.head_value.head_module(features[None])[0]

    def policy(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [actions] (continuous: mean and deviation) at an observation token's features [embed]."""
        logits = self.model.head_policy.head_module(features[None])
        if isinstance(logits, dict):
            logits = torch.cat((logits['mu'], logits['sigma']), dim=-1)
        control = policy_control(self.model)
        return logits[0] if control is None else control(logits)[0]

    def reward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [support] at an action token's features [embed]."""
        return self.model.head_rewards.head_module(features[None])[0]

    def latent(self, features: torch.Tensor) -> torch.Tensor:
        """The predicted next latent state [embed] at an action token's features [embed]."""
        return self.model.head_observations.head_module(features[None])[0]

    @property
    def blocks(self) -> Sequence[Any]:
        """Of the transformer."""
        return self.model.transformer.blocks

    def _projected(self, block: Any, x: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value, each [..., heads, head_dim], of [..., embed]."""
        normed = block.ln1(x)
        projections = block.attn.query, block.attn.key, block.attn.value
        return [project(normed).unflatten(-1, (self.heads, self.head_dim)) for project in projections]

    def _residual(self, block: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        attended = block.attn.proj(mixed)
        if block.gru_gating:
            x = block.gate1(x, attended)
            return block.gate2(x, self._feed_forward(block, x))
        x = x + attended
        return x + self._feed_forward(block, x)

    @staticmethod
    def _feed_forward(block: Any, x: torch.Tensor) -> torch.Tensor:
        return feed_forward(block)(block.ln2(x).reshape(-1, x.shape[-1])).reshape(x.shape)

    def moved(self, kv: torch.Tensor) -> torch.Tensor:
        """Kept keys and values ``[2 * layers, tokens, embed]`` after their window dropped a step, by the rule
        of 'shift'.
        """
        if self.rotary:
            return kv
        places = self.model.pos_emb.weight[: kv.shape[1] + 2]
        blocks = self.model.transformer.blocks
        rows = [project(places) for block in blocks for project in (block.attn.key, block.attn.value)]
        return kv + torch.stack([of_places[:-2] - of_places[2:] for of_places in rows])

    def _trim(self, window: TokenWindow) -> TokenWindow:
        trimmed = window
        while len(trimmed.tokens) > self.kept:
            trimmed = self._drop_oldest_step(trimmed)
        if trimmed is not window and self.rule == 'rebuild':
            return self.causal(trimmed.tokens)[1]
        return trimmed

    def _drop_oldest_step(self, window: TokenWindow) -> TokenWindow:
        moved = TokenWindow.of(self.moved(window.kv()[:, 2:]), window.next_position, self.heads)
        return replace(moved, tokens=window.tokens[2:])

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """[heads, head_dim] with each neighbouring pair turned by position * theta ** (-2i / head_dim)."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64)
        angle = position * self.model.config.rope_theta ** (-pairs / self.head_dim)
        cos, sin = angle.cos().to(x), angle.sin().to(x)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class ReducedOracle(Oracle):
    """Recomputation with the products of inference in a reduced ``precision``, one token after another.

    What rounding the weights costs is not the cache's: the truth of a served answer is what these products
    make of its own history, without batch and cache.
    """

    def __init__(self, world_model: Any, window: str, precision: Precision) -> None:
        super().__init__(world_model, window)
        self._precision: Precision = precision
        self._made: InferenceWeights | None = None

    @property
    def weights(self) -> InferenceWeights:
        """Transformer and heads by the weights of now."""
        if self._made is None or self._made.stale():
            self._made = InferenceWeights(self.model, precision=self._precision)
        return self._made

    @property
    def blocks(self) -> Sequence[Any]:
        """Of the transformer."""
        return self.weights.blocks

    def value(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [support] at an observation token's features [embed]."""
        return predict_policy_value(self.weights, features[None]).value[0, 0]

    def policy(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [actions] (continuous: mean and deviation) at an observation token's features [embed]."""
        return predict_policy_value(self.weights, features[None]).policy[0, 0]

    def reward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [support] at an action token's features [embed]."""
        return predict_reward_latent(self.weights, features[None])[0][0]

    def latent(self, features: torch.Tensor) -> torch.Tensor:
        """The predicted next latent state [embed] at an action token's features [embed]."""
        return predict_reward_latent(self.weights, features[None])[1][0]

    def _projected(self, block: Any, x: torch.Tensor) -> list[torch.Tensor]:
        rows = block.qkv(block.norm1(x.reshape(-1, x.shape[-1]))).reshape(*x.shape[:-1], -1)
        return [part.unflatten(-1, (self.heads, self.head_dim)) for part in rows.chunk(3, -1)]

    def _residual(self, block: Any, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        flat = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, mixed))
        return block.finish(*flat).reshape(x.shape)


def oracle_of(world_model: Any, window: str) -> Oracle:
    """The recomputation for a world model with the precision that its configuration asks for."""
    precision = option_of(world_model.config, 'precision')
    if precision == 'float32':
        return Oracle(world_model, window)
    return ReducedOracle(world_model, window, precision)
