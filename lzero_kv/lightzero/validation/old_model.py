"""The old system's whole model: mode ``model``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.lightzero.inference.events import NodesExpanded, RootsInferred, SearchBegun
from lzero_kv.lightzero.validation import evidence
from lzero_kv.lightzero.validation.enactment import Enacted, HostStep
from lzero_kv.lightzero.validation.old_system import CRASHED, UNREAD, WIPED, OldSystem
from lzero_kv.lightzero.validation.opinion import HostOpinion, RowTruth
from lzero_kv.lightzero.validation.twin import HistoryName, Trace
from lzero_kv.validation.causes import Cause


class OldModel(OldSystem):
    """Mode ``model``: the host's world model runs every inference with its own cache and its own latents."""

    _analysis: dict[int, Callable[[], tuple[frozenset[Cause] | None, Enacted]]]

    def roots(
        self,
        event: RootsInferred,
        names: Sequence[HistoryName],
        asked: Sequence[HistoryName | None],
        truths: Sequence[RowTruth],
        host_last: tuple[torch.Tensor, Sequence[Any]],
        start_pos: Any,
    ) -> list[HostOpinion | None]:
        """One opinion for each row, by running the host's root inference on what the host would be given."""
        twin, rows = self.twin, len(names)
        traces = self.root_traces(event, host_last)
        served = [
            self.root_served_causes(event, row, traces[row], asked[row], host_last) for row in range(rows)
        ]
        twin.naming, twin.served, self._analysis = names, [], {}
        inputs = dict(obs=host_last[0], action=host_last[1], current_obs=event.observations)
        try:
            _, latents, _, policy, value = twin.forward_initial_inference(inputs, start_pos)
        except Exception as error:  # whatever the host's own code meets: that is its answer
            # Beside those inputs, the host's own code needs a timestep for each row of a continued episode.
            untimed = np.ndim(start_pos) == 0 and not self.host_begins(host_last[1])
            return self._crash(error, rows, untimed or self.host_crashes(rows, host_last))
        self._running = True
        self._latents = [latents]
        sizes = [kv.shape[1] for kv in twin.served] or [0] * rows
        opinions: list[HostOpinion | None] = []
        for row, (trace, truth) in enumerate(zip(traces, truths, strict=True)):
            kv = twin.served[row] if twin.served else None
            action = None if kv is None else self._enactment.embed_action(host_last[1][row])
            step = self._root_step(event, row, kv, max(sizes), truth, action, latents[row].reshape(-1))
            answers = {'policy': policy[row].reshape(-1), 'value': value[row].reshape(-1)}
            key = WIPED if trace is None else trace.key
            opinions.append(self._opinion(row, key, kv, answers, step, served[row], truth))
        return opinions

    def _root_step(
        self,
        event: RootsInferred,
        row: int,
        kv: torch.Tensor | None,
        longest: int,
        truth: RowTruth,
        action: torch.Tensor | None,
        latent: torch.Tensor,
    ) -> HostStep:
        now = 2 * int(event.timesteps[row])
        # The host shows learned positions and rotates by what it is told; where it is told nothing, by -1.
        positions = (now - 1, now) if self.twin.config.rotary_emb else truth.positions
        zeros = 0 if kv is None else longest - kv.shape[1]
        return HostStep(kv, action, truth.action, latent, zeros, True, positions, truth.positions, True)

    def begin(self, event: SearchBegun, rows: int) -> None:
        """A search begins; its first ``rows`` rows will be compared."""
        self._reanalysis = not event.from_roots
        if self._reanalysis:
            self._running = True
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
        """One opinion for each row, by running the host's recurrent inference on its own latent states."""
        twin, rows = self.twin, len(names)
        self._analysis = {}
        if not self._running:
            return [None] * rows
        latents = torch.stack([self._latents[int(event.parents[row])][row] for row in range(rows)])
        traces = [
            Trace(UNREAD) if self._reanalysis else twin.trace_node(row, latents[row]) for row in range(rows)
        ]
        told = self.host_timesteps(timesteps, start_pos)
        causes = [
            self.restart_causes(int(event.parents[row]), int(told[row]), int(timesteps[row]))
            if self._reanalysis
            else CRASHED
            if traces[row].place is None
            else evidence.served_causes(traces[row], asked[row])
            for row in range(rows)
        ]
        twin.naming, twin.served, twin.reanalyze_phase = names, [], self._reanalysis
        history = [(latents.detach().cpu().numpy(), event.actions[:rows])]
        try:
            _, new, reward, policy, value = twin.forward_recurrent_inference(
                history, event.simulation - 1, depths.tolist(), start_pos
            )
        except Exception as error:  # whatever the host's own code meets: that is its answer
            missing = any(trace.place is None for trace in traces) and isinstance(error, TypeError)
            return self._crash(error, rows, missing and not self._reanalysis)
        self._latents.append(new)
        longest = max(kv.shape[1] for kv in twin.served)
        opinions: list[HostOpinion | None] = []
        for row, truth in enumerate(truths):
            kv = twin.served[row]
            positions = self._node_positions(int(depths[row]), int(told[row]), truth)
            step = HostStep(
                kv,
                truth.action,
                truth.action,
                new[row].reshape(-1),
                longest - kv.shape[1],
                False,
                positions,
                truth.positions,
                False,
            )
            named = {'reward': reward, 'latent': new, 'policy': policy, 'value': value}
            answers = {name: logits[row].reshape(-1) for name, logits in named.items()}
            opinions.append(self._opinion(row, traces[row].key, kv, answers, step, causes[row], truth))
        return opinions

    def _node_positions(self, depth: int, timestep: int, truth: RowTruth) -> tuple[int, int]:
        if not self.twin.config.rotary_emb:
            return truth.positions
        if self._reanalysis:
            first = 2 * (depth + timestep + 1) + 1
            return first, first
        return 2 * (depth + timestep) + 1, 2 * (depth + timestep) + 2

    def _opinion(
        self,
        row: int,
        key: str,
        kv: torch.Tensor | None,
        answers: dict[str, torch.Tensor],
        step: HostStep,
        served: frozenset[Cause] | None,
        truth: RowTruth,
    ) -> HostOpinion:
        found: list[tuple[frozenset[Cause] | None, Enacted]] = []

        def analysis() -> tuple[frozenset[Cause] | None, Enacted]:
            if not found:
                right = (kv is None) == (truth.served is None) and (
                    kv is None or truth.served is None or self.close(kv, truth.served)
                )
                own, enacted = evidence.step_causes(step, answers, self._enactment.of, self.close)
                before = frozenset() if right else served
                causes = None if before is None or own is None else before | own
                found.append((causes, enacted))
            return found[0]

        self._analysis[row] = analysis
        return HostOpinion(key, kv, answers, explain=lambda: analysis()[0], moved=lambda: answers)

    def settle(self, row: int, opinion: HostOpinion, truth: RowTruth) -> None:
        """Note on what the host stored for ``row`` why it is not what it should be."""
        newest = self.twin.newest(row)
        if newest is None or row not in self._analysis:
            return
        owner, stored = newest
        if self.close(stored, truth.stored):
            return
        causes, enacted = self._analysis[row]()
        if causes is None or not self.close(stored, enacted.stored):
            owner.proven = False
            return
        owner.causes = causes | ({Cause.WINDOW_CORRECTION} if enacted.stale else set())

    def _crash(self, error: Exception, rows: int, expected: bool) -> list[HostOpinion | None]:
        """The host ended with an error, which what was missing proves (``expected``) or not."""
        self._running = False
        causes = CRASHED if expected else None
        said = f'{type(error).__name__}: {error}'
        return [HostOpinion(said, None, explain=lambda: causes) for _ in range(rows)]
