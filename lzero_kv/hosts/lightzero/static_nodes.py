"""The nodes of one search whose steps run on static shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.keys import NO_SLOT, NodeKey

from .nodes import SearchNodes
from .observer import NO_HISTORIES, Histories, NodesExpanded
from .outputs import StepOutputs
from .static_engine import StaticEngine
from .static_step import ACTION, CHILD, LENGTH, PARENT, PENDING, TOKEN, WINDOW


class StaticNodes(SearchNodes):
    """As :class:`SearchNodes`; a simulation is one call of the engine.

    Where a parent is not stored (cleared, or evicted), or the pool is so full that this step would evict, the
    simulation is taken by :class:`SearchNodes` itself.

    Args:
        engine: serves searches of so many rows.
    """

    def __init__(self, engine: StaticEngine, *args: Any) -> None:
        super().__init__(*args)
        self._engine = engine
        engine.begin(self._tokens.shape[1], self._shift)
        if engine.tokens is not None:
            shared = engine.tokens[: len(self._rows), : self._tokens.shape[1]]
            self._tokens = shared.copy_(self._tokens)

    def expand(self, parents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add one child to every row's tree: :meth:`SearchNodes.expand`."""
        simulation, rows = self.expanded + 1, self._rows
        self._check(parents, simulation)
        lengths, next_positions = self._lengths[parents, rows], self._next_positions(rows, parents)
        after, moved = self._flights.window.advance(lengths + 2)
        exact = self._flights.exact_window
        pending = self._pending[parents, rows] if exact else np.zeros(len(rows), dtype=bool)
        stays = ~moved if exact else np.ones(len(rows), dtype=bool)
        keys = [self._key(row, node) for row, node in zip(rows.tolist(), parents.tolist(), strict=True)]
        if not self._engine.serves(len(rows)) or not self._fits(keys, pending, stays):
            return super().expand(parents, actions)
        numbers, begins = self._engine.numbers[: len(rows)], self._engine.first_tokens[: len(rows)]
        numbers[:, LENGTH], numbers[:, PENDING] = lengths, pending
        numbers[:, [WINDOW, CHILD]] = self._engine.scratch
        some = bool(pending.any())
        if some:
            own = [keys[row] for row in np.flatnonzero(pending).tolist()]
            numbers[pending, WINDOW] = self._manager.reserve(own, lengths[pending], next_positions[pending])
            numbers[:, ACTION + 1 :] = self._windows[parents, rows] + begins[:, None]
        numbers[:, PARENT] = self._manager.lookup(keys)
        if stays.any():
            own = [NodeKey(row, simulation) for row in np.flatnonzero(stays).tolist()]
            numbers[stays, CHILD] = self._manager.reserve(own, after[stays], next_positions[stays] + 2)
        numbers[:, TOKEN] = begins + self._place(simulation, parents)
        answers = self._engine.run(actions, next_positions, some)
        if answers is None:
            return super().expand(parents, actions)
        self._lengths[simulation] = after
        if exact:
            self._pending[simulation] = self._moved[simulation] = moved
        if some:
            self._pending[parents[pending], rows[pending]] = False
            self._manager.count_window(int(lengths[pending].sum()))
        self.expanded = simulation
        if self._by_priority:
            self._visit(simulation)
        outputs = self._engine.outputs(answers)
        self._tell(simulation, parents, actions, stays, outputs)
        return outputs

    def _fits(self, keys: list[Any], pending: np.ndarray, stays: np.ndarray) -> bool:
        """Whether every parent is stored, or its window pending, and nothing has to be evicted."""
        pool = self._manager.recur_pool
        if pool.pool_size - len(pool) < np.count_nonzero(pending) + np.count_nonzero(stays):
            return False
        return bool((pending | (self._manager.slots(keys) != NO_SLOT)).all())

    def _tell(
        self,
        simulation: int,
        parents: np.ndarray,
        actions: torch.Tensor,
        stays: np.ndarray,
        outputs: StepOutputs,
    ) -> None:
        """Hand observers what :meth:`SearchNodes.expand` hands them; a step leaves its parents as they
        were."""
        observers = self._world_model.observers
        if not observers:
            return
        served = stored = NO_HISTORIES
        if any(observer.needs_histories for observer in observers):
            numbers, rows = self._engine.numbers[: len(self._rows)], self._rows
            kv = self._manager.load(numbers[:, PARENT])
            served = Histories(kv, self._lengths[parents, rows], np.ones(len(rows), dtype=bool))
            kv = self._manager.load(np.where(stays, numbers[:, CHILD], numbers[:, PARENT]))
            stored = Histories(kv, self._lengths[simulation].copy(), stays)
        event = NodesExpanded(simulation, parents, actions, served, stored, outputs)
        for observer in observers:
            observer.nodes_expanded(event)
