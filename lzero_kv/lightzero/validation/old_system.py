"""The old system, asked about every row: what its cache alone and its whole model have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import digest_rows
from lzero_kv.lightzero.inference.events import RootsInferred
from lzero_kv.lightzero.inference.roots import NO_ACTION
from lzero_kv.lightzero.validation import evidence
from lzero_kv.lightzero.validation.enactment import Enactment
from lzero_kv.lightzero.validation.twin import HistoryName, HostTwin, Trace, contents
from lzero_kv.validation.causes import Cause
from lzero_kv.validation.deviation import Tolerance

CRASHED = frozenset({Cause.CRASHED})
RESTARTED = frozenset({Cause.RESTARTED})
UNREAD = 'none: nothing is read in reanalysis'
WIPED = 'none: its last inputs were wiped'


class OldSystem:
    """What both modes share: the twin, and how the host would look for roots.

    Args:
        twin: the host's world model and cache.
        enactment: repeats its steps.
        tolerance: of comparisons in which exactness is not due.
    """

    def __init__(self, twin: HostTwin, enactment: Enactment, tolerance: Tolerance) -> None:
        self.twin = twin
        self._enactment = enactment
        self._tolerance = tolerance
        self._running = True
        self._reanalysis = False

    def close(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether rounding explains the difference."""
        return self._tolerance.close(a, b)

    def host_begins(self, actions: Sequence[Any]) -> bool:
        """Whether the host takes all rows for the first step of an episode."""
        if self.twin.continuous_action_space:
            return not isinstance(actions[0], np.ndarray)
        return max(actions) == NO_ACTION

    def host_crashes(self, rows: int, host_last: tuple[torch.Tensor, Sequence[Any]]) -> bool:
        """Whether the host's root inference must end with an error: it has room for fewer than ``rows`` rows,
        fewer last inputs, or windows too short for the last observation, an action and the new one."""
        observations, actions = host_last
        if max(rows, len(observations)) > self.twin.env_num:
            return True
        return not self.host_begins(actions) and (len(observations) < rows or self.twin.context_length < 3)

    def root_traces(
        self, event: RootsInferred, host_last: tuple[torch.Tensor, Sequence[Any]]
    ) -> list[Trace | None]:
        """What the host's lookup of each row's last root meets; None where it looks for nothing."""
        observations, actions = host_last
        rows = len(event.env_ids)
        if self.host_begins(actions) or self.host_crashes(rows, host_last):
            return [None] * rows
        latents = self.twin.tokenizer.encode_to_obs_embeddings(observations)
        return [self.twin.trace_root(row, latents[row]) for row in range(rows)]

    def root_served_causes(
        self,
        event: RootsInferred,
        row: int,
        trace: Trace | None,
        asked: HistoryName | None,
        host_last: tuple[torch.Tensor, Sequence[Any]],
    ) -> frozenset[Cause] | None:
        """Why the root that the host continues is not the row's own."""
        if trace is None:
            if self.host_crashes(len(event.env_ids), host_last):
                return CRASHED
            return frozenset() if event.first[row] else RESTARTED
        if trace.place is None:
            lost = asked is not None and any(at == row for at, _ in self.twin.has_root(asked))
            return frozenset({Cause.ROOT_LOST}) if lost else RESTARTED
        own = event.last_observations[row]
        other = digest_rows(host_last[0][row][None]) != digest_rows(own[None])
        return evidence.served_causes(trace, asked or HistoryName(event.env_ids[row], -1, 0), other)

    def host_timesteps(self, timesteps: np.ndarray, start_pos: Any) -> np.ndarray:
        """Timesteps (int64 ``[B]``) as the host reads them: in reanalysis it takes 0 for the last step of
        each sequence, of which it is told nothing."""
        if not self._reanalysis or np.ndim(start_pos) < 2:
            return timesteps
        told = np.shape(start_pos)[1]
        return np.where(np.arange(len(timesteps)) % (told + 1) == told, 0, timesteps)

    def restart_causes(self, parent: int, host_timestep: int, timestep: int) -> frozenset[Cause] | None:
        """Why what reanalysis begins every node with is not the node's history."""
        if parent:
            return RESTARTED
        rotated = self.twin.config.rotary_emb and host_timestep != timestep
        return frozenset({Cause.ROTARY_POSITION}) if rotated else None

    def restart(self, latent: torch.Tensor, timestep: int) -> torch.Tensor:
        """Keys and values of a history of one latent state, as the host makes them after a miss."""
        twin = self.twin
        entry = twin.transformer.generate_empty_keys_values(n=1, max_tokens=twin.context_length)
        twin.forward(
            {'obs_embeddings': latent.reshape(1, 1, -1)},
            past_keys_values=entry,  # pyright: ignore[reportArgumentType]  # the host says Tensor
            is_init_infer=True,
            start_pos=timestep,
        )
        return contents(entry)
