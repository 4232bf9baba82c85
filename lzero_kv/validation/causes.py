"""Causes of the stock cache's wrong answers, each proven: by what a slot holds, or by its step repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation.histories import Causes, HistoryName, Logits
from lzero_kv.validation.oracle import Oracle, Token, TokenWindow
from lzero_kv.validation.stock import Lookup

Close = Callable[[torch.Tensor, torch.Tensor], bool]


def served_causes(lookup: Lookup, asked: HistoryName, other_observation: bool = False) -> Causes | None:
    """Causes for which a lookup that found an entry was not served the history that it asked for.

    Args:
        lookup: of the stock cache.
        asked: the history.
        other_observation: whether the lookup was made with an observation of another environment.

    Returns:
        None when nothing proves it.
    """
    slot = lookup.slot
    if slot is None or not lookup.intact:
        return None  # the entry is not what was written for the slot's history
    if slot.history == asked:
        return slot.causes or None
    if slot.key != lookup.key:
        return frozenset({Cause.SLOT_OVERWRITTEN})
    if other_observation:
        return frozenset({Cause.OTHER_ENVIRONMENT})
    # The key is right and bit-equal, so the latent states are: nothing else is in it.
    shared = {Cause.EQUAL_LATENTS}
    if slot.history.env_id != asked.env_id:
        shared.add(Cause.OTHER_ENVIRONMENT)
    return frozenset(shared)


@dataclass(frozen=True)
class StockStep:
    """What the stock model does with one row.

    Attributes:
        kv: ``[2 * layers, T, embed]`` that it was served; None for nothing.
        action: embedding ``[embed]`` of the action that it appends; None where it takes an episode to begin.
        true_action: embedding of the action that the environment took.
        latent: ``[embed]`` of the observation token.
        zeros: tokens of zero padding in front of the row.
        positions: logical positions at which it rotates the two tokens.
        true_positions: where they belong.
        root: whether it is a root inference, in which padding counts as tokens of the history.
    """

    kv: torch.Tensor | None
    action: torch.Tensor | None
    true_action: torch.Tensor | None
    latent: torch.Tensor
    zeros: int
    positions: tuple[int, int]
    true_positions: tuple[int, int]
    root: bool


@dataclass(frozen=True)
class StepResult:
    """Answers of a step, and the keys and values ``[2 * layers, T, embed]`` that are stored.

    Attributes:
        stale: whether the window was full, and what stays without its oldest step is not what it should be.
    """

    answers: Logits
    stored: torch.Tensor
    stale: bool


class StepReplay:
    """Steps of the stock model, repeated for one row with the oracle.

    Args:
        oracle: the recomputation.
        stock: the stock world model, for its window and its position correction.
        close: whether rounding explains the difference of two tensors.
    """

    def __init__(self, oracle: Oracle, stock: Any, close: Close) -> None:
        self._oracle = oracle
        self._stock = stock
        self.close = close

    def embed_action(self, action: Any) -> torch.Tensor:
        """``[embed]`` of one action."""
        return self._oracle.embed_action(action)

    @torch.no_grad()
    def run(self, step: StockStep) -> StepResult:
        """The outcome of ``step`` with exactly the mistakes that it names."""
        oracle, answers = self._oracle, {}
        window, place = self._padded(step)
        first, second = step.positions
        if step.action is not None:
            window, out = oracle.append(window, Token(step.action, first), place)
            if not step.root:
                answers['reward'], answers['latent'] = oracle.reward(out), oracle.latent(out)
            place += 1
        window, out = oracle.append(window, Token(step.latent, second), place)
        answers['policy'], answers['value'] = oracle.policy(out), oracle.value(out)
        kv = window.kv() if step.root else window.kv()[:, step.zeros :]
        size = self._stock.context_length
        if size <= 2 or kv.shape[1] < size - 1:  # with so short a window LightZero stores nothing
            return StepResult(answers, kv, False)
        kept = kv[:, 2 : size - 1]
        stored = self._corrected(kept)
        stale = oracle.rule == 'rebuild' or not self.close(stored, oracle.moved(kept))
        return StepResult(answers, stored, stale)

    def _padded(self, step: StockStep) -> tuple[TokenWindow, int]:
        """The row with its padding, and the learned position of its next token."""
        if step.kv is None:
            return self._oracle.empty(), 0
        kv, place = step.kv, step.kv.shape[1]
        if step.zeros:
            kv = torch.cat([kv.new_zeros(kv.shape[0], step.zeros, kv.shape[2]), kv], dim=1)
            place += step.zeros if step.root else 0
        return TokenWindow.of(kv, step.positions[0], self._oracle.heads), place

    def _corrected(self, kv: torch.Tensor) -> torch.Tensor:
        """Kept tokens with the stock model's position correction, as old as it is there."""
        if self._oracle.rotary:
            return kv
        kept = kv.shape[1]
        span = (2, self._stock.context_length - 1)
        rows = [
            table[layer][span][0, :, :kept].transpose(0, 1).reshape(kept, -1)
            for layer in self._oracle.layers
            for table in (self._stock.pos_emb_diff_k, self._stock.pos_emb_diff_v)
        ]
        return kv + torch.stack(rows).to(kv)


def step_causes(step: StockStep, answers: Logits, replay: StepReplay) -> tuple[Causes | None, StepResult]:
    """Mistakes of the stock model's step that changed its answers.

    The repeated step, with all of the mistakes, must give the stock model's own answers; a mistake counts
    when the step without it gives others.

    Returns:
        The causes, None when the repeated step gives other answers; and the repeated step.
    """
    result, close = replay.run(step), replay.close

    def same(other: Logits) -> bool:
        return all(close(other[name], result.answers[name]) for name in result.answers if name in other)

    if not same(answers):
        return None, result
    mended = {}
    if step.zeros:
        mended[Cause.ZERO_PADDING] = replace(step, zeros=0)
    if step.positions != step.true_positions:
        mended[Cause.ROTARY_POSITION] = replace(step, positions=step.true_positions)
    if step.action is not None and step.true_action is not None and not close(step.action, step.true_action):
        mended[Cause.OTHER_ENVIRONMENT] = replace(step, action=step.true_action)
    causes = set()
    for cause, without in mended.items():
        other = replay.run(without)
        stored = other.stored.shape == result.stored.shape and close(other.stored, result.stored)
        if not (stored and same(other.answers)):
            causes.add(cause)
    return frozenset(causes), result
