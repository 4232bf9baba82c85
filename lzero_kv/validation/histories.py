"""True histories of all environments, kept apart from those of inference, and the rows that are compared."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lzero_kv.cache.keys import digest_rows
from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation.oracle import Answer, Oracle, Token, TokenWindow

Logits = dict[str, torch.Tensor]
"""Answers by name: ``policy``, ``value``, ``reward``, ``latent``."""
Causes = frozenset[Cause]
REPLAYED = 32
"""Steps of a shifted window that are recomputed from a saved finding at most; episodes may have thousands."""
REMEMBERED = 4
"""Earlier roots of an environment among which a stale entry is recognised."""


class HistoryName(NamedTuple):
    """Which history an entry is of."""

    env_id: int
    """Number of the environment in the pools; in reanalysis, the row of the batch."""
    root: int
    """Number of the root inference, counted for all environments together."""
    node: int
    """Simulation that made the node; 0: the root itself."""

    def __str__(self) -> str:
        node = f', node {self.node}' if self.node else ''
        return f'environment {self.env_id}, root {self.root}{node}'


@dataclass(frozen=True)
class Course:
    """Way to a window: where it began, then steps of an action and an observation token.

    Attributes:
        base: tokens, computed in one causal pass; or a window as it stood, where the way there is too long to
            keep.
        steps: what came after.
    """

    base: list[Token] | TokenWindow
    steps: list[tuple[Token, Token]]

    def then(self, step: tuple[Token, Token]) -> Course:
        """One step more."""
        return Course(self.base, [*self.steps, step])


@dataclass
class TrueHistory:
    """One environment's episode.

    Attributes:
        observations: raw observations of the window, newest last.
        actions: the actions between them, one fewer.
        digest: digest of the newest observation.
        next_position: logical position of the next token.
        tokens: the same window, embedded; empty when the weights changed since.
        window: keys and values as they stand, where what they are depends on the steps that led to them;
            None when they follow from ``tokens`` alone.
        course: how ``window`` came about.
        name: the root as it was last stored; None before.
        stored: whether its keys and values are in the pools, going by the events.
        earlier: keys and values of earlier roots, newest last.
    """

    observations: deque[torch.Tensor]
    actions: deque[Any]
    digest: int
    next_position: int
    tokens: deque[Token]
    window: TokenWindow | None = None
    course: Course = field(default_factory=lambda: Course([], []))
    name: HistoryName | None = None
    stored: bool = False
    earlier: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=REMEMBERED))


class TrueHistories:
    """The :class:`TrueHistory` of every environment in the middle of an episode.

    Args:
        oracle: computes keys and values from tokens.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._observations = (oracle.kept + 1) // 2
        self._histories: dict[int, TrueHistory] = {}

    def __iter__(self) -> Any:
        return iter(self._histories.items())

    def begin(self, env_id: int, observation: torch.Tensor, position: int) -> TrueHistory:
        """A new history that begins with ``observation`` at a logical position."""
        history = self._histories[env_id] = TrueHistory(
            deque([observation], maxlen=self._observations),
            deque(maxlen=self._observations - 1),
            digest_rows(observation[None])[0],
            position + 1,
            deque(maxlen=2 * self._observations - 1),
        )
        return history

    def continued(self, env_id: int, last_observation: torch.Tensor, timestep: int) -> TrueHistory:
        """The history that ends with ``last_observation``: the environment's, or that observation alone."""
        history = self._histories.get(env_id)
        if history is None or history.digest != digest_rows(last_observation[None])[0]:
            history = self.begin(env_id, last_observation, 2 * max(timestep - 1, 0))
        return history

    def window(self, history: TrueHistory) -> TokenWindow:
        """Keys and values of a history as they stand now, computed from its tokens where not kept."""
        if history.window is not None:
            return history.window
        tokens = list(self.tokens(history))
        history.course = Course(tokens, [])
        return self._oracle.causal(tokens)[1]

    def tokens(self, history: TrueHistory) -> Sequence[Token]:
        """The tokens of a history's window, embedded by the weights of now."""
        if not history.tokens:
            first = history.next_position - 2 * len(history.observations) + 1
            for step, observation in enumerate(history.observations):
                if step:
                    action = self._oracle.embed_action(history.actions[step - 1])
                    history.tokens.append(Token(action, first + 2 * step - 1))
                history.tokens.append(Token(self._oracle.encode(observation), first + 2 * step))
        return history.tokens

    def extend(self, env_id: int, action: Any, observation: torch.Tensor) -> tuple[Token, Token]:
        """Append one step and return its two tokens."""
        history = self._histories[env_id]
        self.tokens(history)
        first = history.next_position
        own = (
            Token(self._oracle.embed_action(action), first),
            Token(self._oracle.encode(observation), first + 1),
        )
        history.actions.append(action)
        history.observations.append(observation)
        history.tokens.extend(own)
        history.digest = digest_rows(observation[None])[0]
        history.next_position += 2
        return own

    def store(self, env_id: int, answer: Answer, name: HistoryName, course: Course) -> None:
        """Note the root that was stored, and the way to it."""
        history = self._histories[env_id]
        history.course = course
        if self._oracle.rule == 'shift':
            history.window = answer.window
            if len(course.steps) >= REPLAYED:
                history.course = Course(answer.window, [])
        history.name, history.stored = name, True
        history.earlier.append(answer.window.kv())

    def forget_keys_and_values(self) -> None:
        """Drop keys and values: the pools were emptied, and the weights may be others."""
        for history in self._histories.values():
            history.window, history.stored = None, False
            history.tokens.clear()

    def discard(self, env_ids: Sequence[int]) -> None:
        """Forget environments whose episodes ended."""
        for env_id in env_ids:
            self._histories.pop(env_id, None)

    def clear(self) -> None:
        """Forget all environments."""
        self._histories.clear()


