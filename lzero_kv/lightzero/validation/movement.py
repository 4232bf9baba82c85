"""How far a policy and a value moved."""

from __future__ import annotations

from typing import Any

import torch
from lzero.policy.scaling_transform import InverseScalarTransform


def movement(
    moved: dict[str, torch.Tensor], true: dict[str, torch.Tensor], world_model: Any
) -> dict[str, float]:
    """Distances between two answers, of what both have.

    Returns:
        ``policy``: total variation distance of discrete policies, in [0, 1]; left out where actions are
        continuous. ``value``: absolute difference in units of return.
    """
    distances = {}
    if 'policy' in moved and not world_model.continuous_action_space:
        one, other = (logits.double().softmax(-1) for logits in (moved['policy'], true['policy']))
        distances['policy'] = float((one - other).abs().sum() / 2)
    if 'value' in moved:
        scalar = InverseScalarTransform((world_model.support_size - 1) // 2, moved['value'].device)
        one, other = (scalar(logits.clone()[None]) for logits in (moved['value'], true['value']))
        distances['value'] = float((one - other).abs())
    return distances
