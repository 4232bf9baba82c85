"""The old system's step, repeated for one row with the slow reference, one mistake at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lzero_kv.lightzero.validation.recompute import Answer, Recompute, Token, TokenWindow

Close = Callable[[torch.Tensor, torch.Tensor], bool]


@dataclass(frozen=True)
class HostStep:
    """What the host does with one row.

    Attributes:
        kv: ``[2 * layers, T, embed]`` that it was served; None for nothing.
        action: embedding ``[embed]`` of the action that the host appends; None where it takes an episode to
            begin.
        true_action: embedding of the action that the environment took.
        latent: ``[embed]`` of the observation token.
        zeros: tokens of zero padding in front of the row.
        zeros_count: whether the padding counts as tokens of the history (root inference) or not.
        positions: logical positions at which the host rotates the two tokens.
        true_positions: where they belong.
        root: whether it is a root inference.
    """

    kv: torch.Tensor | None
    action: torch.Tensor | None
    true_action: torch.Tensor | None
    latent: torch.Tensor
    zeros: int
    zeros_count: bool
    positions: tuple[int, int]
    true_positions: tuple[int, int]
    root: bool

    def without_padding(self) -> HostStep:
        """The same step, alone in its batch."""
        return replace(self, zeros=0)

    def with_true_action(self) -> HostStep:
        """The same step with the environment's own action."""
        return replace(self, action=self.true_action)

    def at_true_positions(self) -> HostStep:
        """The same step, its tokens rotated to where they belong."""
        return replace(self, positions=self.true_positions)


@dataclass(frozen=True)
class Enacted:
    """What a step gives: its answers, and the keys and values ``[2 * layers, T, embed]`` that are stored."""

    answers: dict[str, torch.Tensor]
    stored: torch.Tensor
    stale: bool
    """Whether the window was full, and what stays without its oldest step is not what it should be."""


class Enactment:
    """Repeats steps of ``twin`` with the modules that it shares.

    Args:
        oracle: the reference.
        twin: the host's world model, for its window and its position correction.
        close: whether rounding explains the difference of two tensors.
    """

    def __init__(self, oracle: Recompute, twin: Any, close: Close) -> None:
        self._oracle = oracle
        self._twin = twin
        self._close = close

    def embed_action(self, action: Any) -> torch.Tensor:
        """``[embed]`` of one action."""
        return self._oracle.embed_action(action)

    @torch.no_grad()
    def of(self, step: HostStep) -> Enacted:
        """The outcome of ``step`` with exactly the mistakes that it names."""
        window, own = self._padded(step)
        answers: dict[str, torch.Tensor] = {}
        first, second = step.positions
        if step.action is not None:
            window, out = self._oracle.append(window, Token(step.action, first), own)
            if not step.root:
                answers['reward'], answers['latent'] = self._oracle.reward(out), self._oracle.latent(out)
            own += 1
        window, out = self._oracle.append(window, Token(step.latent, second), own)
        answers['policy'], answers['value'] = self._oracle.policy(out), self._oracle.value(out)
        kv = window.kv() if step.zeros_count else window.kv()[:, step.zeros :]
        size = self._twin.context_length
        if size <= 2 or kv.shape[1] < size - 1:  # with so short a window the host stores nothing
            return Enacted(answers, kv, False)
        kept = kv[:, 2 : size - 1]
        stored = self._corrected(kept)
        right = None if self._oracle.rule == 'rebuild' else self._oracle.moved(kept)
        return Enacted(answers, stored, right is None or not self._close(stored, right))

    def _padded(self, step: HostStep) -> tuple[TokenWindow, int]:
        """The row with its padding, and the learned position of its next token."""
        layers = len(self._oracle.layers)
        if step.kv is None:
            nothing = ((),) * layers
            return TokenWindow((), nothing, nothing), 0
        kv = step.kv
        if step.zeros:
            kv = torch.cat([kv.new_zeros(kv.shape[0], step.zeros, kv.shape[2]), kv], dim=1)
        place = kv.shape[1] if step.zeros_count else kv.shape[1] - step.zeros
        return TokenWindow.of(kv, step.positions[0], self._oracle.heads), place

    def _corrected(self, kv: torch.Tensor) -> torch.Tensor:
        """Kept tokens with the host's position correction, as old as the host's is."""
        if self._oracle.rotary:
            return kv
        kept = kv.shape[1]
        span = (2, self._twin.context_length - 1)
        rows = [
            table[layer][span][0, :, :kept].transpose(0, 1).reshape(kept, -1)
            for layer in self._oracle.layers
            for table in (self._twin.pos_emb_diff_k, self._twin.pos_emb_diff_v)
        ]
        return kv + torch.stack(rows).to(kv)


def answers_of(answer: Answer) -> dict[str, torch.Tensor]:
    """The logits of an answer by name; those that a root has not are left out."""
    named = {
        'policy': answer.policy,
        'value': answer.value,
        'reward': answer.reward,
        'latent': answer.latent,
    }
    return {name: logits for name, logits in named.items() if logits is not None}
