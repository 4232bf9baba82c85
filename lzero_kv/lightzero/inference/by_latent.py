"""Finds parents for callers that know a node only by its latent state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import digest_rows
from lzero_kv.lightzero.inference.heads import StepOutputs, check_actions
from lzero_kv.lightzero.inference.nodes import SearchNodes
from lzero_kv.lightzero.inference.trees import ROOT


class NodesByLatent:
    """A search whose parents are named by (row, digest of the latent state).

    Where one row has several nodes with the same latent state, the newest answers: nothing tells them apart.
        A latent
    state that the search never produced is refused.

    Args:
        nodes: a search that has just begun.
        root_latents: ``[B, 1, embed]``.
    """

    def __init__(self, world_model: Any, nodes: SearchNodes, root_latents: np.ndarray) -> None:
        self._nodes = nodes
        self._world_model = world_model
        self._numbers: dict[tuple[int, int], int] = {}
        self._name(root_latents, ROOT)

    def expand(self, latents: np.ndarray, actions: torch.Tensor) -> StepOutputs:
        """Add a child to the node of each row that has this latent state.

        Args:
            latents: ``[B, 1, embed]``.
            actions: as in :meth:`SearchNodes.expand`.

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
        outputs = self._nodes.expand(parents, actions)
        told = (outputs.hidden, outputs.latent, outputs.reward)
        if not all(part is None or torch.isfinite(part).all() for part in told):
            raise RuntimeError(
                'expected finite predictions, got nan or inf; check the weights of the world model'
            )
        assert outputs.latent is not None  # None at roots alone
        self._name(outputs.latent, self._nodes.expanded)
        return outputs

    def _name(self, latents: np.ndarray | torch.Tensor, number: int) -> None:
        self._numbers.update(dict.fromkeys(enumerate(digest_rows(latents)), number))
