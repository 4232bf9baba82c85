"""Search trees that share their roots' histories: each path is laid beside its root, and nothing else is
copied.

A child's history is its parent's and two tokens more. Over a long context copying the shared part costs more
than computing the two tokens. So a row of a search has its root's history in place for the whole search, and
behind it room for one path. A node's own two tokens are stored by themselves; a simulation gathers those of
the nodes between the root and the new child, lays them behind the root's history, and computes the child's
tokens behind them. A token's keys and values are the same numbers as in a history of its own, in the same
order. What a simulation costs depends on how deep it goes, not on how many went before it.

That holds until a window is full: then positions and context of everything that is kept change, and the node
has a history of its own (:class:`Branch` joins both kinds in one batch).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP
from lzero_kv.lightzero.inference.attention import Columns, additive_mask, append_tokens, columns_of_mask
from lzero_kv.lightzero.inference.events import Histories
from lzero_kv.lightzero.inference.flight import Flight
from lzero_kv.lightzero.inference.flights import Flights

ROOT = 0
"""Simulation number of a root; the node that simulation ``i`` adds (counted from 0) has number ``i + 1``."""


class SearchTrees:
    """Keys and values of the trees of one search.

    Args:
        memory: ``[elements]`` finite numbers of no meaning, as many as :meth:`elements` says.
        rows: of the search.
        widths: for each layer, tokens of the longest root.
        simulations: children each row will get at most.

    Attributes:
        roots: for each layer ``[B, 2, width_l, heads, head_dim]``, where the roots' histories belong,
            right-aligned.
    """

    def __init__(
        self, flights: Flights, memory: torch.Tensor, rows: int, widths: Sequence[int], simulations: int
    ) -> None:
        self.flights = flights
        self._widths = widths
        self._widest = max(widths)
        self._path = 0  # columns of the path that lies behind the roots
        self._rows = np.arange(rows)
        heads, embed = flights.heads, flights.manager.layout.embed_dim
        size, room = (heads, embed // heads), TOKENS_PER_STEP * simulations
        # Layers of one width are one block, so that a path is laid behind all of them with one copy:
        # [n, B, 2, heads, columns, head_dim], which layers, their width. Each head's tokens lie side by side,
        # because attention reads them at every token, and roots are most of what it reads.
        count = len(widths) if len(set(widths)) == 1 else 1
        firsts = range(0, len(widths), count)
        token = 2 * rows * embed
        parts = memory.split(
            [token * count * (widths[first] + room) for first in firsts] + [token * len(widths) * room]
        )
        self._blocks = [
            (part.view(count, rows, 2, heads, -1, size[1]), slice(first, first + count), widths[first])
            for first, part in zip(firsts, parts[:-1], strict=True)
        ]
        self._layers = [layer for block, _, _ in self._blocks for layer in block]
        # the two tokens of each node: [B, simulations, 2 tokens, layers, 2, heads, head_dim]
        self._nodes = parts[-1].view(rows, simulations, TOKENS_PER_STEP, len(widths), 2, *size)
        self._parents = np.zeros((simulations + 1, rows), dtype=np.int64)
        self._mask: torch.Tensor | None = None  # of the path that is laid
        self.roots = [
            layer[:, :, :, :width].transpose(2, 3) for layer, width in zip(self._layers, widths, strict=True)
        ]

    @staticmethod
    def elements(embed: int, rows: int, widths: Sequence[int], simulations: int) -> int:
        """Numbers that trees of these sizes take: a root's history and room for a path in each layer, and the
        nodes."""
        room = TOKENS_PER_STEP * simulations
        return 2 * embed * rows * sum(width + 2 * room for width in widths)

    def begin(self, held: np.ndarray) -> None:
        """The roots are in place: ``held`` int64 ``[B, D]``, their tokens, the same in all layers (``D`` 1)
        or in each."""
        self._held = held
        self._inside = np.arange(self._widest) >= self._widest - held[..., None]

    def history(self, row: int, node: int) -> list[torch.Tensor]:
        """A copy of a node's keys and values, for each layer ``[2, tokens_l, embed]``; not of a node whose
        window moved."""
        nodes, path = self._nodes[row], []
        while node != ROOT:
            path.append(node - 1)
            node = int(self._parents[node, row])
        histories = []
        for number, root in enumerate(self.roots):
            held = int(self._held[row, min(number, self._held.shape[1] - 1)])
            below = nodes[path[::-1], :, number].flatten(0, 1).transpose(0, 1)
            histories.append(torch.cat([root[row, :, root.shape[2] - held :], below], dim=1).flatten(2))
        return histories

    def branch(
        self,
        simulation: int,
        parents: np.ndarray,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        apart: tuple[np.ndarray, Flight] | None,
    ) -> Branch:
        """Begin the children that ``simulation`` adds; arguments as of :class:`Branch`."""
        self._parents[simulation] = parents
        if apart is not None:  # their path is not asked for, and would be the longest
            parents = parents.copy()
            parents[apart[0]] = ROOT
        path = self._path_to(parents)
        self._lay(path)
        between = np.repeat(path != ROOT, TOKENS_PER_STEP, axis=1)[:, None]
        behind = np.pad(between, ((0, 0), (0, 0), (0, TOKENS_PER_STEP)), constant_values=True)  # the child
        behind = np.broadcast_to(behind, (*self._inside.shape[:2], behind.shape[2]))
        visible = np.concatenate([self._inside, behind], axis=2)
        self._mask = None if visible.all() else additive_mask(visible, self._nodes)
        return Branch(self, simulation, lengths, next_positions, apart)

    def _path_to(self, nodes: np.ndarray) -> np.ndarray:
        """The nodes from below the root down to ``nodes``, int64 ``[B, depth]``; ``ROOT`` in front of shorter
        paths."""
        path = []
        while (nodes != ROOT).any():
            path.append(nodes)
            nodes = self._parents[nodes, self._rows]
        return np.stack(path[::-1], axis=1) if path else np.zeros((len(nodes), 0), dtype=np.int64)

    def _lay(self, path: np.ndarray) -> None:
        """Copy the tokens of a path's nodes behind the roots."""
        rows, depth = path.shape
        self._path = TOKENS_PER_STEP * depth
        if not depth:
            return
        stored = self._nodes.flatten(0, 1)
        at = self._rows[:, None] * self._nodes.shape[1] + np.maximum(path - 1, 0)
        tokens = stored.index_select(0, to_device(at.reshape(-1), stored.device))
        tokens = tokens.view(rows, depth, *stored.shape[1:]).permute(3, 0, 4, 5, 1, 2, 6)
        for block, layers, width in self._blocks:
            place = block[..., width : width + self._path, :]
            place.unflatten(-2, (depth, TOKENS_PER_STEP)).copy_(tokens[layers])

    def keep(self, simulation: int) -> None:
        """Store the two tokens of the children that ``simulation`` adds."""
        node = self._nodes[:, simulation - 1].permute(2, 0, 3, 4, 1, 5)
        for block, layers, width in self._blocks:
            first = width + self._path
            node[layers].copy_(block[..., first : first + TOKENS_PER_STEP, :])

    def columns(self, token: int) -> Columns:
        """What the first or second token (0 or 1) of the children attends to."""
        more = self._path + token + 1
        mask = self._mask
        keys, values, own, masks = [], [], [], []
        for number, (layer, width) in enumerate(zip(self._layers, self._widths, strict=True)):
            end = width + more
            keys.append(layer[:, 0, :, :end])
            values.append(layer[:, 1, :, :end])
            own.append(layer[:, :, :, end - 1 : end].transpose(2, 3))
            if mask is None:
                masks.append(None)
                continue
            held = min(number, mask.shape[1] - 1)
            shown = mask[:, held : held + 1]
            masks.append(columns_of_mask(shown, self._widest - width, self._widest + more))
        return Columns(keys, values, own, masks)


