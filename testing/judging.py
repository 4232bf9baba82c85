"""Holds recorded roots and nodes against the recomputation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.lightzero.host import scalar_transforms
from lzero_kv.validation.oracle import Oracle, Token, oracle_of

from .episodes import Root
from .forest import Forest, Place
from .fresh import Logits, fresh_answers, history_of
from .models import world_model_of
from .precision import precision
from .reanalysis import Reanalysis
from .recorder import ROOT, Node

NODE_LOGITS = 'reward', 'latent', 'value', 'policy'

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
    roots, differences = list(roots), []
    with precision(dtype), torch.no_grad():
        for root, answer in zip(roots, _root_answers(oracle, device, roots), strict=True):
            value = float(scalar(answer['value'][None].clone()))
            # The scalar is stretched against its logits in proportion to its size.
            stretched = abs(value - root.predicted_value) / (1 + abs(value))
            differences.append(max(_difference(answer['policy'], root.policy), stretched))
    return Verdict(np.array(differences), TOLERANCE[dtype])


def judge_nodes(policy: Any, roots: Iterable[Root], window: str = 'shift') -> Verdict:
    """All answers of every node below the roots, each against its whole episode and path."""
    return _judged(policy, [(root.nodes, root.observations, root.actions) for root in roots], window)


def judge_reanalysis(policy: Any, reanalysis: Reanalysis, window: str = 'shift') -> Verdict:
    """All answers of every node of a reanalysis, whose searches start from the root's own latent state
    alone.
    """
    pairs = zip(reanalysis.nodes, reanalysis.observations, strict=True)
    return _judged(policy, [(nodes, [observation], []) for nodes, observation in pairs], window)


def _judged(
    policy: Any,
    trees: Iterable[tuple[Sequence[Node], Iterable[torch.Tensor], Sequence[Any]]],
    window: str,
) -> Verdict:
    """The nodes of trees, each with the observations and actions of its root's episode."""
    oracle, dtype, device = _oracle(policy, window)
    with precision(dtype), torch.no_grad():
        episodes = [(nodes, _on(device, seen), actions) for nodes, seen, actions in trees]
        if window == 'shift':
            differences = _shifted_differences(oracle, episodes)
        else:
            tokens = [(nodes, history_of(oracle, *episode)) for nodes, *episode in episodes]
            differences = _fresh_differences(oracle, tokens)
    return Verdict(differences, TOLERANCE[dtype])


def tree_differences(oracle: Any, trees: Iterable[tuple[Sequence[Node], Any]]) -> np.ndarray:
    """Largest difference of each node's answers from those of an oracle that goes from parent to child.

    Args:
        oracle: has ``child(parent, action, latent)``, with logits by name.
        trees: nodes in order of expansion, and the oracle's answer at their root.
    """
    differences = []
    for nodes, top in trees:
        answers = {ROOT: top}
        for node in nodes:
            latent = torch.from_numpy(node.latent).to(top.policy.device)
            answer = answers[node.number] = oracle.child(answers[node.parent], node.action, latent)
            differences.append(_node_difference({name: getattr(answer, name) for name in NODE_LOGITS}, node))
    return np.array(differences)


def _root_answers(oracle: Oracle, device: torch.device, roots: Sequence[Root]) -> list[Logits]:
    seen = [_on(device, root.observations) for root in roots]
    if oracle.rule == 'shift':
        forest = Forest(oracle)
        places = [forest.root(before, root.actions) for before, root in zip(seen, roots, strict=True)]
        answers = forest.answers() if places else {}
        return [answers[place] for place in places]
    return fresh_answers(
        oracle,
        [history_of(oracle, before, root.actions) for before, root in zip(seen, roots, strict=True)],
    )


def _shifted_differences(
    oracle: Oracle, trees: Iterable[tuple[Sequence[Node], list[torch.Tensor], Sequence[Any]]]
) -> np.ndarray:
    """:func:`tree_differences` for nodes below the roots of episodes, all of one depth at once."""
    forest, judged = Forest(oracle), list[tuple[Place, Node]]()
    for nodes, *episode in trees:
        places = {ROOT: forest.root(*episode)}
        for node in nodes:
            latent = torch.from_numpy(node.latent).to(episode[0][0].device)
            places[node.number] = forest.child(places[node.parent], node.action, latent)
            judged.append((places[node.number], node))
    answers = forest.answers() if judged else {}
    return np.array([_node_difference(answers[place], node) for place, node in judged])


def _fresh_differences(oracle: Oracle, trees: Iterable[tuple[Sequence[Node], list[Token]]]) -> np.ndarray:
    """:func:`tree_differences` for nodes below a root with these tokens, each computed by itself."""
    judged, histories = list[Node](), list[list[Token]]()
    for nodes, tokens in trees:
        of_nodes = {ROOT: tokens}
        for node in nodes:
            before = of_nodes[node.parent]
            first = before[-1].position + 1
            latent = torch.from_numpy(node.latent).to(before[0].embedding.device).reshape(-1)
            step = [Token(oracle.embed_action(node.action), first), Token(latent, first + 1)]
            of_nodes[node.number] = before + step
            judged.append(node)
            histories.append(of_nodes[node.number])
    answers = fresh_answers(oracle, histories)
    return np.array([_node_difference(logits, node) for logits, node in zip(answers, judged, strict=True)])


def _node_difference(expected: Logits, node: Node) -> float:
    return max(_difference(expected.get(name), getattr(node, name)) for name in NODE_LOGITS)


def _oracle(policy: Any, window: str) -> tuple[Oracle, torch.dtype, torch.device]:
    world_model = world_model_of(policy)
    weight = next(world_model.parameters())
    return oracle_of(world_model, window), weight.dtype, weight.device


def _on(device: torch.device, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


def _difference(expected: torch.Tensor | None, got: np.ndarray) -> float:
    if expected is None:
        raise ValueError(
            'expected a node below the root, got a root, which has no reward and no predicted latent state'
        )
    difference = np.abs(expected.detach().cpu().numpy() - got).max()
    return float(difference) if np.isfinite(difference) else float('inf')
