"""Compares two plays of the same episodes, and lets one fail before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from testing.episodes import Episodes, Root
from testing.models import world_model_of

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


def fail_with_nan(policy: Any, identities: Sequence[int]) -> None:
    """Let a search of the policy fail on nan weights, and mend them again."""
    model = world_model_of(policy)
    weight = model.head_observations.head_module[2].weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[2] = torch.nan
    with pytest.raises(RuntimeError, match='expected finite'):
        Episodes(policy, identities, seed=3).run(1)
    with torch.no_grad():
        weight.copy_(good)
    model.clear_caches()
