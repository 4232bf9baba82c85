"""What each environment has seen: the raw observations and actions of its window, from which its root can be
computed again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class RootContext:
    """The window of one environment's episode, newest last.

    Attributes:
        observations: raw observations, each ``[...]`` as the host gave it; as many as a full window holds.
        actions: the actions between them, one fewer.
        digest: digest of the newest observation; names the root whose keys and values are stored.
        next_position: logical position of the token that comes next.
        tokens: raw embeddings of the same window, alternating observation and action, each ``[embed]``; empty
            when the weights changed since they were computed.
    """

    observations: deque[torch.Tensor]
    actions: deque[Any]
    digest: int
    next_position: int
    tokens: deque[torch.Tensor] = field(default_factory=deque)


class RootContexts:
    """The :class:`RootContext` of every environment in the middle of an episode.

    Args:
        observations: how many observations a full window holds.
    """

    def __init__(self, observations: int) -> None:
        self._observations = observations
        self._contexts: dict[int, RootContext] = {}

    def get(self, env_id: int, digest: int) -> RootContext | None:
        """The context of an environment, if its newest observation is the one with ``digest``."""
        context = self._contexts.get(env_id)
        return context if context is not None and context.digest == digest else None

    def start(self, env_id: int, observation: torch.Tensor, digest: int, next_position: int) -> RootContext:
        """Begin an environment's window with one observation."""
        context = RootContext(
            deque([observation], maxlen=self._observations),
            deque(maxlen=self._observations - 1),
            digest,
            next_position,
            deque(maxlen=2 * self._observations - 1),
        )
        self._contexts[env_id] = context
        return context

    def extend(self, env_id: int, action: Any, observation: torch.Tensor, digest: int) -> RootContext:
        """Append one step; the oldest leaves a full window."""
        context = self._contexts[env_id]
        context.actions.append(action)
        context.observations.append(observation)
        context.digest = digest
        context.next_position += 2
        return context

    def forget_tokens(self) -> None:
        """Drop all embeddings: the weights that made them changed. Raw observations and actions stay."""
        for context in self._contexts.values():
            context.tokens.clear()

    def discard(self, env_id: int) -> None:
        """Forget an environment whose episode ended."""
        self._contexts.pop(env_id, None)

    def clear(self) -> None:
        """Forget every environment."""
        self._contexts.clear()
