"""The nodes of one search whose steps run on static shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from lzero_kv.cache.keys import NO_SLOT, NodeKey
from lzero_kv.cache.window import TOKENS_PER_STEP
from lzero_kv.lightzero.inference.events import NO_HISTORIES, Histories, NodesExpanded
from lzero_kv.lightzero.inference.heads import StepOutputs
from lzero_kv.lightzero.inference.nodes import SearchNodes
from lzero_kv.lightzero.inference.static.engine import StaticEngine
from lzero_kv.lightzero.inference.static.step import ACTION, CHILD, LENGTH, PARENT, PENDING, TOKEN, WINDOW


class Plan(NamedTuple):
    """What one simulation will do to each row.

    Attributes:
        keys: names of the parents.
        lengths, next_positions: int64 ``[B]``, of the parents.
        after: int64 ``[B]``, lengths of the children.
        pending: bool ``[B]``: the parent's window moved and was not computed yet.
        moves: bool ``[B]``: the child's window moves.
        stays: bool ``[B]``: the child is stored. An exact window that moves is not: see
            :class:`SearchNodes`.
    """

    keys: list[Any]
    lengths: np.ndarray
    next_positions: np.ndarray
    after: np.ndarray
    pending: np.ndarray
    moves: np.ndarray
    stays: np.ndarray


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
        rows, columns, _ = self._tokens.shape
        shared = engine.begin(rows, columns, self._shift)
        self._tokens = shared.copy_(self._tokens)

    def expand(self, parents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add one child to every row's tree: :meth:`SearchNodes.expand`."""
        simulation = self.expanded + 1
        self._check(parents, simulation)
        plan = self._plan(parents)
        if not self._engine.serves(len(parents)) or not self._fits(plan):
            return super().expand(parents, actions)
        self._address(simulation, parents, plan)
        answers = self._engine.run(actions, plan.next_positions, bool(plan.pending.any()))
        if answers is None:
            return super().expand(parents, actions)
        self._settle(simulation, parents, plan)
        outputs = self._engine.outputs(answers)
        self._tell(simulation, parents, actions, plan.stays, outputs)
        return outputs

    def _plan(self, parents: np.ndarray) -> Plan:
        rows, exact = self._rows, self._flights.exact_window
        lengths = self._lengths[parents, rows]
        after, moves = self._flights.window.advance(lengths + TOKENS_PER_STEP)
        none = np.zeros(len(rows), dtype=bool)
        return Plan(
            [self._key(row, node) for row, node in zip(rows.tolist(), parents.tolist(), strict=True)],
            lengths,
            self._next_positions(rows, parents),
            after,
            self._pending[parents, rows] if exact else none,
            moves,
            ~moves if exact else ~none,
        )

    def _fits(self, plan: Plan) -> bool:
        """Whether every parent is stored, or its window pending, and nothing has to be evicted."""
        pool = self._manager.recur_pool
        if pool.pool_size - len(pool) < np.count_nonzero(plan.pending) + np.count_nonzero(plan.stays):
            return False
        return bool((plan.pending | (self._manager.slots(plan.keys) != NO_SLOT)).all())

    def _address(self, simulation: int, parents: np.ndarray, plan: Plan) -> None:
        """Take slots for what the step writes, and fill in its numbers."""
        manager, pending, stays = self._manager, plan.pending, plan.stays
        numbers, begins = self._engine.numbers[: len(parents)], self._engine.first_tokens[: len(parents)]
        numbers[:, LENGTH], numbers[:, PENDING] = plan.lengths, pending
        numbers[:, [WINDOW, CHILD]] = self._engine.scratch
        if pending.any():
            keys = [plan.keys[row] for row in np.flatnonzero(pending).tolist()]
            slots = manager.reserve(keys, plan.lengths[pending], plan.next_positions[pending])
            numbers[pending, WINDOW] = slots
            numbers[:, ACTION + 1 :] = self._windows[parents, self._rows] + begins[:, None]
        numbers[:, PARENT] = manager.lookup(plan.keys)
        if stays.any():
            keys = [NodeKey(row, simulation) for row in np.flatnonzero(stays).tolist()]
            next_positions = plan.next_positions[stays] + TOKENS_PER_STEP
            numbers[stays, CHILD] = manager.reserve(keys, plan.after[stays], next_positions)
        numbers[:, TOKEN] = begins + self._place(simulation, parents)

    def _settle(self, simulation: int, parents: np.ndarray, plan: Plan) -> None:
        """Write down what the step did."""
        self._lengths[simulation] = plan.after
        if self._flights.exact_window:
            self._pending[simulation] = self._moved[simulation] = plan.moves
        if plan.pending.any():
            self._pending[parents[plan.pending], self._rows[plan.pending]] = False
            self._manager.count_window(int(plan.lengths[plan.pending].sum()))
        self.expanded = simulation
        if self._by_priority:
            self._visit(simulation)

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
