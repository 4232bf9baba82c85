"""Holds recorded roots and nodes against the recomputation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.lightzero.host import scalar_transforms
from lzero_kv.validation.oracle import Answer, Oracle

from .episodes import Root
from .models import world_model_of
from .precision import precision
from .reanalysis import Reanalysis
from .recorder import ROOT, Node

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Largest difference of a logit that rounding explains; different histories differ by a hundred times more.
"""


@dataclass(frozen=True)
class Verdict:
    """How recorded answers differ from their recomputation; one entry per root or node, in order."""

    differences: np.ndarray
    tolerance: float

    @property
    def total(self) -> int:
        return len(self.differences)

    @property
    def wrong(self) -> int:
        return int((self.differences > self.tolerance).sum())

    @property
    def largest(self) -> float:
        return float(self.differences.max(initial=0.0))

    def __str__(self) -> str:
        found = f'{self.wrong} of {self.total} differ by more than {self.tolerance:g}'
        return f'{found}, largest difference {self.largest:.3g}'


def judge_roots(policy: Any, roots: Iterable[Root], window: str = 'shift') -> Verdict:
    """Policy logits and predicted value of every root against its whole episode."""
    oracle, dtype, device = _oracle(policy, window)
    scalar = scalar_transforms(policy)[0]
    with precision(dtype):
        differences = []
        for root in roots:
            answer = oracle.root(_on(device, root.observations), root.actions)
            value = float(scalar(answer.value[None].clone()))
            # The scalar is stretched against its logits in proportion to its size.
            stretched = abs(value - root.predicted_value) / (1 + abs(value))
            differences.append(max(_difference(answer.policy, root.policy), stretched))
    return Verdict(np.array(differences), TOLERANCE[dtype])


def judge_nodes(policy: Any, roots: Iterable[Root], window: str = 'shift') -> Verdict:
    """All answers of every node below the roots, each against its whole episode and path."""
    oracle, dtype, device = _oracle(policy, window)
    with precision(dtype):
        trees = [(root.nodes, oracle.root(_on(device, root.observations), root.actions)) for root in roots]
        return Verdict(tree_differences(oracle, trees), TOLERANCE[dtype])


def judge_reanalysis(policy: Any, reanalysis: Reanalysis, window: str = 'shift') -> Verdict:
    """All answers of every node of a reanalysis, whose searches start from the root's own latent state
    alone.
    """
    oracle, dtype, device = _oracle(policy, window)
    with precision(dtype):
        tops = [oracle.root([observation.to(device)], []) for observation in reanalysis.observations]
        return Verdict(tree_differences(oracle, zip(reanalysis.nodes, tops, strict=True)), TOLERANCE[dtype])


def tree_differences(oracle: Oracle, trees: Iterable[tuple[Sequence[Node], Answer]]) -> np.ndarray:
    differences = []
    for nodes, top in trees:
        answers = {ROOT: top}
        for node in nodes:
            latent = torch.from_numpy(node.latent).to(top.policy.device)
            answer = oracle.child(answers[node.parent], node.action, latent)
            answers[node.number] = answer
            pairs = (
                (answer.reward, node.reward),
                (answer.latent, node.latent),
                (answer.value, node.value),
                (answer.policy, node.policy),
            )
            differences.append(max(_difference(expected, got) for expected, got in pairs))
    return np.array(differences)


def _oracle(policy: Any, window: str) -> tuple[Oracle, torch.dtype, torch.device]:
    world_model = world_model_of(policy)
    weight = next(world_model.parameters())
    return Oracle(world_model, window), weight.dtype, weight.device


def _on(device: torch.device, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def _difference(expected: torch.Tensor | None, got: np.ndarray) -> float:
    if expected is None:
        raise ValueError(
            'expected a node below the root, got a root, which has no reward and no predicted latent state'
        )
    difference = np.abs(expected.detach().cpu().numpy() - got).max()
    return float(difference) if np.isfinite(difference) else float('inf')
