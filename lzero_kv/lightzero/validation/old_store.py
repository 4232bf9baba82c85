"""The old system's cache alone: mode ``store``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.lightzero.inference.events import NodesExpanded, RootsInferred, SearchBegun
from lzero_kv.lightzero.validation import evidence
from lzero_kv.lightzero.validation.enactment import HostStep
from lzero_kv.lightzero.validation.old_system import CRASHED, UNREAD, WIPED, OldSystem
from lzero_kv.lightzero.validation.opinion import HostOpinion, RowTruth
from lzero_kv.lightzero.validation.twin import HistoryName, Trace, contents
from lzero_kv.validation.causes import Cause


class OldStore(OldSystem):
    """Mode ``store``: the host's dictionaries and rings hold what the manager stores, under the host's
    keys."""

    def roots(
        self,
        event: RootsInferred,
        names: Sequence[HistoryName],
        asked: Sequence[HistoryName | None],
        truths: Sequence[RowTruth],
        host_last: tuple[torch.Tensor, Sequence[Any]],
        start_pos: Any,
    ) -> list[HostOpinion | None]:
        """One opinion for each row; afterwards the host's structures hold the new roots."""
        traces = self.root_traces(event, host_last)
        opinions: list[HostOpinion | None] = [
            self._root(event, row, traces[row], asked[row], truths[row], host_last)
            for row in range(len(names))
        ]
        self.twin.naming = names
        self._latents = [event.latents]
        for row in range(min(len(names), self.twin.env_num)):
            self.twin.keep(
                row, event.latents[row], event.stored.row(row), root=True, exact=not event.stored.rounded
            )
        self.twin.past_kv_cache_recurrent_infer.clear()
        return opinions

    def _root(
        self,
        event: RootsInferred,
        row: int,
        trace: Trace | None,
        asked: HistoryName | None,
        truth: RowTruth,
        host_last: tuple[torch.Tensor, Sequence[Any]],
    ) -> HostOpinion:
        causes = self.root_served_causes(event, row, trace, asked, host_last)
        if trace is None:
            alone = HostStep(
                None, None, truth.action, truth.latent, 0, False, truth.positions, truth.positions, True
            )
            return HostOpinion(
                WIPED, None, explain=lambda: causes, moved=lambda: self._enactment.of(alone).answers
            )
        if trace.place is None:
            latent = self.twin.tokenizer.encode_to_obs_embeddings(host_last[0][row][None])
            kv = self.restart(latent, int(event.timesteps[row]))
        else:
            kv = contents(trace.entry)
        found = bool(event.served.present[row])
        return self._opinion(trace, asked, kv, truth, causes, found=found, root=True)

    def _opinion(
        self,
        trace: Trace,
        asked: HistoryName | None,
        kv: torch.Tensor,
        truth: RowTruth,
        causes: frozenset[Cause] | None,
        *,
        found: bool,
        root: bool,
    ) -> HostOpinion:
        """``found``: whether the manager had the entry too, and did not compute it again."""
        action, at = truth.action, truth.positions
        step = HostStep(kv, action, action, truth.latent, 0, False, at, at, root)
        return HostOpinion(
            trace.key,
            kv,
            exact=found and trace.owner is not None and trace.owner.history == asked and trace.owner.exact,
            explain=lambda: causes,
            moved=lambda: self._enactment.of(step).answers,
        )

    def begin(self, event: SearchBegun, rows: int) -> None:
        """A search begins; its first ``rows`` rows will be compared."""
        self._reanalysis = not event.from_roots
        self._latents = [torch.as_tensor(event.latents[:rows])]

    def nodes(
        self,
        event: NodesExpanded,
        names: Sequence[HistoryName],
        asked: Sequence[HistoryName],
        truths: Sequence[RowTruth],
        depths: np.ndarray,
        timesteps: np.ndarray,
        start_pos: Any,
    ) -> list[HostOpinion | None]:
        """One opinion for each row; afterwards the host's structures hold the new nodes."""
        opinions: list[HostOpinion | None] = []
        told = self.host_timesteps(timesteps, start_pos)
        for row, truth in enumerate(truths):
            parent = int(event.parents[row])
            latent = self._latents[parent][row]
            if self._reanalysis:
                causes = self.restart_causes(parent, int(told[row]), int(timesteps[row]))
                trace, kv = Trace(UNREAD), self.restart(latent, int(told[row]))
            else:
                trace = self.twin.trace_node(row, latent)
                causes = evidence.served_causes(trace, asked[row])
                if trace.place is None:
                    opinions.append(HostOpinion(trace.key, None, explain=lambda: CRASHED))
                    continue
                kv = contents(trace.entry)
            found = bool(event.served.present[row])
            opinions.append(self._opinion(trace, asked[row], kv, truth, causes, found=found, root=False))
        latents = event.outputs.latent
        assert latents is not None  # None at roots alone
        self._latents.append(latents)
        if not self._reanalysis:
            self.twin.naming = names
            for row in range(len(names)):
                present = bool(event.stored.present[row])
                kv = event.stored.row(row) if present else truths[row].stored
                self.twin.keep(row, latents[row], kv, root=False, exact=present and not event.stored.rounded)
        return opinions

    def settle(self, row: int, opinion: HostOpinion, truth: RowTruth) -> None:
        """Nothing to note: what is stored is the manager's."""
