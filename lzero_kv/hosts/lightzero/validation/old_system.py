"""The old system, asked about every row: its cache alone (``store``), or its whole model (``model``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.keys import digest_rows
from lzero_kv.validation.causes import Cause
from lzero_kv.validation.deviation import Tolerance

from ..observer import NodesExpanded, RootsInferred, SearchBegun
from ..roots import NO_ACTION
from .enactment import Enacted, Enactment, HostStep
from .evidence import served_causes, step_causes
from .opinion import HostOpinion, RowTruth
from .twin import HistoryName, HostTwin, Trace, contents

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
        return served_causes(trace, asked or HistoryName(event.env_ids[row], -1, 0), other)

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
            past_keys_values=entry,
            is_init_infer=True,
            start_pos=timestep,
        )
        return contents(entry)


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
        opinions = [
            self._root(event, row, traces[row], asked[row], truths[row], host_last)
            for row in range(len(names))
        ]
        self.twin.naming = names
        self._latents = [event.latents]
        for row in range(min(len(names), self.twin.env_num)):
            self.twin.keep(row, event.latents[row], event.stored.row(row), root=True)
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
                causes = served_causes(trace, asked[row])
                if trace.place is None:
                    opinions.append(HostOpinion(trace.key, None, explain=lambda: CRASHED))
                    continue
                kv = contents(trace.entry)
            found = bool(event.served.present[row])
            opinions.append(self._opinion(trace, asked[row], kv, truth, causes, found=found, root=False))
        latents = event.outputs.latent
        self._latents.append(latents)
        if not self._reanalysis:
            self.twin.naming = names
            for row in range(len(names)):
                present = bool(event.stored.present[row])
                kv = event.stored.row(row) if present else truths[row].stored
                self.twin.keep(row, latents[row], kv, root=False, exact=present)
        return opinions

    def settle(self, row: int, opinion: HostOpinion, truth: RowTruth) -> None:
        """Nothing to note: what is stored is the manager's."""


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
            else served_causes(traces[row], asked[row])
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
            return (2 * (depth + timestep + 1) + 1,) * 2
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
                own, enacted = step_causes(step, answers, self._enactment.of, self.close)
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
