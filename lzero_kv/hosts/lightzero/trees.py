"""Search trees that share their roots' histories: one buffer for each row, and a mask for each node.

A child's history is its parent's and two tokens more. Over a long context copying the shared part costs more
than computing the two tokens. So each row of a search has one run of columns: the root's history, then two
columns for every simulation, in which the keys and values of that node's action and observation stay where
the projections wrote them. A node's history is a subset of the columns, its root's and those of the nodes on
its path, and attention is told by a mask; the order of the columns is the order of the history. Nothing is
loaded, stored or copied, and a token's keys and values are the same numbers as in a history of its own.

That holds until a window is full: then positions and context of everything that is kept change, and the node
has a history of its own (:class:`Branch` joins both kinds in one batch).
"""

from __future__ import annotations

import numpy as np
import torch

from .flight import Flight, Flights
from .observer import Histories
from .transformer import Columns, additive_mask, append_token


class SearchTrees:
    """Keys and values of the trees of one search.

    Args:
        kv: ``[B, 2 * layers, width + 2 * simulations, embed]``, finite; the first ``width`` columns hold the
            roots' histories, right-aligned. Written in place.
        lengths: int64 ``[B]``, tokens of the roots' histories.
        simulations: children each row will get at most.
    """

    def __init__(self, flights: Flights, kv: torch.Tensor, lengths: np.ndarray, simulations: int) -> None:
        self._flights = flights
        self._width = kv.shape[2] - 2 * simulations
        self._rows = np.arange(len(kv))
        self.kv = kv
        # bool [simulations + 1, B, columns]: what each node's history is made of
        self._visible = np.zeros((simulations + 1, len(kv), kv.shape[2]), dtype=bool)
        self._visible[0, :, : self._width] = np.arange(self._width) >= self._width - lengths[:, None]

    def history(self, row: int, node: int) -> torch.Tensor:
        """A copy of the keys and values of a node's history, ``[2 * layers, tokens, embed]``; not of a node
        whose window moved."""
        return self.kv[row][:, torch.from_numpy(self._visible[node, row])]

    def branch(
        self,
        simulation: int,
        parents: np.ndarray,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        apart: tuple[np.ndarray, Flight] | None,
    ) -> Branch:
        """Begin the children that ``simulation`` adds; arguments as of :class:`Branch`."""
        own = self._width + 2 * (simulation - 1)
        self._visible[simulation] = self._visible[parents, self._rows]
        self._visible[simulation, :, own : own + 2] = True
        visible = self._visible[simulation, :, : own + 2]
        return Branch(self._flights, self.kv, visible, lengths, next_positions, apart)


class Branch:
    """One batch of children between their action and their observation, as :class:`Flight`.

    Args:
        kv: of the trees; the children write to the last two columns of ``visible``.
        visible: bool ``[B, columns]``: the children's histories, their own two tokens included.
        lengths, next_positions: int64 ``[B]``, of the parents.
        apart: rows (int64 ``[N]``) whose parent's window moved, and their flight; their answers come from
            there.
    """

    def __init__(
        self,
        flights: Flights,
        kv: torch.Tensor,
        visible: np.ndarray,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        apart: tuple[np.ndarray, Flight] | None,
    ) -> None:
        self._flights = flights
        self._kv = kv
        self._visible = visible
        self._column = visible.shape[1] - 2
        self._apart = apart
        self.lengths = lengths
        self.next_positions = next_positions

    def append(self, x: torch.Tensor) -> torch.Tensor:
        """Append one token to every row: raw embeddings ``[B, embed]`` to the transformer's output."""
        flights, own = self._flights, self._column
        placed, rotation = flights.positions.place(x, self.lengths, self.next_positions)
        mask = additive_mask(self._visible[:, : own + 1], x)
        columns = Columns.of_buffer(self._kv, (0, own), flights.prepared.heads, mask)
        hidden = append_token(flights.prepared, columns, placed, rotation)
        if self._apart is not None:
            rows, flight = torch.from_numpy(self._apart[0]).to(x.device), self._apart[1]
            hidden = hidden.index_copy(0, rows, flight.append(x[rows]))
        self._column += 1
        self.lengths, self.next_positions = self.lengths + 1, self.next_positions + 1
        return hidden

    def histories(self, present: np.ndarray) -> Histories:
        """A copy of what the rows hold between steps: before the first token, or after :meth:`slide`."""
        shown = self._visible[:, : self._column]
        kv = self._kv.new_zeros(*self._kv.shape[:2], int(self.lengths.max()), self._kv.shape[3])
        for row, length in enumerate(self.lengths.tolist()):
            columns = torch.from_numpy(np.flatnonzero(shown[row])[-length:])
            kv[row, :, kv.shape[2] - length :] = self._kv[row][:, columns]
        if self._apart is not None and self._column + 2 == self._visible.shape[1]:
            rows, apart = torch.from_numpy(self._apart[0]), self._apart[1].histories(present[self._apart[0]])
            width = min(kv.shape[2], apart.kv.shape[2])
            kv[rows, :, kv.shape[2] - width :] = apart.kv[:, :, apart.kv.shape[2] - width :]
        return Histories(kv, self.lengths.copy(), present)

    def slide(self) -> np.ndarray:
        """Let the oldest step of full windows go; bool ``[B]``: rows whose window moved."""
        self.lengths, moved = self._flights.window.advance(self.lengths)
        return moved
