"""What a manager that is off has served: patterns recognised in the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from lzero_kv.validation.causes import Fault
from lzero_kv.validation.deviation import Tolerance

PERTURBATION = 0.05
"""Largest difference, as a part of the largest number of the truth, that still counts as the same history
perturbed. Keys and values of different histories differ by more than that in most entries."""


@dataclass(frozen=True)
class Candidate:
    """Another history that may have been served: its keys and values ``[2 * layers, T, embed]``."""

    fault: Fault
    kv: torch.Tensor


@dataclass(frozen=True)
class Suspect:
    """A row whose manager is off.

    Attributes:
        kv: what the manager served, ``[2 * layers, T, embed]``; None where nothing was asked for.
        truth: what it should have been.
        answers, true_answers: logits by name.
        misplaced: answers of the true history, its newest tokens at positions that are off; empty when not
            tried.
        candidates: other histories that may have been served.
    """

    kv: torch.Tensor | None
    truth: torch.Tensor | None
    answers: dict[str, torch.Tensor]
    true_answers: dict[str, torch.Tensor]
    misplaced: Callable[[], Iterable[dict[str, torch.Tensor]]] = tuple
    displaced: Callable[[], Iterable[torch.Tensor]] = tuple
    candidates: list[Candidate] = field(default_factory=list)


def diagnose(suspect: Suspect, tolerance: Tolerance) -> Fault:
    """The pattern that accounts for what was served, the most telling first."""
    kv, truth = suspect.kv, suspect.truth
    if kv is None or truth is None or tolerance.close(kv, truth):
        return _of_answers(suspect, tolerance)
    for candidate in suspect.candidates:
        if tolerance.close(kv, candidate.kv):
            return candidate.fault
    if _exchanged(kv, truth, tolerance):
        return Fault.KEYS_AND_VALUES_EXCHANGED
    if _one_token_off(kv, truth, tolerance):
        return Fault.TOKEN_OFFSET
    if any(tolerance.close(kv, placed) for placed in suspect.displaced()):
        return Fault.POSITION_OFFSET
    if kv.shape == truth.shape and _small((kv - truth).abs(), truth):
        return Fault.PERTURBED
    return Fault.UNKNOWN


def _of_answers(suspect: Suspect, tolerance: Tolerance) -> Fault:
    def same(other: dict[str, torch.Tensor]) -> bool:
        shared = suspect.answers.keys() & other.keys()
        return all(tolerance.close(suspect.answers[name], other[name]) for name in shared)

    if any(same(other) for other in suspect.misplaced()):
        return Fault.POSITION_OFFSET
    pairs = [(suspect.answers[name], suspect.true_answers[name]) for name in suspect.answers]
    if all(a.shape == b.shape and _small((a - b).abs(), b) for a, b in pairs):
        return Fault.PERTURBED
    return Fault.UNKNOWN


def _exchanged(kv: torch.Tensor, truth: torch.Tensor, tolerance: Tolerance) -> bool:
    if kv.shape != truth.shape:
        return False
    off = [layer for layer in range(len(kv) // 2) if not _layer_close(kv, truth, layer, layer, tolerance)]
    return bool(off) and all(
        tolerance.close(kv[2 * layer], truth[2 * layer + 1])
        and tolerance.close(kv[2 * layer + 1], truth[2 * layer])
        for layer in off
    )


def _layer_close(kv: torch.Tensor, truth: torch.Tensor, one: int, other: int, tolerance: Tolerance) -> bool:
    return tolerance.close(kv[2 * one : 2 * one + 2], truth[2 * other : 2 * other + 2])


def _one_token_off(kv: torch.Tensor, truth: torch.Tensor, tolerance: Tolerance) -> bool:
    """Whether the tokens in common agree when one side is moved by a token, or lacks one at an end."""
    tokens = min(kv.shape[1], truth.shape[1])
    if tokens < 2:
        return kv.shape[1] != truth.shape[1]
    pairs = [(kv[:, 1:], truth[:, :-1]), (kv[:, :-1], truth[:, 1:])]
    if kv.shape[1] != truth.shape[1]:
        pairs = [(kv[:, :tokens], truth[:, :tokens]), (kv[:, -tokens:], truth[:, -tokens:])]
    return any(tolerance.close(a, b) for a, b in pairs if a.shape == b.shape)


def _small(distance: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool(torch.isfinite(distance).all()) and float(distance.max()) <= PERTURBATION * float(
        truth.abs().max()
    )
