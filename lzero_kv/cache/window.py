"""The sliding window over a history of tokens: how long it gets, and what leaves it.

A step of a world model is two tokens, an action and an observation. A history starts with one observation and
grows by whole steps, so its length is always odd. ``kept`` tokens survive a step; ``kept + 2`` are in flight
while the next step is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKENS_PER_STEP = 2


@dataclass(frozen=True)
class Window:
    """The window of a transformer world model with ``context_length`` tokens (two per step).

    Args:
        context_length: even number of tokens, at least 2. LightZero drops the oldest step as soon as
            ``context_length - 1`` tokens are reached, which leaves ``context_length - 3``; a context length
            of 2 keeps the newest observation alone.

    Raises:
        ValueError: the context length is odd or smaller than one step.
    """

    context_length: int

    def __post_init__(self) -> None:
        if self.context_length < TOKENS_PER_STEP or self.context_length % TOKENS_PER_STEP:
            raise ValueError(
                f'expected an even context_length of at least {TOKENS_PER_STEP} tokens (two per step), '
                f'got {self.context_length}; write context_length=2 * infer_context_length'
            )

    @property
    def kept(self) -> int:
        """Tokens that a stored history holds at most."""
        return max(1, self.context_length - 3)

    @property
    def in_flight(self) -> int:
        """Tokens that attention sees at most: the kept ones and the step that is being computed."""
        return self.kept + TOKENS_PER_STEP

    @property
    def observations(self) -> int:
        """Observations among the kept tokens of a full window."""
        return (self.kept + 1) // TOKENS_PER_STEP

    def advance(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is left of histories of ``lengths`` tokens (int64 ``[B]``, the new step included).

        Returns:
            The lengths that are kept (int64 ``[B]``) and which histories lost their oldest step (bool
            ``[B]``).
        """
        return np.minimum(lengths, self.kept), lengths > self.kept
