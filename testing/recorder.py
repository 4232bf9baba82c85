"""Records every node that a search expands, whichever cache runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .repeatable_tree import host_trees

ROOT = 0  # node number of the root; the node that the i-th simulation (from 0) expands is i + 1


@dataclass(frozen=True)
class Node:
    """What the world model answered when a search expanded one node. Arrays are float, without batch axis."""

    number: int
    parent: int
    action: np.ndarray
    """The action on the way from the parent: a scalar, or [action dimensions] when continuous."""
    reward: np.ndarray
    """Logits [support]."""
    value: np.ndarray
    """Logits [support]."""
    policy: np.ndarray
    """Logits [actions], or mean and sigma [2 * action dimensions]."""
    latent: np.ndarray
    """The predicted latent state [embed]."""


class Recorder:
    """Every node one search expands, whichever cache runs it.

    The stock search is recorded from outside: the tree's traverse names the parents, the world model's
    recurrent inference gives the answers. A world model of the cache manager tells its observers.
    """

    def __init__(self, world_model: Any, *, sampled: bool) -> None:
        self._model = world_model
        self._tree = host_trees()[sampled]
        self._rows: list[dict[str, np.ndarray]] = []

    def nodes(self, rows: int) -> list[list[Node]]:
        """Per row of the search, its nodes in order of expansion."""
        return [
            [self._node(number, fields, row) for number, fields in enumerate(self._rows, 1)]
            for row in range(rows)
        ]

    @contextmanager
    def attached(self) -> Iterator[None]:
        if getattr(self._model.config, 'use_new_cache_manager', False):
            watching = _Watching(self._expanded)
            self._model.observers.append(watching)
            try:
                yield
            finally:
                self._model.observers.remove(watching)
        else:
            with self._watching():
                yield

    def _expanded(self, fields: dict[str, Any]) -> None:
        self._rows.append({name: _array(value) for name, value in fields.items()})

    @contextmanager
    def _watching(self) -> Iterator[None]:
        traverse: Callable[..., Any] = self._tree.batch_traverse
        infer: Callable[..., Any] = self._model.forward_recurrent_inference
        parents: list[int] = []

        def batch_traverse(*args: Any) -> Any:
            leaves = traverse(*args)
            parents[:] = leaves[0]
            return leaves

        def forward_recurrent_inference(history: Any, *args: Any, **kwargs: Any) -> Any:
            answer = infer(history, *args, **kwargs)
            _, latent, reward, policy, value = answer
            self._expanded(
                dict(
                    parents=list(parents),
                    actions=history[-1][1],
                    reward=reward,
                    value=value,
                    policy=policy,
                    latent=latent,
                )
            )
            return answer

        with (
            replaced(self._tree, 'batch_traverse', batch_traverse),
            replaced(self._model, 'forward_recurrent_inference', forward_recurrent_inference),
        ):
            yield

    def _node(self, number: int, fields: dict[str, np.ndarray], row: int) -> Node:
        def logits(name: str) -> np.ndarray:
            return fields[name][row].reshape(-1)

        return Node(
            number=number,
            parent=int(fields['parents'][row]),
            action=fields['actions'][row].squeeze(),
            reward=logits('reward'),
            value=logits('value'),
            policy=logits('policy'),
            latent=logits('latent'),
        )


class _Watching:
    """Hands every expansion of a caching world model to ``expanded``."""

    needs_histories = False

    def __init__(self, expanded: Callable[[dict[str, Any]], None]) -> None:
        self._told = expanded

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *event: None

    def nodes_expanded(self, event: Any) -> None:
        fields = event.outputs._asdict()
        del fields['hidden']
        self._told(dict(fields, parents=event.parents, actions=event.actions))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` within the block; an attribute that only the class had is removed again."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy().copy() if isinstance(value, torch.Tensor) else np.array(value)
