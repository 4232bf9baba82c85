"""The host's heads and embedding tables, applied to one token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lzero_kv.cache.transfer import to_device

from .weights import InferenceWeights

EPSILON = 0.001
"""Of the host's value transform."""


class StepOutputs(NamedTuple):
    """What the world model predicts after a step; shapes as the host's ``forward_recurrent_inference``
    returns them.

    Attributes:
        hidden: ``[B, 1, embed]``, the transformer's output of the last token.
        latent: ``[B, 1, embed]``, the predicted next latent state; None at root inference.
        reward: ``[B, 1, support]`` logits; None at root inference.
        policy: ``[B, 1, actions]`` logits (continuous actions: mean and deviation side by side).
        value: ``[B, 1, support]`` logits.
    """

    hidden: torch.Tensor
    latent: torch.Tensor | None
    reward: torch.Tensor | None
    policy: torch.Tensor
    value: torch.Tensor


def predict_policy_value(weights: InferenceWeights, hidden: torch.Tensor) -> StepOutputs:
    """Policy and value at an observation token, ``hidden`` ``[B, embed]``."""
    policy: Any = hidden
    for layer in weights.policy:
        policy = layer(policy)
    if isinstance(policy, dict):
        policy = torch.cat([policy['mu'], policy['sigma']], dim=-1)
    if weights.control is not None:
        policy = weights.control(policy)
    value = hidden
    for layer in weights.value:
        value = layer(value)
    return StepOutputs(hidden[:, None], None, None, policy[:, None], value[:, None])


def predict_reward_latent(
    weights: InferenceWeights, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward logits ``[B, support]`` and next latent state ``[B, embed]`` at an action token, ``hidden``
    ``[B, embed]``."""
    reward = latent = hidden
    for layer in weights.reward:
        reward = layer(reward)
    for layer in weights.latent:
        latent = layer(latent)
    return reward, latent


def action_embeddings(
    world_model: Any, actions: Sequence[Any] | torch.Tensor, absent: np.ndarray | None = None
) -> torch.Tensor:
    """Embeddings ``[B, embed]`` of actions: integers, or vectors ``[action_space_size]`` where actions are
    continuous.

    Args:
        absent: bool ``[B]``, rows without an action; some action stands in for them.

    Raises:
        ValueError: an action of a sequence is none of the action space. A tensor is not looked at: see
            :func:`~.inputs.check_actions`.
    """
    weight = world_model.transformer.ln_f.weight
    size = world_model.action_space_size
    if world_model.continuous_action_space:
        if not isinstance(actions, torch.Tensor):
            blank = np.zeros(size, dtype=np.float32)
            rows = [
                blank if absent is not None and absent[i] else np.asarray(a, dtype=np.float32).reshape(-1)
                for i, a in enumerate(actions)
            ]
            broken = [row.tolist() for row in rows if len(row) != size or not np.isfinite(row).all()]
            if broken:
                raise ValueError(f'expected actions of {size} finite numbers, got {broken}')
            actions = to_device(np.stack(rows), weight.device)
        return world_model.act_embedding_table(actions.reshape(-1, size).to(weight))
    if not isinstance(actions, torch.Tensor):
        integers = np.asarray([int(np.asarray(action).reshape(-1)[0]) for action in actions], dtype=np.int64)
        if absent is not None:
            integers = np.where(absent, 0, integers)
        outside = integers[(integers < 0) | (integers >= size)]
        if len(outside):
            raise ValueError(f'expected actions in [0, {size}), got {outside.tolist()}')
        actions = to_device(integers, weight.device)
    return world_model.act_embedding_table(actions.reshape(-1).to(weight.device))


def expected_scalars(
    transforms: tuple[Any, Any], logits: tuple[torch.Tensor, torch.Tensor]
) -> list[np.ndarray]:
    """Scalars ``[B]`` of two batches of logits, each ``[B, 1, support]``; one copy to the host for both where
    they have one transform.

    The expectation over the support, then the inverse of MuZero's value transform (Pohlen et al. 2018,
    arXiv 1805.11593, proposition A.2), in the host's order of operations. The host takes logits for
    probabilities when those of every row happen to sum to 1; here they are always logits.

    Args:
        transforms: the search's inverse scalar transforms, one for each. Two of them, and one of another
            kind, are called as they are.
    """
    # not above: the command line reads findings without a host
    from lzero.policy import InverseScalarTransform

    transform, other = transforms
    plain = type(transform) is InverseScalarTransform and transform.categorical_distribution
    if other is not transform or not plain:
        pairs = zip(transforms, logits, strict=True)
        return [own(part.squeeze(1)).cpu().numpy().reshape(-1) for own, part in pairs]
    both = torch.cat(logits).squeeze(1).softmax(dim=1).mul_(transform.value_support).sum(1).cpu().numpy()
    root = (np.sqrt(1 + 4 * EPSILON * (np.abs(both) + 1 + EPSILON)) - 1) / (2 * EPSILON)
    scalars = np.sign(both) * (root * root - 1)
    return [scalars[: len(logits[0])], scalars[len(logits[0]) :]]
