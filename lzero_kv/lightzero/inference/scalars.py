"""From the logits of value and reward to the numbers that the tree adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lzero.policy import InverseScalarTransform

EPSILON = 0.001
"""The host's."""


def expected_scalars(
    transform: Any, logits: tuple[torch.Tensor, torch.Tensor], as_host: bool
) -> list[np.ndarray]:
    """Scalars ``[B]`` of two batches of logits, each ``[B, 1, support]``; one copy to the host for both.

    The expectation over the support, then the inverse of MuZero's value transform (Pohlen et al. 2018,
    arXiv 1805.11593, proposition A.2), in the host's order of operations. The host takes logits for
    probabilities when those of every row happen to sum to 1; here they are always logits.

    Args:
        transform: the search's ``inverse_scalar_transform_handle``; one of another kind is called as it is.
        as_host: call it in any case: torch's square roots are not numpy's to the last bit.
    """
    known = type(transform) is InverseScalarTransform and transform.categorical_distribution
    if as_host or not known:
        return [transform(part.squeeze(1)).cpu().numpy().reshape(-1) for part in logits]
    both = torch.cat(logits).squeeze(1).softmax(dim=1).mul_(transform.value_support).sum(1).cpu().numpy()
    root = (np.sqrt(1 + 4 * EPSILON * (np.abs(both) + 1 + EPSILON)) - 1) / (2 * EPSILON)
    scalars = np.sign(both) * (root * root - 1)
    return [scalars[: len(logits[0])], scalars[len(logits[0]) :]]
