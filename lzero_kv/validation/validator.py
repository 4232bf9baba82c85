"""Observer of a caching world model that compares every row with the recomputation and the stock cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero.inference.events import NodesExpanded, Observer, RootsInferred, SearchBegun
from lzero_kv.lightzero.inference.inputs import timesteps_of
from lzero_kv.telemetry.counters import Counters, ValidationCounters
from lzero_kv.validation.causes import StepReplay
from lzero_kv.validation.compare import Comparison
from lzero_kv.validation.faults import FaultFinder
from lzero_kv.validation.findings import FindingLog
from lzero_kv.validation.histories import ComparedRow, Course, HistoryName, TrueHistories, Truth
from lzero_kv.validation.mode import Batch, StockModel, StockStore
from lzero_kv.validation.oracle import Answer, Token, TokenWindow, oracle_of
from lzero_kv.validation.stock import StockWorldModel
from lzero_kv.validation.tolerance import Tolerance


@dataclass(frozen=True)
class TrueNode:
    """A root or a node of a search, as the recomputation has it."""

    name: HistoryName
    answer: Answer
    course: Course
    depth: int = 0


class Validator(Observer):
    """Comparison of every root inference, and of the nodes of a part of the searches.

    Args:
        world_model: the caching world model.
        mode: ``'recompute'``, ``'store'`` or ``'model'``.
        config: rate, tolerance, and what happens on a failure.
        counters: what is found is counted there.

    Attributes:
        stock: the stock world model; None in mode ``recompute``.
        stock_last: the batch of last observations and actions that LightZero alone would have passed to the
            next root inference; set by the policy, None where there is none.
        start_pos: of the next root inference, as the caller gave it.
    """

    needs_histories = True

    def __init__(
        self, world_model: Any, mode: str, config: KVCacheConfig, counters: ValidationCounters
    ) -> None:
        self._model = world_model
        self._rate = config.validation_rate
        oracle = self._oracle = oracle_of(world_model, 'shift' if config.window == 'shift' else 'rebuild')
        self._histories = TrueHistories(oracle)
        tolerance = Tolerance.of(config, world_model.transformer.ln_f.weight.dtype)
        self.stock: StockWorldModel | None = None
        self._mode: StockStore | StockModel | None = None
        if mode != 'recompute':
            self.stock = StockWorldModel.over(world_model)
            replay = StepReplay(oracle, self.stock, tolerance.close)
            self._mode = (StockStore if mode == 'store' else StockModel)(self.stock, replay)
        faults = FaultFinder(oracle, world_model, self._histories, tolerance)
        log = FindingLog(world_model, mode, config, oracle.rule)
        self._comparison = Comparison(tolerance, faults, log, alone=self.stock is None)
        self.counters = counters
        self.stock_last: tuple[torch.Tensor, Sequence[Any]] | None = None
        self.start_pos: Any = 0
        self._inferences = 0
        self._capacity = 0
        self._counted = False
        self._roots_kept = False
        self._roots: list[TrueNode] = []
        self._nodes: list[list[TrueNode]] = []

    # Root inference

    def roots_inferred(self, event: RootsInferred) -> None:
        """Compare every row of a root inference.

        Raises:
            ValidationError: with ``validation_on_failure='raise'``, the cache is wrong, or a difference has
                no proven cause.
        """
        self._inferences += 1
        given = event.inputs
        names = [HistoryName(int(env_id), self._inferences, 0) for env_id in given.env_ids]
        asked, lost, truths, roots = [], [], [], []
        for row, name in enumerate(names):
            before, missing, truth, root = self._true_root(event, row, name)
            asked.append(before)
            lost.append(missing)
            truths.append(truth)
            roots.append(root)
        last = self.stock_last or (given.last_observations, given.last_actions)
        batch = Batch(event, names, asked, truths, self.start_pos, *last)
        stock = [None] * len(names) if self._mode is None else self._mode.roots(batch)
        outputs = {'policy': event.outputs.policy, 'value': event.outputs.value}
        rows = [
            ComparedRow(
                'roots',
                name,
                row,
                None,
                str(given.keys[row]),
                None if given.first[row] else event.served.row(row),
                {kind: logits[row].reshape(-1) for kind, logits in outputs.items()},
                truths[row],
                stock[row],
                lost[row],
                roots[row].course,
            )
            for row, name in enumerate(names)
        ]
        for root in roots:
            self._histories.store(root.name.env_id, root.answer, root.name, root.course)
        self._roots, self._roots_kept = roots, True
        self._compare(rows, self.counters.roots)

    def _true_root(
        self, event: RootsInferred, row: int, name: HistoryName
    ) -> tuple[HistoryName | None, bool, Truth, TrueNode]:
        """The root that a row continues, whether the cache lost it, the truth and the new root."""
        given = event.inputs
        env_id, timestep = int(given.env_ids[row]), int(given.timesteps[row])
        if given.first[row]:
            history = self._histories.begin(env_id, given.observations[row], 2 * max(timestep, 0))
            (token,) = self._histories.tokens(history)
            answer, at = self._oracle.begin(token), (token.position - 1, token.position)
            truth = Truth(None, answer.window.kv(), answer.logits, at, None, token.embedding)
            return None, False, truth, TrueNode(name, answer, Course([token], []))
        history = self._histories.continued(env_id, given.last_observations[row], timestep)
        before, lost = history.name, history.stored and not event.served.present[row]
        window = self._histories.window(history)
        course = history.course
        step = self._histories.extend(env_id, given.last_actions[row], given.observations[row])
        answer = self._oracle.step(window, *step)
        truth = _truth(window, Answer(answer.window, answer.value, answer.policy), step)
        return before, lost, truth, TrueNode(name, answer, course.then(step))

    # Searches

    def search_begun(self, event: SearchBegun) -> None:
        """Decide whether this search's nodes are compared, and with which roots they begin."""
        self.counters.searches += 1
        count, self._nodes = self.counters.searches, []
        if int(count * self._rate) == int((count - 1) * self._rate):
            return
        self._counted = False
        self._capacity = event.capacity
        self._start_pos = event.timestep
        if event.from_roots:
            self._kind, tops = 'nodes', self._roots
            self._timesteps = timesteps_of(event.timestep, len(tops))
        else:
            self._kind, tops = 'reanalysis', self._latent_roots(event)
        self._nodes = [tops]
        if self._mode is not None:
            self._mode.begin(event, len(tops))

    def _latent_roots(self, event: SearchBegun) -> list[TrueNode]:
        """Roots of a reanalysis: whole sequences of the batch, as many as LightZero has environments."""
        self._inferences += 1
        rows = len(event.latents)
        self._timesteps = timesteps_of(event.timestep, rows)
        sequences = 1 if np.ndim(event.timestep) < 2 else len(event.timestep)
        length = rows // sequences
        taken = max(1, self._model.env_num // length)
        if np.ndim(event.timestep) >= 2:
            self._start_pos = np.asarray(event.timestep)[:taken]
        weight, tops = self._model.transformer.ln_f.weight, []
        for row in range(min(rows, taken * length)):
            latent = torch.as_tensor(event.latents[row]).to(weight).reshape(-1)
            token = Token(latent, int(event.next_positions[row]) - 1)
            name = HistoryName(row, self._inferences, 0)
            tops.append(TrueNode(name, self._oracle.begin(token), Course([token], [])))
        return tops

    def nodes_expanded(self, event: NodesExpanded) -> None:
        """Compare one simulation's children, of the rows that are compared.

        Raises:
            ValidationError: as :meth:`roots_inferred`.
        """
        if not self._nodes:
            return
        numbers = [int(parent) for parent in event.parents[: len(self._nodes[0])]]
        parents = [self._nodes[number][row] for row, number in enumerate(numbers)]
        children = [self._child(event, row, parent) for row, parent in enumerate(parents)]
        truths = [
            _truth(parent.answer.window, child.answer, child.course.steps[-1])
            for parent, child in zip(parents, children, strict=True)
        ]
        names, asked = [child.name for child in children], [parent.name for parent in parents]
        depths = np.array([child.depth for child in children])
        batch = Batch(event, names, asked, truths, self._start_pos, depths=depths, timesteps=self._timesteps)
        stock = [None] * len(names) if self._mode is None else self._mode.nodes(batch)
        outputs = event.outputs._asdict()
        rows = [
            ComparedRow(
                self._kind,
                asked[row],
                row,
                number,
                f'NodeKey(row={row}, simulation={number})' if number else str(asked[row]),
                event.served.row(row),
                {kind: outputs[kind][row].reshape(-1) for kind in truths[row].answers},
                truths[row],
                stock[row],
                self._is_lost(event, row),
                children[row].course,
            )
            for row, number in enumerate(numbers)
        ]
        self._compare(rows, getattr(self.counters, self._kind))
        self._count_search(rows)
        self._nodes.append(children)

    def _child(self, event: NodesExpanded, row: int, parent: TrueNode) -> TrueNode:
        latent = event.outputs.latent[row].reshape(-1)  # type: ignore[index]
        first = parent.answer.window.next_position
        step = Token(self._oracle.embed_action(event.actions[row]), first), Token(latent, first + 1)
        answer = self._oracle.step(parent.answer.window, *step)
        name = parent.name._replace(node=event.simulation)
        return TrueNode(name, answer, parent.course.then(step), parent.depth + 1)

    def _count_search(self, rows: Sequence[ComparedRow]) -> None:
        """Count the search at the first of its nodes that was compared: there is none where LightZero's own
        code ended with an error before."""
        compared = self.stock is None or any(row.stock is not None for row in rows)
        self.counters.validated += compared and not self._counted
        self._counted = self._counted or compared

    def _is_lost(self, event: NodesExpanded, row: int) -> bool:
        """Whether an entry is gone although it was never cleared and the pool never was full."""
        if event.served.present[row]:
            return False
        if self._kind == 'nodes' and not event.parents[row]:
            return self._roots_kept
        return len(event.parents) * event.simulation <= self._capacity

    def _compare(self, rows: Sequence[ComparedRow], counters: Counters) -> None:
        nodes = [[node.answer for node in batch] for batch in self._nodes]
        for row in rows:
            self._comparison.compare_row(row, counters, nodes)
            if self._mode is not None and row.stock is not None:
                self._mode.store(row.row, row.truth)

    # Other events

    def episodes_ended(self, env_ids: Sequence[int]) -> None:
        """Forget these environments' histories."""
        self._histories.discard([int(env_id) for env_id in env_ids])

    def caches_cleared(self) -> None:
        """Clear the stock caches as the pools were cleared."""
        self._histories.forget_keys_and_values()
        if self.stock is not None:
            self.stock.clear_caches()
        self._roots_kept, self._nodes = False, []

    def roots_cleared(self) -> None:
        """Clear the stock dictionaries of roots as the root pools were cleared."""
        self._histories.forget_keys_and_values()
        if self.stock is not None:
            self.stock.clear_roots()
        self._roots_kept = False

    def nodes_cleared(self) -> None:
        """Clear the stock dictionary of nodes as the recurrent pool was cleared."""
        if self.stock is not None:
            self.stock.past_kv_cache_recurrent_infer.clear()
        self._capacity = 0

    def contexts_lost(self) -> None:
        """Forget everything: there are new pools."""
        self._histories.clear()
        if self.stock is not None:
            self.stock.clear_caches()
        self._nodes = []


def _truth(window: TokenWindow, answer: Answer, step: tuple[Token, Token]) -> Truth:
    at = step[0].position, step[1].position
    return Truth(window.kv(), answer.window.kv(), answer.logits, at, step[0].embedding, step[1].embedding)
