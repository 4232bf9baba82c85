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

    def copy(self) -> RootContext:
        """A context of its own with the same contents."""
        return RootContext(
            self.observations.copy(),
            self.actions.copy(),
            self.digest,
            self.next_position,
            self.tokens.copy(),
        )


class RootContexts:
    """The newest contexts of every environment in the middle of an episode.

    Args:
        observations: how many observations a full window holds.
        roots: contexts kept for each environment. With more than one, a caller may go on from an earlier
            root of the same episode.
    """

    def __init__(self, observations: int, roots: int) -> None:
        self._observations = observations
        self._roots = roots
        self._contexts: dict[int, list[RootContext]] = {}

    def get(self, env_id: int, digest: int) -> RootContext | None:
        """The newest context of an environment whose newest observation is the one with ``digest``."""
        for context in reversed(self._contexts.get(env_id, [])):
            if context.digest == digest:
                return context
        return None

    def start(self, env_id: int, observation: torch.Tensor, digest: int, next_position: int) -> RootContext:
        """Begin an environment's episode with one observation."""
        context = RootContext(
            deque([observation], maxlen=self._observations),
            deque(maxlen=self._observations - 1),
            digest,
            next_position,
            deque(maxlen=2 * self._observations - 1),
        )
        self._contexts[env_id] = [context]
        return context

    def extend(
        self, env_id: int, before: int, action: Any, observation: torch.Tensor, digest: int
    ) -> RootContext:
        """Append one step to the context with the digest ``before``; the oldest step leaves a full window."""
        context = self.get(env_id, before)
        if context is None:
            raise KeyError(f'environment {env_id} has no root with digest {before}')
        if self._roots > 1:
            context = context.copy()
            self._contexts[env_id] = [*self._contexts[env_id], context][-self._roots :]
        context.actions.append(action)
        context.observations.append(observation)
        context.digest = digest
        context.next_position += 2
        return context

    def forget_tokens(self) -> None:
        """Drop all embeddings: the weights that made them changed. Raw observations and actions stay."""
        for contexts in self._contexts.values():
            for context in contexts:
                context.tokens.clear()

    def discard(self, env_id: int) -> None:
        """Forget an environment whose episode ended."""
        self._contexts.pop(env_id, None)
