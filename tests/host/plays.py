"""Compares two plays of the same episodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .episodes import Root

FLOAT64_TOLERANCE = 1e-9
"""Largest difference of a logit in float64 that another batch or another order of sums explains."""


def of_environment(roots: Iterable[Root], env: int) -> list[Root]:
    """The roots of one environment, in order."""
    return [root for root in roots if root.env == env]


def assert_same_play(
    roots: Sequence[Root], expected: Sequence[Root], tolerance: float = FLOAT64_TOLERANCE
) -> float:
    """Both plays saw and did the same, searched the same trees, and got the same answers; the largest
    difference."""
    largest = 0.0
    for root, other in zip(roots, expected, strict=True):
        assert torch.equal(root.observations[-1], other.observations[-1]) and root.step == other.step
        assert np.array_equal(root.action, other.action)
        assert root.visits == other.visits
        differences = [
            np.abs(root.policy - other.policy).max(),
            abs(root.searched_value - other.searched_value),
        ]
        for node, twin in zip(root.nodes, other.nodes, strict=True):
            assert node.parent == twin.parent
            differences += [
                np.abs(getattr(node, name) - getattr(twin, name)).max()
                for name in ('action', 'value', 'reward', 'policy', 'latent')
            ]
        largest = max(largest, *differences)
        assert largest <= tolerance, f'environment {root.env}, step {root.step}: difference {largest:.3g}'
    return largest
