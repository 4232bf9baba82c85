"""Common part of both modes of validation: what the stock code looks up, and what it begins again from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import digest_rows
from lzero_kv.lightzero.inference.events import NodesExpanded, RootsInferred, SearchBegun
from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation import causes as proofs
from lzero_kv.validation.causes import StepReplay
from lzero_kv.validation.histories import HistoryName
from lzero_kv.validation.rows import Causes, StockRow, Truth
from lzero_kv.validation.stock import Lookup, StockWorldModel, contents

NO_ACTION = -1
"""LightZero's last action where an episode begins."""
CRASHED = frozenset({Cause.CRASHED})
RESTARTED = frozenset({Cause.RESTARTED})
UNREAD = 'none: nothing is read in reanalysis'
WIPED = 'none: its last inputs were wiped'


@dataclass(frozen=True)
class RootBatch:
    """One root inference to repeat.

    Attributes:
        event: the inference.
        names: the new roots, one per row.
        asked: the history that each row continues; None where an episode begins.
        truths: one per row.
        observations, actions: the last inputs that LightZero alone would have passed.
        start_pos: as the caller gave it.
    """

    event: RootsInferred
    names: Sequence[HistoryName]
    asked: Sequence[HistoryName | None]
    truths: Sequence[Truth]
    observations: torch.Tensor
    actions: Sequence[Any]
    start_pos: Any


@dataclass(frozen=True)
class NodeBatch:
    """One simulation to repeat.

    Attributes:
        event: the inference.
        names: the new nodes, one per row.
        asked: the parents.
        truths: one per row.
        depths: int64 ``[B]`` of the new nodes.
        timesteps: int64 ``[B]`` of the roots.
        start_pos: as the caller gave it.
    """

    event: NodesExpanded
    names: Sequence[HistoryName]
    asked: Sequence[HistoryName]
    truths: Sequence[Truth]
    depths: np.ndarray
    timesteps: np.ndarray
    start_pos: Any


class NoStock:
    """Mode ``recompute``: nothing stands beside the recomputation."""

    def begin(self, event: SearchBegun, rows: int) -> None:
        """Nothing to begin."""

    def roots(self, batch: RootBatch) -> list[StockRow | None]:
        """No answers."""
        return [None] * len(batch.names)

    def nodes(self, batch: NodeBatch) -> list[StockRow | None]:
        """No answers."""
        return [None] * len(batch.names)

    def store(self, row: int, truth: Truth) -> None:
        """Nothing to record."""


class StockMode:
    """Common part of both modes with stock: how the stock code looks for roots, and what it restarts from.

    Args:
        stock: the stock world model.
        replay: repeats its steps.
    """

    _latents: list[torch.Tensor]

    def __init__(self, stock: StockWorldModel, replay: StepReplay) -> None:
        self.stock = stock
        self._replay = replay
        self._reanalysis = False

    def begin(self, event: SearchBegun, rows: int) -> None:
        """Begin a search of whose rows the first ``rows`` are compared."""
        self._reanalysis = not event.from_roots
        self._latents = [torch.as_tensor(event.latents[:rows])]

    def store(self, row: int, truth: Truth) -> None:
        """Record why what the stock model stored for ``row`` is wrong; nothing where it stores ours."""

    def _begins(self, actions: Sequence[Any]) -> bool:
        """Whether the stock code takes all rows for the first step of an episode."""
        if self.stock.continuous_action_space:
            return not isinstance(actions[0], np.ndarray)
        return max(actions) == NO_ACTION

    def _crashes(self, batch: RootBatch) -> bool:
        """Whether the stock root inference must end with an error.

        It has room for fewer rows, fewer last inputs than rows, or windows too short for the last
        observation, an action and the new one.
        """
        rows, last = len(batch.names), len(batch.observations)
        if max(rows, last) > self.stock.env_num:
            return True
        return not self._begins(batch.actions) and (last < rows or self.stock.context_length < 3)

    def _root_lookups(self, batch: RootBatch) -> list[Lookup | None]:
        """The lookup of each row's last root; None where there is none."""
        rows = len(batch.names)
        if self._begins(batch.actions) or self._crashes(batch):
            return [None] * rows
        latents = self.stock.tokenizer.encode_to_obs_embeddings(batch.observations)
        return [self.stock.lookup_root(row, latents[row]) for row in range(rows)]

    def _root_causes(self, batch: RootBatch, row: int, lookup: Lookup | None) -> Causes | None:
        """Causes for which the root that the stock code continues is not the row's own."""
        asked, event = batch.asked[row], batch.event
        if lookup is None:
            if self._crashes(batch):
                return CRASHED
            return frozenset() if event.first[row] else RESTARTED
        if not lookup.found:
            lost = asked is not None and self.stock.has_root(row, asked)
            return frozenset({Cause.ROOT_LOST}) if lost else RESTARTED
        own, given = event.last_observations[row], batch.observations[row]
        other = digest_rows(given[None]) != digest_rows(own[None])
        return proofs.served_causes(lookup, asked or HistoryName(event.env_ids[row], -1, 0), other)

    def _stock_timesteps(self, batch: NodeBatch) -> np.ndarray:
        """Timesteps (int64 ``[B]``) as the stock code reads them: in reanalysis it takes 0 for the last step
        of each sequence."""
        if not self._reanalysis or np.ndim(batch.start_pos) < 2:
            return batch.timesteps
        given = np.shape(batch.start_pos)[1]
        return np.where(np.arange(len(batch.timesteps)) % (given + 1) == given, 0, batch.timesteps)

    def _restart_causes(self, parent: int, stock_timestep: int, timestep: int) -> Causes | None:
        """Causes for which the one token that reanalysis begins a node with is not the node's history."""
        if parent:
            return RESTARTED
        rotated = self.stock.config.rotary_emb and stock_timestep != timestep
        return frozenset({Cause.ROTARY_POSITION}) if rotated else None

    def _restart(self, latent: torch.Tensor, timestep: int) -> torch.Tensor:
        """Keys and values of a history of one latent state, as the stock code makes them after a miss."""
        stock = self.stock
        entry = stock.transformer.generate_empty_keys_values(n=1, max_tokens=stock.context_length)
        stock.forward(
            {'obs_embeddings': latent.reshape(1, 1, -1)},
            past_keys_values=entry,  # pyright: ignore[reportArgumentType]  # LightZero says Tensor
            is_init_infer=True,
            start_pos=timestep,
        )
        return contents(entry)