class Branch:
    """One batch of children between their action and their observation, as :class:`Flight`.

    Args:
        trees: where the children write.
        simulation: number of the children.
        lengths, next_positions: int64 ``[B]``, of the parents.
        apart: rows (int64 ``[N]``) whose parent's window moved, and their flight; their answers come from
            there.
    """

    def __init__(
        self,
        trees: SearchTrees,
        simulation: int,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        apart: tuple[np.ndarray, Flight] | None,
    ) -> None:
        self._trees = trees
        self._simulation = simulation
        self._token = 0
        self._apart = apart
        self._loaded, self._slid = lengths, False
        self.lengths = lengths
        self.next_positions = next_positions

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """Append one token to every row: raw embeddings ``[B, embed]`` to the transformer's output."""
        if self._apart is None:
            hidden = self._append(x)
        elif len(self._apart[0]) == len(x):
            hidden = self._apart[1].append(x)
        else:
            rows = to_device(self._apart[0], x.device)
            hidden = self._append(x).index_copy(0, rows, self._apart[1].append(x[rows]))
        self._token += 1
        self.lengths, self.next_positions = self.lengths + 1, self.next_positions + 1
        return hidden

    def _append(self, x: torch.Tensor) -> torch.Tensor:
        trees, flights = self._trees, self._trees.flights
        placed, rotation = flights.positions.place(
            x[:, None], self.lengths[:, None], self.next_positions[:, None]
        )
        hidden = append_tokens(flights.prepared, trees.columns(self._token), placed, rotation)
        if self._token + 1 == TOKENS_PER_STEP:
            trees.keep(self._simulation)
        return hidden

    def histories(self, present: np.ndarray) -> Histories:
        """A copy of what the rows hold between steps: until :meth:`slide` what they were handed, then what
        they leave."""
        lengths, left_out = (self.lengths, 0) if self._slid else (self._loaded, TOKENS_PER_STEP)
        whole = [torch.cat(self._trees.history(row, self._simulation)) for row in range(len(lengths))]
        width = int(lengths.max())
        kv = whole[0].new_zeros(len(whole), whole[0].shape[0], width, whole[0].shape[2])
        for row, (history, length) in enumerate(zip(whole, lengths.tolist(), strict=True)):
            end = history.shape[1] - left_out
            kv[row, :, width - length :] = history[:, end - length : end]
        if self._apart is not None and not self._slid:
            at, flight = self._apart
            apart = flight.histories(present[at])
            width = min(kv.shape[2], apart.kv.shape[2])
            newest = apart.kv[:, :, apart.kv.shape[2] - width :]
            kv[to_device(at, kv.device), :, kv.shape[2] - width :] = newest
        return Histories(kv, lengths.copy(), present)

    def slide(self) -> np.ndarray:
        """Let the oldest step of full windows go; bool ``[B]``: rows whose window moved."""
        self.lengths, moved = self._trees.flights.window.advance(self.lengths)
        self._slid = True
        return moved
