"""The nodes of one search: which history each has, and the step that adds a child to every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.eviction import EvictionStrategy
from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.transfer import to_device
from lzero_kv.lightzero.inference.events import NO_HISTORIES, NodesExpanded
from lzero_kv.lightzero.inference.flight import Flight
from lzero_kv.lightzero.inference.flights import Flights
from lzero_kv.lightzero.inference.heads import (
    StepOutputs,
    action_embeddings,
    predict_policy_value,
    predict_reward_latent,
)
from lzero_kv.lightzero.inference.roots import RootBatch
from lzero_kv.lightzero.inference.trees import ROOT, Branch, SearchTrees


class SearchNodes:
    """Grows a batch of search trees, one child per row and simulation.

    Args:
        roots: where the trees begin.
        simulations: how many children each row will get at most.
        trees: where histories are shared, with the roots' not in place yet; None where each node has a slot
            of its own.
    """

    def __init__(
        self,
        world_model: Any,
        manager: KVCacheManager,
        flights: Flights,
        roots: RootBatch,
        simulations: int,
        trees: SearchTrees | None = None,
    ) -> None:
        rows, width, embed = roots.tokens.shape
        kept = flights.window.kept
        self._world_model = world_model
        self._manager = manager
        self._flights = flights
        self._roots = roots
        self._simulations = simulations
        self._rows = np.arange(rows)
        self._shift = flights.window_shift()
        self._parents = np.full((simulations + 1, rows), ROOT, dtype=np.int64)
        self._depths = np.zeros((simulations + 1, rows), dtype=np.int64)
        self._visits = np.ones((simulations + 1, rows), dtype=np.int64)
        self._by_priority = manager.recur_pool.eviction_strategy is EvictionStrategy.PRIORITY
        # Every raw token of the trees: the root's window, then an action and an observation for each
        # simulation.
        self._tokens = roots.tokens.new_zeros(rows, width + 2 * simulations, embed)
        self._tokens[:, :width] = roots.tokens
        self._root_width = width
        self._lengths = np.zeros((simulations + 1, rows), dtype=np.int64)
        self._lengths[ROOT] = roots.lengths
        # Where windows are rebuilt: the columns of ``_tokens`` that each node's window shows, newest last.
        recorded = simulations + 1 if flights.exact_window else 0
        self._windows = np.zeros((recorded, rows, kept), dtype=np.int32)
        if self._flights.exact_window:
            self._windows[ROOT, :, kept - width :] = np.arange(width)
        # Nodes whose window moved and whose keys and values were not asked for yet.
        self._pending = np.zeros((recorded, rows), dtype=bool)
        self._moved = np.zeros((recorded, rows), dtype=bool)
        self.expanded = 0
        self._trees = trees
        if trees is not None:
            self._plant(trees)

    def expand(self, parents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add one child to every row's tree.

        Args:
            parents: int64 ``[B]``, simulation number of each row's parent (0: its root).
            actions: int64 ``[B]``, or ``[B, action_space_size]`` where actions are continuous.

        Raises:
            ValueError: a parent that does not exist yet, or too many simulations. Nothing is stored.
        """
        simulation = self.expanded + 1
        self._check(parents, simulation)
        embedded = action_embeddings(self._world_model, actions)
        flight, found = self._begin(simulation, parents)
        observers = self._world_model.observers
        copied = any(observer.needs_histories for observer in observers)
        reward, latent = predict_reward_latent(self._flights.prepared, flight.append(embedded))
        served = flight.histories(found) if copied else NO_HISTORIES
        outputs = predict_policy_value(self._flights.prepared, flight.append(latent))
        self._record(simulation, parents, embedded, latent)
        stored = self._store(simulation, flight)
        self.expanded = simulation
        if self._by_priority:
            self._visit(simulation)
        outputs = outputs._replace(latent=latent[:, None], reward=reward[:, None])
        if observers:
            left = flight.histories(stored) if copied else NO_HISTORIES
            event = NodesExpanded(simulation, parents, actions, served, left, outputs)
            for observer in observers:
                observer.nodes_expanded(event)
        return outputs

    def _check(self, parents: np.ndarray, simulation: int) -> None:
        if simulation > self._simulations:
            raise ValueError(
                f'expected at most {self._simulations} simulations, got one more; begin a new search'
            )
        if len(parents) != len(self._rows) or parents.min() < ROOT or parents.max() > self.expanded:
            raise ValueError(
                f'expected {len(self._rows)} parents in [0, {self.expanded}], '
                f'got {np.asarray(parents).tolist()}'
            )

    def _key(self, row: int, simulation: int) -> RootKey | NodeKey:
        return self._roots.keys[row] if simulation == ROOT else NodeKey(row, simulation)

    def _plant(self, trees: SearchTrees) -> None:
        """Put the roots' histories where the trees begin."""
        if self._roots.kv is None:
            flight, _ = self._load(self._rows, self._parents[ROOT])
            trees.begin(flight.begin_trees(trees.roots))
            return
        for number, root in enumerate(trees.roots):
            kv = self._roots.kv[:, 2 * number : 2 * number + 2]
            root.copy_(kv.unflatten(-1, root.shape[3:]))
        trees.begin(self._roots.lengths[:, None])

    def _begin(self, simulation: int, parents: np.ndarray) -> tuple[Flight | Branch, np.ndarray]:
        """The histories of ``parents``, ready for two tokens: a copy of what is stored, or a branch of the
        trees; and which were there (bool ``[B]``)."""
        if self._trees is None:
            return self._load(self._rows, parents)
        found = np.ones(len(parents), dtype=bool)
        rows, apart = np.flatnonzero(self._moved[parents, self._rows]), None
        if len(rows):
            flight, found[rows] = self._load(rows, parents[rows])
            apart = rows, flight
        self._manager.count_shared(len(parents) - len(rows))
        lengths, next_positions = (
            self._lengths[parents, self._rows],
            self._next_positions(self._rows, parents),
        )
        return self._trees.branch(simulation, parents, lengths, next_positions, apart), found

    def _store(self, simulation: int, flight: Flight | Branch) -> np.ndarray:
        """Store the children, except where an exact window moved: such a child has nothing but its raw tokens
        until it is expanded (:meth:`_load`), and most never are.

        Returns:
            bool ``[B]``: children whose keys and values are there.
        """
        moved = flight.slide() if isinstance(flight, Branch) else flight.slide(self._shift)
        self._lengths[simulation] = flight.lengths
        rows = self._rows
        if self._flights.exact_window and moved.any():
            self._pending[simulation] = self._moved[simulation] = moved
            rows = np.flatnonzero(~moved)
        if len(rows) and not isinstance(flight, Branch):
            flight.store([NodeKey(row, simulation) for row in rows.tolist()], rows)
        return ~moved if self._flights.exact_window else np.ones(len(moved), dtype=bool)

    def _load(self, rows: np.ndarray, nodes: np.ndarray) -> tuple[Flight, np.ndarray]:
        """Copies of the histories of ``nodes``, one of each of ``rows``, computed again where they are gone;
        and which were found (bool ``[N]``).

        Windows that moved and that nobody has asked for yet are found where they will be stored; they are
        computed in the pass of the flight's first token.
        """
        exact = self._flights.exact_window
        keys = [self._key(row, node) for row, node in zip(rows.tolist(), nodes.tolist(), strict=True)]
        pending = np.flatnonzero(self._pending[nodes, rows]) if exact else np.empty(0, dtype=np.int64)
        if len(pending):
            windows = rows[pending], nodes[pending]
            next_positions = self._next_positions(*windows)
            own = self._reserve_windows([keys[row] for row in pending], *windows, next_positions)
        slots = self._manager.lookup(keys)
        found = slots != NO_SLOT
        slots[pending] = NO_SLOT
        missing, replayed = np.flatnonzero(slots == NO_SLOT), None
        if len(pending):
            missing = np.setdiff1d(missing, pending)
        if len(missing) and not exact:
            # What a shifted window holds depends on the steps that left it: only taking them again reproduces
            # it.
            replayed = self._replay(rows[missing], nodes[missing])
        flight = self._flights.load(slots)
        if replayed is not None:
            flight.fill(missing, *replayed)
        elif len(missing):
            self._restore(flight, missing, rows[missing], nodes[missing])
        if len(pending):
            flight.await_windows(pending, self._window_tokens(*windows), next_positions, own)
        return flight, found

    def _reserve_windows(
        self, keys: Sequence[Any], rows: np.ndarray, nodes: np.ndarray, next_positions: np.ndarray
    ) -> np.ndarray:
        """Slots (int64 ``[N]``) for windows that moved and are going to be computed."""
        lengths = self._lengths[nodes, rows]
        slots = self._manager.reserve(keys, lengths, next_positions)
        self._manager.count_window(int(lengths.sum()))
        self._pending[nodes, rows] = False
        return slots

    def _restore(self, flight: Flight, missing: np.ndarray, rows: np.ndarray, nodes: np.ndarray) -> None:
        """Compute histories that are not stored (evicted for want of memory, or cleared) again, in one
        batch."""
        tokens, lengths = self._window_tokens(rows, nodes), self._lengths[nodes, rows]
        flight.restore(missing, tokens, lengths, self._next_positions(rows, nodes))
        self._manager.count_rebuilt(int(lengths.sum()), roots=False)

    def _replay(self, rows: np.ndarray, nodes: np.ndarray) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """From the nearest stored ancestor of each node, take the steps down to it again.

        Returns:
            ``[N, 2 * layers, kept, embed]``, and the lengths and next positions (int64 ``[N]``).
        """
        paths = [self._path_from_stored(int(row), int(node)) for row, node in zip(rows, nodes, strict=True)]
        slots = self._manager.slots(
            [self._key(row, path[0]) for row, path in zip(rows.tolist(), paths, strict=True)]
        )
        kv = self._blank(len(rows))
        lengths, next_positions = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
        stored, gone = np.flatnonzero(slots != NO_SLOT), np.flatnonzero(slots == NO_SLOT)
        if len(stored):
            kv[to_device(stored, kv.device)] = self._manager.load(slots[stored])
            lengths[stored] = self._manager.lengths(slots[stored])
            next_positions[stored] = self._manager.next_positions(slots[stored])
        if len(gone):
            tokens = self._roots.tokens[to_device(rows[gone], kv.device)]
            lengths[gone], next_positions[gone] = (
                self._roots.lengths[rows[gone]],
                self._roots.next_positions[rows[gone]],
            )
            again = self._flights.recompute(tokens, lengths[gone], next_positions[gone])
            kv[to_device(gone, kv.device), :, kv.shape[2] - again.shape[2] :] = again
            self._manager.count_rebuilt(int(lengths[gone].sum()), roots=False)
        for level in range(1, max(len(path) for path in paths)):
            active = np.array([i for i, path in enumerate(paths) if len(path) > level])
            flight = self._flights.load(np.full(len(active), NO_SLOT, dtype=np.int64))
            at = to_device(active, kv.device)
            flight.fill(np.arange(len(active)), kv[at], lengths[active], next_positions[active])
            self._retake(flight, rows[active], np.array([paths[i][level] for i in active]))
            kv[at] = flight.kept
            lengths[active], next_positions[active] = flight.lengths, flight.next_positions
        return kv, lengths, next_positions

    def _retake(self, flight: Flight, rows: np.ndarray, nodes: np.ndarray) -> None:
        """Append the two tokens of ``nodes`` again."""
        columns = self._root_width + 2 * (nodes - 1)
        at = to_device(np.stack([rows, columns, columns + 1]), self._tokens.device)
        flight.append(self._tokens[at[0], at[1]])
        flight.append(self._tokens[at[0], at[2]])
        flight.slide(self._shift)
        self._manager.count_rebuilt(2 * len(rows), roots=False)

    def _path_from_stored(self, row: int, node: int) -> list[int]:
        """Nodes from the nearest stored ancestor, or the root, down to ``node``."""
        path = [node]
        while path[-1] != ROOT and self._manager.slots([self._key(row, path[-1])])[0] == NO_SLOT:
            path.append(int(self._parents[path[-1], row]))
        return path[::-1]

    def _next_positions(self, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        return self._roots.next_positions[rows] + 2 * self._depths[nodes, rows]

    def _blank(self, rows: int) -> torch.Tensor:
        flights, embed = self._flights, self._tokens.shape[2]
        return self._tokens.new_zeros(rows, 2 * flights.layers, flights.window.kept, embed)

    def _record(
        self, simulation: int, parents: np.ndarray, action: torch.Tensor, latent: torch.Tensor
    ) -> None:
        """Write down the child's two raw tokens, and what :meth:`_place` does."""
        first = self._place(simulation, parents)
        self._tokens[:, first] = action
        self._tokens[:, first + 1] = latent

    def _place(self, simulation: int, parents: np.ndarray) -> int:
        """Write down the child's parent and which tokens its window shows.

        Returns:
            The column of ``_tokens`` where its action goes; its observation stands behind it.
        """
        first = self._root_width + 2 * (simulation - 1)
        self._parents[simulation] = parents
        self._depths[simulation] = self._depths[parents, self._rows] + 1
        if self._flights.exact_window:
            window, own = self._windows[simulation], (first, first + 1)
            window[:, :-2] = self._windows[parents, self._rows, 2:]
            window[:, -2:] = own[-window.shape[1] :]
        return first

    def _window_tokens(self, rows: np.ndarray, nodes: np.ndarray) -> torch.Tensor:
        """Raw embeddings ``[N, kept, embed]`` of the windows of ``nodes``."""
        columns = self._windows[nodes, rows]
        at = to_device(np.stack(np.broadcast_arrays(rows[:, None], columns)), self._tokens.device)
        return self._tokens[at[0], at[1]]

    def _visit(self, simulation: int) -> None:
        """Tell the pool how often each node was passed, from the new children's parents up to below the
        roots."""
        touched: dict[NodeKey, int] = {}
        nodes = self._parents[simulation]
        while (inner := nodes != ROOT).any():
            for row in np.flatnonzero(inner).tolist():
                node = int(nodes[row])
                self._visits[node, row] += 1
                touched[NodeKey(row, node)] = int(self._visits[node, row])
            nodes = np.where(inner, self._parents[nodes, self._rows], ROOT)
        present = [key for key in touched if key in self._manager.recur_pool]
        self._manager.recur_pool.set_priorities(present, [touched[key] for key in present])
