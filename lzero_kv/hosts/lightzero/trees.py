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

from collections.abc import Sequence

import numpy as np
import torch

from lzero_kv.window import TOKENS_PER_STEP

from .flight import Flight, Flights
from .observer import Histories
from .transformer import Columns, additive_mask, append_tokens


class SearchTrees:
    """Keys and values of the trees of one search.

    Args:
        layers: for each layer ``[B, 2, width_l + 2 * simulations, embed]``, finite; the first ``width_l``
            columns hold the roots' histories, right-aligned. Written in place.
        held: int64 ``[B, D]``, tokens of the roots' histories: the same in all layers (``D`` 1), or in each.
        simulations: children each row will get at most.
    """

    def __init__(
        self, flights: Flights, layers: Sequence[torch.Tensor], held: np.ndarray, simulations: int
    ) -> None:
        self.flights = flights
        self._rows = np.arange(len(held))
        self._width = max(layer.shape[2] for layer in layers) - 2 * simulations
        self.layers = layers
        heads = flights.prepared.heads
        self._split = [layer.unflatten(-1, (heads, -1)).transpose(2, 3).unbind(1) for layer in layers]
        # bool [simulations + 1, B, D, columns of the widest layer]: what each node's history is made of
        columns = self._width + 2 * simulations
        self._visible = np.zeros((simulations + 1, *held.shape, columns), dtype=bool)
        self._visible[0, ..., : self._width] = np.arange(self._width) >= self._width - held[..., None]

    def history(self, row: int, node: int) -> list[torch.Tensor]:
        """A copy of a node's keys and values, for each layer ``[2, tokens_l, embed]``; not of a node whose
        window moved."""
        return [
            layer[row][:, shown] for layer, shown in zip(self.layers, self._shown(row, node), strict=True)
        ]

    def _shown(self, row: int, node: int) -> list[torch.Tensor]:
        """bool ``[columns_l]`` for each layer."""
        visible = torch.from_numpy(self._visible[node, row])
        return [
            visible[min(number, len(visible) - 1), visible.shape[1] - layer.shape[2] :]
            for number, layer in enumerate(self.layers)
        ]

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
        self._visible[simulation, ..., own : own + 2] = True
        return Branch(self, simulation, lengths, next_positions, apart)

    def columns(self, simulation: int, token: int, like: torch.Tensor) -> Columns:
        """What the first or second token (0 or 1) of the children that ``simulation`` adds attends to."""
        end = self._width + 2 * (simulation - 1) + token + 1
        mask = additive_mask(self._visible[simulation, ..., :end], like)
        keys, values, own, masks = [], [], [], []
        for number, (layer, (k, v)) in enumerate(zip(self.layers, self._split, strict=True)):
            ahead = self._visible.shape[-1] - layer.shape[2]  # columns of the widest layer in front of it
            keys.append(k[:, :, : end - ahead])
            values.append(v[:, :, : end - ahead])
            own.append(layer[:, :, end - ahead - 1 : end - ahead])
            held = min(number, mask.shape[1] - 1)
            masks.append(mask[:, held : held + 1, ahead:])
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
        flights = self._trees.flights
        placed, rotation = flights.positions.place(
            x[:, None], self.lengths[:, None], self.next_positions[:, None]
        )
        columns = self._trees.columns(self._simulation, self._token, x)
        hidden = append_tokens(flights.prepared, columns, placed, rotation)
        if self._apart is not None:
            rows, flight = torch.from_numpy(self._apart[0]).to(x.device), self._apart[1]
            hidden = hidden.index_copy(0, rows, flight.append(x[rows]))
        self._token += 1
        self.lengths, self.next_positions = self.lengths + 1, self.next_positions + 1
        return hidden

    def histories(self, present: np.ndarray) -> Histories:
        """A copy of what the rows hold between steps: until :meth:`slide` what they were handed, then what
        they leave."""
        first = self._trees.layers[0]
        lengths, left_out = (self.lengths, 0) if self._slid else (self._loaded, TOKENS_PER_STEP)
        width = int(lengths.max())
        kv = first.new_zeros(len(first), 2 * len(self._trees.layers), width, first.shape[3])
        for row, length in enumerate(lengths.tolist()):
            history = torch.cat(self._trees.history(row, self._simulation))
            end = history.shape[1] - left_out
            kv[row, :, width - length :] = history[:, end - length : end]
        if self._apart is not None and not self._slid:
            rows, apart = torch.from_numpy(self._apart[0]), self._apart[1].histories(present[self._apart[0]])
            width = min(kv.shape[2], apart.kv.shape[2])
            kv[rows, :, kv.shape[2] - width :] = apart.kv[:, :, apart.kv.shape[2] - width :]
        return Histories(kv, lengths.copy(), present)

    def slide(self) -> np.ndarray:
        """Let the oldest step of full windows go; bool ``[B]``: rows whose window moved."""
        self.lengths, moved = self._trees.flights.window.advance(self.lengths)
        self._slid = True
        return moved
