"""How far a subject's answers are from those of the full cache on the same observations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from studies.budget.plays import Answers

FRAMES = ('decisive', 'all')
"""Frames that a measure is averaged over: between the doors while none is taken, or all."""


def policy_kl(full: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of `other` from `full` in nats, both logits [..., actions]; [...]."""
    log_full, log_other = _log_softmax(full), _log_softmax(other)
    return (np.exp(log_full) * (log_full - log_other)).sum(axis=-1)


def visit_kl(full: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The same for visit counts [..., actions], one visit added to each, so that none is infinite."""
    return policy_kl(np.log(full + 1.0), np.log(other + 1.0))


def agreement(full: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the most visited action, of equal ones the first, is the same: 0 or 1, [...]."""
    return (full.argmax(axis=-1) == other.argmax(axis=-1)).astype(np.float64)


def compare(full: Answers, other: Answers) -> dict[str, np.ndarray]:
    """Every measure, float64 [T, B]; what is said along the steps after the root is averaged over them."""
    divergence = policy_kl(full.policy, other.policy)
    value = np.abs(full.value - other.value)
    distance = np.linalg.norm(full.latent.astype(np.float64) - other.latent, axis=-1)
    return {
        'policy_kl_root': divergence[..., 0],
        'policy_kl_nodes': divergence[..., 1:].mean(axis=-1),
        'value_root': value[..., 0],
        'value_nodes': value[..., 1:].mean(axis=-1),
        'reward_nodes': np.abs(full.reward - other.reward).mean(axis=-1),
        'latent_1': distance[..., 0],
        f'latent_{distance.shape[-1]}': distance[..., -1],
        'agreement': agreement(full.visits, other.visits),
        'visit_kl': visit_kl(full.visits, other.visits),
    }


def averages(measures: Mapping[str, np.ndarray], decisive: np.ndarray) -> dict[str, float]:
    """Means of measures [T, B], named 'frames/measure', over the frames of each kind in FRAMES.

    decisive: bool [T, B]. A mean over no frame is nan.
    """
    chosen = dict(zip(FRAMES, (decisive, np.ones_like(decisive)), strict=True))
    return {
        f'{frames}/{name}': float(values[mask].mean()) if mask.any() else float('nan')
        for frames, mask in chosen.items()
        for name, values in measures.items()
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; 0 for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Numbers of the points (cost, loss) that no other point beats: none is at most as large in both and
    smaller in one. In the order of cost; of equal points all stay."""
    points = list(points)
    front: list[int] = []
    least = float('inf')
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < least or (front and points[index] == points[front[-1]]):
            front.append(index)
            least = points[index][1]
    return front


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
