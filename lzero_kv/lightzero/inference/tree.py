"""What is known of the nodes of one search, a tree for each row: numbers, no keys and values.

A node owns its step, that is its action and observation token; its parent; and its position. What it attends
to is a stored window and the path of steps behind it:

- the child of a node keeps its parent's window, and its path is one step longer;
- where that window would overflow and windows are exact, the child gets a *derived window* of its own: the
  newest tokens, computed from their raw embeddings when the child is expanded for the first time;
- with ``window='shift'`` the oldest steps are left out of sight, and nothing is computed anew.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lzero_kv.cache.transfer import sender
from lzero_kv.cache.window import TOKENS_PER_STEP

ROOT = 0
"""Number of a root; the node that simulation ``i`` adds (counted from 1) has number ``i``."""


class Parents(NamedTuple):
    """The nodes that a simulation expands, one of each row; int64 ``[B]`` each.

    Attributes:
        nodes: their numbers.
        windows: the nodes whose windows they attend to.
        below: steps between that window and the node.
        lengths: tokens of their histories.
        next_positions: logical positions of their next tokens.
    """

    nodes: np.ndarray
    windows: np.ndarray
    below: np.ndarray
    lengths: np.ndarray
    next_positions: np.ndarray

    @property
    def on_path(self) -> np.ndarray:
        """Tokens of the history that stand in the path, int64 ``[B]``."""
        return np.minimum(TOKENS_PER_STEP * self.below, self.lengths)


class SearchTree:
    """Grows by one node for each row and simulation.

    Args:
        tokens: ``[B, T, embed]`` raw embeddings of the roots' windows, right-aligned.
        lengths, next_positions: int64 ``[B]``, of the roots.
        simulations: children each row will get at most.
        kept: tokens that a window keeps.
        exact: whether windows that overflow are derived anew.
        stored_steps: simulations whose steps are stored; nodes of later ones get windows of their own.

    Attributes:
        expanded: simulations so far.
        tokens: ``[B, T + 2 * simulations, embed]``, every raw token: of the roots, then of each simulation.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        simulations: int,
        kept: int,
        exact: bool,
        stored_steps: int,
    ) -> None:
        rows, width, embed = tokens.shape
        self.simulations = simulations
        self.expanded = 0
        self._kept = kept
        self._exact = exact
        self._stored_steps = stored_steps
        self._rows = np.arange(rows)
        self._send = sender(tokens.device)
        self._next_positions = next_positions
        self._root_width = width
        nodes = simulations + 1
        self.parents = np.full((nodes, rows), ROOT, np.int64)
        self._depths = np.zeros((nodes, rows), np.int64)
        self._lengths = np.zeros((nodes, rows), np.int64)
        self._lengths[ROOT] = lengths
        self._windows = np.full((nodes, rows), ROOT, np.int64)
        self._below = np.zeros((nodes, rows), np.int64)
        # the newest steps on the way down to each node, itself last; read as far as ``below`` says
        self._paths = np.zeros((nodes, rows, self.longest_path(simulations, kept)), np.int64)
        self.tokens = tokens.new_zeros(rows, width + (2 * simulations if exact else 0), embed)
        self.tokens[:, :width] = tokens
        # the columns of ``tokens`` that each node's history shows, newest last
        self._shown = np.zeros((nodes if exact else 1, rows, kept), np.int64)
        self._shown[ROOT, :, kept - width :] = np.arange(width)

    @staticmethod
    def longest_path(simulations: int, kept: int) -> int:
        """Steps of the longest path that a node looks at."""
        return min(simulations, (kept + 1) // TOKENS_PER_STEP)

    def of(self, parents: np.ndarray) -> Parents:
        """What is known of nodes, int64 ``[B]``, one of each row.

        Raises:
            ValueError: a node does not exist yet, or the search has no simulation left.
        """
        rows = self._rows
        if self.expanded == self.simulations:
            raise ValueError(
                f'expected at most {self.simulations} simulations, got one more; begin a new search'
            )
        if len(parents) != len(rows) or parents.min() < ROOT or parents.max() > self.expanded:
            raise ValueError(
                f'expected {len(rows)} parents in [0, {self.expanded}], got {np.asarray(parents).tolist()}'
            )
        at = parents * len(rows) + rows
        return Parents(
            parents,
            self._windows.take(at),
            self._below.take(at),
            self._lengths.take(at),
            self._next_positions + TOKENS_PER_STEP * self._depths.take(at),
        )

    def path(self, parents: Parents) -> np.ndarray:
        """The steps between the windows and the nodes, int64 ``[B, depth]``, right-aligned: numbers of nodes
        whose steps are stored; in front of shorter paths stands one of them, or ``ROOT``."""
        depth = min(int(parents.below.max()), self._paths.shape[2])
        if not depth:
            return np.zeros((len(self._rows), 0), np.int64)
        return self._paths[parents.nodes, self._rows, self._paths.shape[2] - depth :]

    def window_tokens(self, rows: np.ndarray, nodes: np.ndarray, columns: int) -> torch.Tensor:
        """Raw embeddings ``[N, columns, embed]`` of the newest tokens of nodes' histories; ``rows`` and
        ``nodes`` int64 ``[N]``."""
        shown = self._shown[nodes, rows, self._kept - columns :]
        at = self._send((shown + (rows * self.tokens.shape[1])[:, None]).reshape(-1))
        return self.tokens.flatten(0, 1).index_select(0, at).unflatten(0, shown.shape)

    def shown(self, parents: Parents) -> np.ndarray:
        """Rows of ``tokens.flatten(0, 1)`` that the nodes' windows show, int64 ``[B, kept]``."""
        begins = self._rows * self.tokens.shape[1]
        return self._shown[parents.windows, self._rows] + begins[:, None]

    def lengths(self, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Tokens of nodes' histories; int64 ``[N]`` each."""
        return self._lengths[nodes, rows]

    def next_positions(self, rows: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Logical positions of nodes' next tokens; int64 ``[N]`` each."""
        return self._next_positions[rows] + TOKENS_PER_STEP * self._depths[nodes, rows]

    @property
    def next_column(self) -> int:
        """The column of :attr:`tokens` where the next action goes; its observation stands behind it."""
        return self._root_width + TOKENS_PER_STEP * self.expanded

    def keep_steps(self, simulations: int) -> None:
        """Set the number of simulations whose steps are stored."""
        self._stored_steps = simulations

    def will_derive(self, parents: Parents) -> np.ndarray:
        """bool ``[B]``: whether the next children get derived windows."""
        if not self._exact:
            return np.zeros(len(self._rows), dtype=bool)
        if self.expanded >= self._stored_steps:
            return np.ones(len(self._rows), dtype=bool)
        return parents.lengths + TOKENS_PER_STEP > self._kept

    def add(self, parents: Parents) -> np.ndarray:
        """Add a child to every row.

        Returns:
            bool ``[B]``: children that get a derived window.
        """
        rows, nodes = self._rows, parents.nodes
        column = self.next_column
        number = self.expanded + 1
        derived = self.will_derive(parents)
        self.parents[number] = nodes
        self._depths[number] = self._depths.take(nodes * len(rows) + rows) + 1
        self._lengths[number] = np.minimum(parents.lengths + TOKENS_PER_STEP, self._kept)
        paths = self._paths
        paths[number, :, :-1] = paths[nodes, rows, 1:]
        paths[number, :, -1] = number
        self.expanded = number
        if not self._exact:
            self._windows[number] = parents.windows
            self._below[number] = parents.below + 1
            return derived
        paths[number, derived] = ROOT
        self._windows[number] = np.where(derived, number, parents.windows)
        self._below[number] = np.where(derived, 0, parents.below + 1)
        shown = self._shown[number]
        shown[:, :-2] = self._shown[nodes, rows, 2:]
        shown[:, -2:] = (column, column + 1)[-shown.shape[1] :]
        return derived
