"""Faults of a wrong cache: what it served in the place of the right keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lzero_kv.telemetry.counters import Fault
from lzero_kv.validation.histories import ComparedRow, Logits, TrueHistories
from lzero_kv.validation.oracle import Answer, Oracle, Token, TokenWindow
from lzero_kv.validation.tolerance import Tolerance

PERTURBATION = 0.05
"""Largest difference, as a part of the largest number of the truth, that still counts as the same history
perturbed. Keys and values of different histories differ by more than that in most entries."""
OFFSETS = (-2, -1, 1, 2)

Nodes = Sequence[Sequence[Answer]]
"""True nodes of a search so far, by simulation and row."""


class FaultFinder:
    """Recognition of faults in the tensors that were served.

    Args:
        oracle: the recomputation.
        world_model: the caching world model.
        histories: of all environments.
        tolerance: of rounding.
    """

    def __init__(
        self, oracle: Oracle, world_model: Any, histories: TrueHistories, tolerance: Tolerance
    ) -> None:
        self._oracle = oracle
        self._model = world_model
        self._histories = histories
        self._close = tolerance.close

    def diagnose(self, row: ComparedRow, nodes: Nodes) -> Fault:
        """The fault that accounts for what was served to a row, the most telling first."""
        if row.lost:
            return Fault.ENTRY_LOST
        kv, truth = row.kv, row.truth.served
        if kv is None or truth is None or self._close(kv, truth):
            return self._of_answers(row)
        for fault, other in self._fault_candidates(row, nodes):
            if self._close(kv, other):
                return fault
        if kv.shape == truth.shape and self._exchanged(kv, truth):
            return Fault.KEYS_AND_VALUES_EXCHANGED
        if self._one_token_off(kv, truth):
            return Fault.TOKEN_OFFSET
        if any(self._close(kv, placed) for placed in self._displaced(row)):
            return Fault.POSITION_OFFSET
        return Fault.PERTURBED if _small(kv, truth) else Fault.UNKNOWN

    def _of_answers(self, row: ComparedRow) -> Fault:
        """The fault of wrong answers to the right keys and values."""

        def same(other: Logits) -> bool:
            shared = row.answers.keys() & other.keys()
            return all(self._close(row.answers[name], other[name]) for name in shared)

        if any(same(other) for other in self._misplaced(row)):
            return Fault.POSITION_OFFSET
        small = all(_small(row.answers[name], row.truth.answers[name]) for name in row.answers)
        return Fault.PERTURBED if small else Fault.UNKNOWN

    def _fault_candidates(self, row: ComparedRow, nodes: Nodes) -> Iterator[tuple[Fault, torch.Tensor]]:
        """Keys and values ``[2 * layers, T, embed]`` of other histories that may have been served."""
        if row.kind != 'roots':  # first: the present root is the newest of the earlier ones too
            for answers in nodes:
                for other, answer in enumerate(answers):
                    fault = Fault.ANOTHER_NODE if other == row.row else Fault.OTHER_ENVIRONMENT
                    yield fault, answer.window.kv()
        if row.kind != 'reanalysis':
            for env_id, history in self._histories:
                fault = Fault.STALE_ENTRY if env_id == row.name.env_id else Fault.OTHER_ENVIRONMENT
                yield from ((fault, kv) for kv in history.earlier)

    def _exchanged(self, kv: torch.Tensor, truth: torch.Tensor) -> bool:
        """Whether the layers that differ have keys and values exchanged."""
        pairs = zip(kv.split(2), truth.split(2), strict=True)
        wrong = [(served, right) for served, right in pairs if not self._close(served, right)]
        return bool(wrong) and all(self._close(served.flip(0), right) for served, right in wrong)

    def _one_token_off(self, kv: torch.Tensor, truth: torch.Tensor) -> bool:
        """Whether the tokens in common agree when one side is moved by a token, or lacks one at an end."""
        tokens = min(kv.shape[1], truth.shape[1])
        if tokens < 2:
            return kv.shape[1] != truth.shape[1]
        if kv.shape[1] != truth.shape[1]:
            pairs = [(kv[:, :tokens], truth[:, :tokens]), (kv[:, -tokens:], truth[:, -tokens:])]
        else:
            pairs = [(kv[:, 1:], truth[:, :-1]), (kv[:, :-1], truth[:, 1:])]
        return any(self._close(a, b) for a, b in pairs)

    def _misplaced(self, row: ComparedRow) -> Iterator[Logits]:
        """Answers of the true history with its newest tokens one or two places off."""
        oracle, truth = self._oracle, row.truth
        window = oracle.empty()
        if truth.served is not None:
            window = TokenWindow.of(truth.served, truth.positions[0], oracle.heads)
        for off in OFFSETS:
            place = len(window.tokens) + off
            if not 0 <= place < self._places() - 1:
                continue
            grown, answers = window, {}
            if truth.action is not None:
                grown, out = oracle.append(grown, Token(truth.action, truth.positions[0] + off), place)
                if 'reward' in truth.answers:
                    answers['reward'] = oracle.reward(out)
                place += 1
            _, out = oracle.append(grown, Token(truth.latent, truth.positions[1] + off), place)
            yield {**answers, 'policy': oracle.policy(out), 'value': oracle.value(out)}

    def _displaced(self, row: ComparedRow) -> Iterator[torch.Tensor]:
        """Keys and values of the true history with every token one or two places off."""
        if not isinstance(row.course.base, list):
            return  # its tokens are not kept
        tokens = [*row.course.base, *(token for step in row.course.steps[:-1] for token in step)]
        tokens = tokens[-self._oracle.kept :]
        for off in OFFSETS:
            if not self._oracle.rotary and not 0 <= off <= self._places() - len(tokens):
                continue
            window = self._oracle.empty()
            for place, token in enumerate(tokens):
                moved = Token(token.embedding, token.position + off)
                window, _ = self._oracle.append(window, moved, place + off)
            yield window.kv()

    def _places(self) -> int:
        """Positions that a token can stand at."""
        return 1 << 62 if self._oracle.rotary else len(self._model.pos_emb.weight)


def _small(served: torch.Tensor, truth: torch.Tensor) -> bool:
    if served.shape != truth.shape:
        return False
    distance = (served - truth).abs()
    limit = PERTURBATION * float(truth.abs().max())
    return bool(torch.isfinite(distance).all()) and float(distance.max()) <= limit
