"""One simulation of a search: parents placed beside their rows, two tokens, heads, children stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from lzero_kv.cache.eviction import EvictionStrategy
from lzero_kv.cache.keys import NO_SLOT, NodeKey, digest_rows
from lzero_kv.cache.transfer import sender
from lzero_kv.cache.window import TOKENS_PER_STEP

from .attention import WindowsBeside, additive_mask, decode
from .budget import WindowBudget
from .events import NO_HISTORIES, Histories, NodesExpanded, observed
from .heads import (
    StepOutputs,
    action_embeddings,
    predict_policy_value,
    predict_reward_latent,
)
from .inputs import check_actions
from .resources import InferenceResources
from .roots import RootBatch
from .rows import Geometry, ResidentRows, visible_columns
from .tree import ROOT, Parents, SearchTree

NOWHERE = -1
"""No node: what stands beside a row before anything was placed there."""


class DerivedWindows(NamedTuple):
    """Windows that the pass of an action computes, and those of them that are stored behind it.

    Attributes:
        beside: all of them.
        rows, slots: int64 ``[N]``, of those that are stored.
        width: columns of the longest.
    """

    beside: WindowsBeside
    rows: np.ndarray
    slots: np.ndarray
    width: int


class Search:
    """Expands nodes of a batch of search trees, one for each row and simulation.

    Args:
        resources: of the world model.
        roots: where the trees begin.
        simulations: children each row will get at most.
        memory: flat, at least :meth:`elements` finite numbers of no meaning.
        stored_steps: simulations whose steps have a place in it.
        budget: layer budgets of the windows; None where all tokens are kept.
    """

    def __init__(
        self,
        resources: InferenceResources,
        roots: RootBatch,
        simulations: int,
        memory: torch.Tensor,
        stored_steps: int,
        budget: WindowBudget | None = None,
    ) -> None:
        rows, geometry = len(roots.lengths), resources.geometry
        self._resources = resources
        self._budget = budget
        self._manager = resources.manager
        self._positions, self._observers = resources.positions, resources.observers
        self._exact = resources.exact
        self._window = geometry.window
        self._send = sender(memory.device)
        self._weights = resources.weights
        self._roots = roots
        self._rows = np.arange(rows)
        self.tree = SearchTree(
            roots.tokens,
            roots.lengths,
            roots.next_positions,
            simulations,
            resources.window.kept,
            resources.exact,
            stored_steps,
        )
        room = self.columns_behind(simulations, resources.window.kept)
        size = ResidentRows.elements(geometry, rows, room)
        self._resident = ResidentRows(geometry, self._manager, memory, rows, room)
        self._shift = resources.shift_table()
        self._shown = self._resident.buffer
        if self._shift is not None:
            self._shown = memory[size : 2 * size].view_as(self._shown)
            size *= 2
        # the two tokens of each stored node, by simulation and row
        shape = geometry.layers, 2, geometry.heads, TOKENS_PER_STEP, geometry.head_dim
        self._steps = memory[size:][: stored_steps * rows * TOKENS_PER_STEP * geometry.column].view(
            -1, *shape
        )
        self._placed = np.full(rows, NOWHERE, np.int64)  # the nodes whose windows stand beside the rows
        # tokens of the nodes' windows in each layer, or in all; of derived ones known once they are computed
        self._held = np.zeros((simulations + 1, rows, roots.held.shape[1]), np.int64)
        self._held[ROOT] = roots.held
        self._derived_before = np.zeros((simulations + 1, rows), dtype=bool)
        self._derived_before[ROOT] = roots.stored
        self._visits = np.ones((simulations + 1, rows), np.int64)
        self._by_priority = self._manager.recur_pool.eviction_strategy is EvictionStrategy.PRIORITY

    @staticmethod
    def columns_behind(simulations: int, kept: int) -> int:
        """Columns behind a window: the longest path and two new tokens."""
        return TOKENS_PER_STEP * (SearchTree.longest_path(simulations, kept) + 1)

    @classmethod
    def elements(cls, resources: InferenceResources, rows: int, simulations: int, stored_steps: int) -> int:
        """Numbers of memory that a search takes."""
        corrected = resources.shift_table() is not None
        kept = resources.window.kept
        return cls.elements_of(resources.geometry, kept, rows, simulations, stored_steps, corrected)

    @classmethod
    def elements_of(
        cls, geometry: Geometry, kept: int, rows: int, simulations: int, stored_steps: int, corrected: bool
    ) -> int:
        """The same without a session. ``corrected``: positions are taken from a copy of the columns."""
        room = cls.columns_behind(simulations, kept)
        beside = ResidentRows.elements(geometry, rows, room) * (2 if corrected else 1)
        return beside + stored_steps * rows * TOKENS_PER_STEP * geometry.column

    @property
    def expanded(self) -> int:
        """Simulations so far."""
        return self.tree.expanded

    def expand(self, parents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add one child to every row's tree.

        Args:
            parents: int64 ``[B]``, simulation number of each row's parent (0: its root).
            actions: int64 ``[B]``, or ``[B, action_space_size]`` where actions are continuous.

        Raises:
            ValueError: a parent that does not exist yet, or too many simulations. Nothing is stored.
        """
        of = self.tree.of(parents)
        action = action_embeddings(self._resources.world_model, actions)
        found, derived = self._place_windows(of)
        depth = self._place_path(of) if of.below.any() else 0
        begins, masks, end = self._look(of, depth)
        ahead = np.stack([of.lengths, of.lengths + 1], axis=1)
        added, rotation = self._positions.at(ahead, of.next_positions[:, None] + (0, 1))
        correction = None if self._shift is None else self._correct(of, begins[0], end)
        hidden = action
        for token in range(TOKENS_PER_STEP):
            end += 1
            now = slice(token, token + 1)
            hidden = decode(
                self._weights,
                self._resident.columns(self._shown, begins, end, 1, masks[token]),
                hidden[:, None] if added is None else hidden[:, None] + added[:, now],
                None if rotation is None else rotation[:, now],
                windows=None if token or derived is None else derived.beside,
            )
            if not token:
                reward, latent = predict_reward_latent(self._weights, hidden)
                hidden = latent
        if derived is not None and len(derived.slots):
            self._resident.store(derived.rows, derived.slots, derived.width)
        outputs = predict_policy_value(self._weights, hidden)
        outputs = outputs._replace(latent=latent[:, None], reward=reward[:, None])
        will_derive = self._add(of, action, latent, end, correction)
        if self._observers:
            self._tell(of, actions, found, will_derive, outputs, end)
        return outputs

    def _place_windows(self, of: Parents) -> tuple[np.ndarray, DerivedWindows | None]:
        """Bring the parents' windows beside their rows.

        Returns:
            bool ``[B]``: windows that were there, or never stored before; and those that the pass of the
            action has to compute.
        """
        rows, nodes, manager = self._rows, of.windows, self._manager
        cached = nodes != ROOT if self._roots.stored else nodes >= ROOT
        moved = nodes != self._placed
        slots = self._find_windows(nodes, cached, moved)
        missing = (slots == NO_SLOT) & (moved | cached)
        lengths = self.tree.lengths(rows, nodes)
        manager.count_step(TOKENS_PER_STEP * len(rows), int(of.lengths.sum() - lengths[missing].sum()))
        self._placed = nodes
        at = np.flatnonzero(moved & ~missing)
        if len(at):
            self._resident.load(at, slots[at], int(lengths[at].max()))
            if self._shift is not None:
                self._without_positions(at)
        if not missing.any():
            return ~missing, None
        at = np.flatnonzero(missing)
        found, nodes = ~missing, nodes[at]
        before = self._derived_before[nodes, at]
        found[at] = ~before
        return found, self._derive(at, nodes, lengths[at], before, stays=cached[at])

    def _find_windows(self, nodes: np.ndarray, cached: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Slots of the windows of ``nodes`` (int64 ``[B]``), ``NO_SLOT`` where there is none: of nodes whose
        windows are ``cached`` (bool ``[B]``), and of roots that ``moved`` to their rows."""
        slots = np.full(len(nodes), NO_SLOT, np.int64)
        if cached.any():
            asked = np.flatnonzero(cached)
            keys = list(map(NodeKey, asked.tolist(), nodes[asked].tolist()))
            slots[asked] = self._manager.recur_pool.find(keys)
        begins = np.flatnonzero(moved & ~cached)
        if len(begins):
            slots[begins] = self._root_slots(begins)
        return slots

    def _derive(
        self, rows: np.ndarray, nodes: np.ndarray, lengths: np.ndarray, before: np.ndarray, stays: np.ndarray
    ) -> DerivedWindows | None:
        """Compute windows that are not stored, or prepare them for the pass of the action.

        Args:
            rows, nodes, lengths: int64 ``[N]``.
            before: bool ``[N]``, windows that were computed before.
            stays: bool ``[N]``, windows that are stored then.
        """
        manager, next_positions = self._manager, self.tree.next_positions(rows, nodes)
        keys = list(map(NodeKey, rows[stays].tolist(), nodes[stays].tolist()))
        slots = manager.reserve(keys, lengths[stays], next_positions[stays])
        manager.count_window(int(lengths[~before].sum()))
        if before.any():
            manager.count_rebuilt(int(lengths[before].sum()), roots=False)
        self._derived_before[nodes, rows] = True
        window, width = self._window, int(lengths.max())
        tokens = self.tree.window_tokens(rows, nodes, width)
        if self._budget is not None:
            self._held[nodes, rows] = self._budget.derive(
                self._resident, rows, tokens, lengths, next_positions, stays, slots
            )
            return None
        self._held[nodes, rows] = lengths[:, None]
        place = self._resident.buffer[..., window - width : window, :]
        if self._exact:
            index = None if len(rows) == len(place) else self._send(rows)
            beside = self._resources.windows_beside(tokens, lengths, next_positions, place, index)
            return DerivedWindows(beside, rows[stays], slots, width)
        # roots that are not stored, computed by themselves: no other window moves
        place.index_copy_(0, self._send(rows), self._resources.prefilled(tokens, lengths, next_positions))
        if len(slots):
            self._resident.store(rows[stays], slots, width)
        if self._shift is not None:
            self._without_positions(rows)
        return None

    def _root_slots(self, rows: np.ndarray) -> np.ndarray:
        """Where stored roots of ``rows`` (int64 ``[N]``) stand."""
        return self._manager.slots([self._roots.keys[row] for row in rows.tolist()])

    def _place_path(self, of: Parents) -> int:
        """Bring the steps between windows and parents beside the rows; returns those of the longest path."""
        path = self.tree.path(of)
        at = np.maximum(path - 1, 0) * len(self._rows) + self._rows[:, None]
        self._resident.load_path(self._steps, at)
        return path.shape[1]

    def _look(self, of: Parents, depth: int) -> tuple[list[int], list[torch.Tensor | None], int]:
        """The first columns that are looked at, the masks of the action and of the observation, and the
        column behind the path."""
        path, columns = of.on_path, TOKENS_PER_STEP * depth
        prefix = (of.lengths - path)[:, None]
        if self._exact:
            prefix = self._held[of.windows, self._rows]
            if (prefix == prefix[:, :1]).all():
                prefix = prefix[:, :1]  # one mask serves all layers
        visible = visible_columns(prefix, path, columns, TOKENS_PER_STEP)
        masks: list[torch.Tensor | None] = [None, None]
        if visible is not None:
            mask = additive_mask(visible[:, :, None], self._shown)
            masks = [mask[..., :-1], mask]
        window = self._window
        begins = (window - prefix.max(0)).tolist()
        return begins, masks, window + columns

    def _add(
        self,
        of: Parents,
        action: torch.Tensor,
        latent: torch.Tensor,
        end: int,
        correction: torch.Tensor | None,
    ) -> np.ndarray:
        """Add the children; store their steps; returns :meth:`SearchTree.add`."""
        tree, number = self.tree, self.tree.expanded + 1
        if self._exact:
            column = tree.next_column
            tree.tokens[:, column] = action
            tree.tokens[:, column + 1] = latent
        derived = tree.add(of)
        if not derived.all():
            begin = (number - 1) * len(self._rows)
            steps = self._steps[begin : begin + len(self._rows)]
            own = self._shown[..., end - TOKENS_PER_STEP : end, :]
            if correction is None:
                steps.copy_(own)
            else:
                torch.sub(own, correction[..., -TOKENS_PER_STEP:, :], out=steps)
        if self._by_priority:
            self._visit(number)
        return derived

    # window='shift' with learned positions: keys and values are stored without what their position adds

    def _without_positions(self, rows: np.ndarray) -> None:
        """Take from windows that were just placed what their positions added."""
        lengths, window = self._roots.lengths[rows], self._window
        widest = int(lengths.max())
        added = self._added(np.arange(-widest, 0) + lengths[:, None])
        place = self._resident.buffer[..., window - widest : window, :]
        if len(rows) == len(place):
            place.sub_(added)
        else:
            place.index_add_(0, self._send(rows), added, alpha=-1)

    def _added(self, places: np.ndarray) -> torch.Tensor:
        """What window ``places`` (int64 ``[B, n]``) add: ``[B, layers, 2, heads, n, head_dim]``."""
        assert self._shift is not None
        at = self._send(np.maximum(places, 0).reshape(-1))
        return self._shift.index_select(0, at).unflatten(0, places.shape).permute(0, 2, 3, 4, 1, 5)

    def _correct(self, of: Parents, begin: int, end: int) -> torch.Tensor:
        """Show what stands beside the rows at the places where it stands now; returns what the places add, of
        the two new tokens too."""
        window = self._window
        behind = np.arange(window - end, TOKENS_PER_STEP) + of.lengths[:, None]
        inside = np.arange(begin - window, 0) + (of.lengths - of.on_path)[:, None]
        added = self._added(np.concatenate([inside, behind], axis=1))
        seen = slice(begin, end)
        torch.add(
            self._resident.buffer[..., seen, :],
            added[..., :-TOKENS_PER_STEP, :],
            out=self._shown[..., seen, :],
        )
        return added

    def _visit(self, number: int) -> None:
        """Tell the pool how often each derived window's node was passed, from the new parents up."""
        parents, touched = self.tree.parents, dict[NodeKey, int]()
        nodes = parents[number]
        while (inner := nodes != ROOT).any():
            for row in np.flatnonzero(inner).tolist():
                node = int(nodes[row])
                self._visits[node, row] += 1
                touched[NodeKey(row, node)] = int(self._visits[node, row])
            nodes = np.where(inner, parents[nodes, self._rows], ROOT)
        present = [key for key in touched if key in self._manager.recur_pool]
        self._manager.recur_pool.set_priorities(present, [touched[key] for key in present])

    @observed()
    def _tell(
        self,
        of: Parents,
        actions: torch.Tensor,
        found: np.ndarray,
        derived: np.ndarray,
        outputs: StepOutputs,
        end: int,
    ) -> None:
        """Tell the world model's observers."""
        served = stored = NO_HISTORIES
        if any(observer.needs_histories for observer in self._observers):
            served = Histories(self._histories(of, end - TOKENS_PER_STEP, 0), found)
            stored = Histories(
                self._histories(of, end, TOKENS_PER_STEP), ~derived, rounded=self._shift is not None
            )
        event = NodesExpanded(self.tree.expanded, of.nodes, actions, served, stored, outputs)
        for observer in self._observers:
            observer.nodes_expanded(event)

    def _histories(self, of: Parents, end: int, new: int) -> list[torch.Tensor]:
        """Copies of what stands beside the rows in front of column ``end``, ``new`` tokens of the children
        among them, as the next step is handed it."""
        window, kept = self._window, self._resources.window.kept
        histories = []
        for row, (length, path) in enumerate(zip(of.lengths.tolist(), of.on_path.tolist(), strict=True)):
            beside = self._shown[row].flatten(0, 1)
            ahead = beside[:, :, window - (length - path) : window]
            kv = torch.cat([ahead, beside[:, :, end - new - path : end]], dim=2)
            if kv.shape[2] > kept:
                kv = kv[:, :, TOKENS_PER_STEP:]
                if self._shift is not None:
                    moves = self._shift[:kept] - self._shift[TOKENS_PER_STEP : kept + TOKENS_PER_STEP]
                    kv = kv + moves.permute(1, 2, 3, 0, 4).flatten(0, 1)
            histories.append(kv.transpose(1, 2).flatten(2).clone())
        return histories


class SearchByLatent:
    """A search whose parents are named by (row, digest of the latent state), for callers without a tree.

    Where one row has several nodes with the same latent state, the newest answers: they have one name.
    A latent state that the search never produced is refused.

    Args:
        search: a search that has just begun.
        root_latents: ``[B, 1, embed]``.
    """

    def __init__(self, world_model: Any, search: Search, root_latents: np.ndarray) -> None:
        self._search = search
        self._world_model = world_model
        self._numbers: dict[tuple[int, int], int] = {}
        self._name(root_latents, ROOT)

    def expand(self, latents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add a child to the node of each row that has this latent state.

        Args:
            latents: ``[B, 1, embed]``.
            actions: as in :meth:`Search.expand`.

        Raises:
            ValueError: a latent state belongs to no node of its row, or there is not one possible action for
                each row. Nothing is changed.
            RuntimeError: the model predicts nan or inf.
        """
        check_actions(self._world_model, actions, len(latents))
        digests = list(enumerate(digest_rows(latents)))
        unknown = [row for row, digest in digests if (row, digest) not in self._numbers]
        if unknown:
            raise ValueError(
                f'expected latent states of this search (its roots or what recurrent inference returned), '
                f'got others in rows {unknown}; begin a new search with simulation_index=0'
            )
        parents = np.array([self._numbers[row, digest] for row, digest in digests], dtype=np.int64)
        outputs = self._search.expand(parents, actions)
        told = (outputs.hidden, outputs.latent, outputs.reward)
        if not all(part is None or torch.isfinite(part).all() for part in told):
            raise RuntimeError(
                'expected finite predictions, got nan or inf; check the weights of the world model'
            )
        assert outputs.latent is not None  # None at roots alone
        self._name(outputs.latent, self._search.expanded)
        return outputs

    def _name(self, latents: np.ndarray | torch.Tensor, number: int) -> None:
        self._numbers.update(dict.fromkeys(enumerate(digest_rows(latents)), number))