@dataclass
class StockRow:
    """The stock cache's part of one compared row.

    Attributes:
        key: what it looked for, or why it looked for nothing.
        kv: ``[2 * layers, T, embed]`` that it was served; None for nothing.
        answers: logits by name, where the stock model ran.
        exact: both caches hold what was once stored for this very history, so they must be equal to the last
            bit.
        explain: the causes that are proven; None when the difference is not accounted for.
        moved: its answers, computed when asked for where its model did not run.
    """

    key: str
    kv: torch.Tensor | None
    answers: Logits = field(default_factory=dict)
    exact: bool = False
    explain: Callable[[], Causes | None] = lambda: None
    moved: Callable[[], Logits] = dict


@dataclass(frozen=True)
class Truth:
    """What a row must be served and must answer.

    Attributes:
        served: ``[2 * layers, T, embed]`` before the step; None where an episode begins.
        stored: the same after the step.
        answers: logits by name.
        positions: logical positions of the two tokens.
        action: embedding ``[embed]`` of the action; None where an episode begins.
        latent: ``[embed]`` of the observation token.
    """

    served: torch.Tensor | None
    stored: torch.Tensor
    answers: Logits
    positions: tuple[int, int]
    action: torch.Tensor | None
    latent: torch.Tensor


@dataclass(frozen=True)
class ComparedRow:
    """One row with all three answers.

    Attributes:
        kind: ``'roots'``, ``'nodes'`` or ``'reanalysis'``.
        name: the history that the row was to be served; at root inference, the new root.
        row: row of the batch.
        node: number of the parent; None at root inference.
        key: the cache's name of what was served.
        kv, answers: the cache's.
        truth: the recomputation's.
        stock: the stock cache's; None where it has none.
        lost: whether the cache should have had the entry and had not.
        course: how the true history came about.
    """

    kind: str
    name: HistoryName
    row: int
    node: int | None
    key: str
    kv: torch.Tensor | None
    answers: Logits
    truth: Truth
    stock: StockRow | None
    lost: bool
    course: Course
