"""Watches a caching world model: asks the old system and the recomputation about every row, and has them
judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.window import Window
from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero.inference.events import NodesExpanded, Observer, RootsInferred, SearchBegun
from lzero_kv.lightzero.inputs import timesteps_of
from lzero_kv.lightzero.validation.enactment import Enactment, answers_of
from lzero_kv.lightzero.validation.failures import Failures
from lzero_kv.lightzero.validation.histories import Course, TrueHistories
from lzero_kv.lightzero.validation.judge import Judge
from lzero_kv.lightzero.validation.lineup import Lineup
from lzero_kv.lightzero.validation.old_model import OldModel
from lzero_kv.lightzero.validation.old_store import OldStore
from lzero_kv.lightzero.validation.opinion import Compared, RowTruth
from lzero_kv.lightzero.validation.recompute import Answer, Recompute, Token, TokenWindow
from lzero_kv.lightzero.validation.twin import HistoryName, HostTwin
from lzero_kv.validation.deviation import Tolerance
from lzero_kv.validation.tally import Tally, ValidationTally


class Validator(Observer):
    """Compares every root inference, and the nodes of a part of the searches, with the old system.

    Args:
        world_model: the caching world model.
        mode: ``'store'`` or ``'model'``.
        config: rate, tolerance, and what happens on a failure.
        tally: counts go here.

    Attributes:
        host_last: the batch of last observations and actions that the host alone would have passed to the
            next root inference; set by the policy, None where there is none.
    """

    needs_histories = True

    def __init__(self, world_model: Any, mode: str, config: KVCacheConfig, tally: ValidationTally) -> None:
        rebuild = config.window != 'shift'
        self._model = world_model
        self._config = config
        self._oracle = Recompute(world_model, 'rebuild' if rebuild else 'shift')
        self._histories = TrueHistories(self._oracle, Window(world_model.context_length))
        self._twin = HostTwin.over(world_model)
        tolerance = Tolerance(*tolerance_of(config, world_model.transformer.ln_f.weight.dtype))
        enactment = Enactment(self._oracle, self._twin, tolerance.close)
        self._host = (OldStore if mode == 'store' else OldModel)(self._twin, enactment, tolerance)
        lineup = Lineup(self._oracle, world_model, self._histories)
        self._judge = Judge(tolerance, lineup, Failures(world_model, mode, config, self._oracle.rule))
        self.tally = tally
        self.host_last: tuple[torch.Tensor, Sequence[Any]] | None = None
        self.start_pos: Any = 0
        self._serial = 0
        self._rows = 0
        self._capacity = 0
        self._roots_kept = False
        self._roots: list[tuple[HistoryName, Answer, Course]] = []

    # Root inference

    def roots_inferred(self, event: RootsInferred) -> None:
        """Compare every row of a root inference.

        Raises:
            ValidationError: with ``validation_on_failure='raise'``, the manager is off, or a difference has
                no proven cause.
        """
        self._serial += 1
        names = [HistoryName(int(env_id), self._serial, 0) for env_id in event.env_ids]
        asked: list[HistoryName | None] = []
        lost, truths, courses, roots = [], [], [], []
        for row, name in enumerate(names):
            before, missing, truth, answer, course = self._true_root(event, row)
            asked.append(before)
            lost.append(missing)
            truths.append(truth)
            courses.append(course)
            roots.append((name, answer, course))
        host_last = self.host_last or (event.last_observations, event.last_actions)
        opinions = self._host.roots(event, names, asked, truths, host_last, self.start_pos)
        rows = [
            Compared(
                'roots',
                name,
                row,
                None,
                str(event.keys[row]),
                None if event.first[row] else event.served.row(row),
                {
                    'policy': event.outputs.policy[row].reshape(-1),
                    'value': event.outputs.value[row].reshape(-1),
                },
                truths[row],
                opinions[row],
                lost[row],
                courses[row],
            )
            for row, name in enumerate(names)
        ]
        for name, answer, course in roots:
            self._histories.settle(name.env_id, answer, name, course)
        self._roots, self._roots_kept = roots, True
        self._compare(rows, self.tally.roots, [])

    def _true_root(
        self, event: RootsInferred, row: int
    ) -> tuple[HistoryName | None, bool, RowTruth, Answer, Course]:
        env_id, timestep = int(event.env_ids[row]), int(event.timesteps[row])
        if event.first[row]:
            position = 2 * max(timestep, 0)
            history = self._histories.begin(env_id, event.observations[row], position)
            (token,) = self._histories.tokens(history)
            answer, course = self._oracle.begin(token), Course([token], [])
            truth = RowTruth(
                None, answer.window.kv(), answers_of(answer), (position - 1, position), None, token.embedding
            )
            return None, False, truth, answer, course
        history = self._histories.continued(env_id, event.last_observations[row], timestep)
        before = history.name
        lost = history.stored and not event.served.present[row]
        window = self._histories.window(history)
        course = history.course
        step = self._histories.extend(env_id, event.last_actions[row], event.observations[row])
        answer = self._oracle.step(window, *step)
        truth = self._truth(window, answer, step)
        for name in ('reward', 'latent'):
            truth.answers.pop(name)  # root inference does not tell them
        return before, lost, truth, answer, course.then(step)

    def _truth(self, window: TokenWindow, answer: Answer, step: tuple[Token, Token]) -> RowTruth:
        return RowTruth(
            window.kv(),
            answer.window.kv(),
            answers_of(answer),
            (step[0].position, step[1].position),
            step[0].embedding,
            step[1].embedding,
        )

    # Searches

    def search_begun(self, event: SearchBegun) -> None:
        """Decide whether this search's nodes are compared, and with which roots they begin."""
        self.tally.searches += 1
        count, rate = self.tally.searches, self._config.validation_rate
        self._rows = 0
        if int(count * rate) == int((count - 1) * rate):
            return
        self.tally.validated += 1
        self._capacity = event.capacity
        self._start_pos = event.timestep
        if event.from_roots:
            tops = self._roots
            self._timesteps = timesteps_of(event.timestep, len(tops))
        else:
            tops = self._latent_roots(event)
        self._rows, self._kind = len(tops), 'nodes' if event.from_roots else 'reanalysis'
        self._names = [[name for name, _, _ in tops]]
        self._nodes = [[answer for _, answer, _ in tops]]
        self._courses = [[course for _, _, course in tops]]
        self._depths = [np.zeros(self._rows, dtype=np.int64)]
        self._host.begin(event, self._rows)

    def _latent_roots(self, event: SearchBegun) -> list[tuple[HistoryName, Answer, Course]]:
        """Roots of a reanalysis: whole sequences of the batch, as many as the host has environments."""
        self._serial += 1
        rows = len(event.latents)
        self._timesteps = timesteps_of(event.timestep, rows)
        sequences = 1 if np.ndim(event.timestep) < 2 else len(event.timestep)
        length = rows // sequences
        taken = max(1, self._twin.env_num // length)
        if np.ndim(event.timestep) >= 2:
            self._start_pos = np.asarray(event.timestep)[:taken]
        tops = []
        weight = self._model.transformer.ln_f.weight
        for row in range(min(rows, taken * length)):
            latent = torch.as_tensor(event.latents[row]).to(weight).reshape(-1)
            token = Token(latent, int(event.next_positions[row]) - 1)
            tops.append((HistoryName(row, self._serial, 0), self._oracle.begin(token), Course([token], [])))
        return tops

    def nodes_expanded(self, event: NodesExpanded) -> None:
        """Compare one simulation's children, of the rows that are compared.

        Raises:
            ValidationError: as :meth:`roots_inferred`.
        """
        if not self._rows:
            return
        rows = range(self._rows)
        parents = [int(parent) for parent in event.parents[: self._rows]]
        depths = np.array([self._depths[parent][row] + 1 for row, parent in enumerate(parents)])
        names = [name._replace(node=event.simulation) for name in self._names[0]]
        answers = [self._child(event, row, parents[row]) for row in rows]
        courses = [self._course(event, row, parents[row]) for row in rows]
        truths = [
            self._truth(self._nodes[parents[row]][row].window, answers[row], courses[row].steps[-1])
            for row in rows
        ]
        asked = [self._names[parents[row]][row] for row in rows]
        opinions = self._host.nodes(event, names, asked, truths, depths, self._timesteps, self._start_pos)
        outputs = event.outputs._asdict()
        compared = [
            Compared(
                self._kind,
                asked[row],
                row,
                parents[row],
                f'NodeKey(row={row}, simulation={parents[row]})' if parents[row] else str(asked[row]),
                event.served.row(row),
                {name: outputs[name][row].reshape(-1) for name in truths[row].answers},
                truths[row],
                opinions[row],
                self._is_lost(event, row),
                courses[row],
            )
            for row in rows
        ]
        self._compare(compared, getattr(self.tally, self._kind), self._nodes)
        self._names.append(names)
        self._nodes.append(answers)
        self._courses.append(courses)
        self._depths.append(depths)

    def _child(self, event: NodesExpanded, row: int, parent: int) -> Answer:
        latent = event.outputs.latent[row].reshape(-1)  # type: ignore[index]
        return self._oracle.child(self._nodes[parent][row], event.actions[row], latent)

    def _course(self, event: NodesExpanded, row: int, parent: int) -> Course:
        first = self._nodes[parent][row].window.next_position
        action = Token(self._oracle.embed_action(event.actions[row]), first)
        latent = event.outputs.latent[row].reshape(-1)  # type: ignore[index]
        return self._courses[parent][row].then((action, Token(latent, first + 1)))

    def _is_lost(self, event: NodesExpanded, row: int) -> bool:
        """Whether an entry is gone although nobody cleared it and the pool never was full."""
        if event.served.present[row]:
            return False
        if self._kind == 'nodes' and not event.parents[row]:
            return self._roots_kept
        return len(event.parents) * event.simulation <= self._capacity

    def _compare(self, rows: Sequence[Compared], tally: Tally, nodes: Sequence[Sequence[Answer]]) -> None:
        for row in rows:
            self._judge.of(row, tally, nodes)
            if row.host is not None:
                self._host.settle(row.row, row.host, row.truth)

    # What others did

    def episodes_ended(self, env_ids: Sequence[int]) -> None:
        """These environments' histories are forgotten."""
        self._histories.discard([int(env_id) for env_id in env_ids])

    def caches_cleared(self) -> None:
        """The pools are empty, and so are the host's."""
        self._histories.forget_keys_and_values()
        self._twin.clear_caches()
        self._roots_kept, self._rows = False, 0

    def roots_cleared(self) -> None:
        """The pools of the roots are empty, and so are the host's dictionaries."""
        self._histories.forget_keys_and_values()
        self._twin.clear_roots()
        self._roots_kept = False

    def nodes_cleared(self) -> None:
        """Somebody outside cleared the nodes."""
        self._twin.past_kv_cache_recurrent_infer.clear()
        self._capacity = 0

    def contexts_lost(self) -> None:
        """New pools: nothing is remembered."""
        self._histories.clear()
        self._twin.clear_caches()
        self._rows = 0

    def host_clears(self) -> None:
        """The host alone would have emptied its caches now; the manager did not."""
        self._twin.clear_caches()


def tolerance_of(config: KVCacheConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Absolute and relative tolerance: what the user chose, else what the dtype needs.

    Rounding moved keys, values and logits of models with random weights by 2e-4 at most in float32
    (tests/host/test_engine.py) and 4e-14 in float64; other histories differ by 0.1 and more.
    """
    default = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)
    atol, rtol = config.validation_atol, config.validation_rtol
    return (default if atol is None else atol), (default if rtol is None else rtol)
