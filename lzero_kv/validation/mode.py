"""Modes of validation with stock: what its cache hands out, or what its whole world model answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import digest_rows
from lzero_kv.lightzero.inference.events import SearchBegun
from lzero_kv.lightzero.inference.inputs import NO_ACTION
from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation import causes as proofs
from lzero_kv.validation.causes import StepReplay, StepResult, StockStep
from lzero_kv.validation.histories import Causes, HistoryName, Logits, StockRow, Truth
from lzero_kv.validation.stock import Lookup, StockWorldModel, contents

CRASHED = frozenset({Cause.CRASHED})
RESTARTED = frozenset({Cause.RESTARTED})
UNREAD = 'none: nothing is read in reanalysis'
WIPED = 'none: its last inputs were wiped'


@dataclass(frozen=True)
class Batch:
    """One root inference, or one simulation, to repeat.

    Attributes:
        event: the inference.
        names: the new roots or nodes, one per row.
        asked: the history that each row continues, of nodes their parents; None where an episode begins.
        truths: one per row.
        start_pos: as the caller gave it.
        observations, actions: of roots, the last inputs that LightZero alone would have passed.
        depths: of nodes, int64 ``[B]``.
        timesteps: of the roots of nodes, int64 ``[B]``.
    """

    event: Any
    names: Sequence[HistoryName]
    asked: Sequence[HistoryName | None]
    truths: Sequence[Truth]
    start_pos: Any
    observations: Any = None
    actions: Any = None
    depths: Any = None
    timesteps: Any = None


class StockMode:
    """Common part of both modes with stock: what the stock code looks up, and what it restarts from.

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

    def _crashes(self, batch: Batch) -> bool:
        """Whether the stock root inference must end with an error.

        It has room for fewer rows, fewer last inputs than rows, or windows too short for the last
        observation, an action and the new one.
        """
        rows, last = len(batch.names), len(batch.observations)
        if max(rows, last) > self.stock.env_num:
            return True
        return not self._begins(batch.actions) and (last < rows or self.stock.context_length < 3)

    def _root_lookups(self, batch: Batch) -> list[Lookup | None]:
        """The lookup of each row's last root; None where there is none."""
        rows = len(batch.names)
        if self._begins(batch.actions) or self._crashes(batch):
            return [None] * rows
        latents = self.stock.tokenizer.encode_to_obs_embeddings(batch.observations)
        return [self.stock.lookup_root(row, latents[row]) for row in range(rows)]

    def _root_causes(self, batch: Batch, row: int, lookup: Lookup | None) -> Causes | None:
        """Causes for which the root that the stock code continues is not the row's own."""
        asked, event = batch.asked[row], batch.event
        if lookup is None:
            if self._crashes(batch):
                return CRASHED
            return frozenset() if event.inputs.first[row] else RESTARTED
        if not lookup.found:
            lost = asked is not None and self.stock.has_root(row, asked)
            return frozenset({Cause.ROOT_LOST}) if lost else RESTARTED
        own, given = event.inputs.last_observations[row], batch.observations[row]
        other = digest_rows(given[None]) != digest_rows(own[None])
        return proofs.served_causes(lookup, asked or HistoryName(event.inputs.env_ids[row], -1, 0), other)

    def _stock_timesteps(self, batch: Batch) -> np.ndarray:
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

    def _node_lookups(self, batch: Batch, stock_timesteps: np.ndarray) -> list[tuple[Lookup, Causes | None]]:
        """The lookup of each row's parent, and the causes for which it does not give the parent's history."""
        found: list[tuple[Lookup, Causes | None]] = []
        for row, asked in enumerate(batch.asked):
            parent = int(batch.event.parents[row])
            if self._reanalysis:
                given = int(stock_timesteps[row]), int(batch.timesteps[row])
                found.append((Lookup(UNREAD), self._restart_causes(parent, *given)))
                continue
            assert asked is not None  # of reanalysis alone
            lookup = self.stock.lookup_node(row, self._latents[parent][row])
            causes = proofs.served_causes(lookup, asked) if lookup.found else CRASHED
            found.append((lookup, causes))
        return found

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


class StockStore(StockMode):
    """Mode ``store``: the stock dictionaries and rings hold what this cache stores, under their own keys."""

    def roots(self, batch: Batch) -> list[StockRow | None]:
        """Answers for each row; afterwards the stock structures hold the new roots."""
        lookups, rows = self._root_lookups(batch), len(batch.names)
        found: list[StockRow | None] = [self._root(batch, row, lookups[row]) for row in range(rows)]
        self.stock.naming, stored = batch.names, batch.event.stored
        for row in range(min(rows, self.stock.env_num)):
            kv, exact = stored.row(row), not stored.rounded
            self.stock.keep(row, batch.event.latents[row], kv, root=True, exact=exact)
        self.stock.past_kv_cache_recurrent_infer.clear()
        return found

    def _root(self, batch: Batch, row: int, lookup: Lookup | None) -> StockRow:
        causes, truth, event = self._root_causes(batch, row, lookup), batch.truths[row], batch.event
        if lookup is None:
            at = truth.positions
            alone = StockStep(None, None, truth.action, truth.latent, 0, at, at, True)
            return StockRow(
                WIPED, None, explain=lambda: causes, moved=lambda: self._replay.run(alone).answers
            )
        if lookup.found:
            kv = contents(lookup.entry)
        else:
            latent = self.stock.tokenizer.encode_to_obs_embeddings(batch.observations[row][None])
            kv = self._restart(latent, int(event.inputs.timesteps[row]))
        return self._served(batch, row, lookup, kv, causes)

    def _served(
        self,
        batch: Batch,
        row: int,
        lookup: Lookup,
        kv: torch.Tensor,
        causes: Causes | None,
    ) -> StockRow:
        slot, truth, asked = lookup.slot, batch.truths[row], batch.asked[row]
        # whether this cache had the entry too, and did not compute it again
        present = bool(batch.event.served.present[row])
        root, at = batch.depths is None, truth.positions
        step = StockStep(kv, truth.action, truth.action, truth.latent, 0, at, at, root)
        return StockRow(
            lookup.key,
            kv,
            exact=present and slot is not None and slot.history == asked and slot.exact,
            explain=lambda: causes,
            moved=lambda: self._replay.run(step).answers,
        )

    def nodes(self, batch: Batch) -> list[StockRow | None]:
        """Answers for each row; afterwards the stock structures hold the new nodes."""
        event, timesteps = batch.event, self._stock_timesteps(batch)
        found: list[StockRow | None] = []
        for row, (lookup, causes) in enumerate(self._node_lookups(batch, timesteps)):
            if self._reanalysis:
                latent = self._latents[int(event.parents[row])][row]
                kv = self._restart(latent, int(timesteps[row]))
            elif lookup.found:
                kv = contents(lookup.entry)
            else:
                found.append(StockRow(lookup.key, None, explain=lambda: CRASHED))
                continue
            found.append(self._served(batch, row, lookup, kv, causes))
        latents = event.outputs.latent
        assert latents is not None  # None at roots alone
        self._latents.append(latents)
        if not self._reanalysis:
            self.stock.naming = batch.names
            for row, truth in enumerate(batch.truths):
                present = bool(event.stored.present[row])
                kv = event.stored.row(row) if present else truth.stored
                self.stock.keep(row, latents[row], kv, root=False, exact=present and not event.stored.rounded)
        return found


class StockModel(StockMode):
    """Mode ``model``: the stock world model runs every inference with its own cache and its own latents."""

    _proofs: dict[int, Callable[[], tuple[Causes | None, StepResult]]]
    _running = True

    def begin(self, event: SearchBegun, rows: int) -> None:
        """Begin a search; below its own roots the stock model goes on from its own latent states."""
        self._reanalysis = not event.from_roots
        if self._reanalysis:
            super().begin(event, rows)
            self._running = True

    def roots(self, batch: Batch) -> list[StockRow | None]:
        """Answers for each row, by the stock root inference on the inputs that LightZero would pass."""
        stock, rows = self.stock, len(batch.names)
        lookups = self._root_lookups(batch)
        causes = [self._root_causes(batch, row, lookups[row]) for row in range(rows)]
        stock.naming, stock.served, self._proofs = batch.names, [], {}
        inputs = dict(
            obs=batch.observations, action=batch.actions, current_obs=batch.event.inputs.observations
        )
        try:
            _, latents, _, policy, value = stock.forward_initial_inference(inputs, batch.start_pos)
        except Exception as error:  # whatever the stock code meets: that is its answer
            # Beside those inputs, it needs a timestep for each row of a continued episode.
            untimed = np.ndim(batch.start_pos) == 0 and not self._begins(batch.actions)
            return self._crash(error, rows, untimed or self._crashes(batch))
        self._running, self._latents = True, [latents]
        longest = max((kv.shape[1] for kv in stock.served), default=0)
        found: list[StockRow | None] = []
        for row, (lookup, truth) in enumerate(zip(lookups, batch.truths, strict=True)):
            kv = stock.served[row] if stock.served else None
            action = None if kv is None else self._replay.embed_action(batch.actions[row])
            zeros = 0 if kv is None else longest - kv.shape[1]
            now = 2 * int(batch.event.inputs.timesteps[row])
            # Learned positions follow from the batch; rotations from the timestep, -1 where there is none.
            at = self._wrapped(now - 1, now) if stock.config.rotary_emb else truth.positions
            latent = latents[row].reshape(-1)
            step = StockStep(kv, action, truth.action, latent, zeros, at, truth.positions, True)
            answers = {'policy': policy[row].reshape(-1), 'value': value[row].reshape(-1)}
            key = WIPED if lookup is None else lookup.key
            found.append(self._answered(row, key, answers, step, causes[row], truth))
        return found

    def nodes(self, batch: Batch) -> list[StockRow | None]:
        """Answers for each row, by the stock recurrent inference on its own latent states."""
        stock, event, rows = self.stock, batch.event, len(batch.names)
        self._proofs = {}
        if not self._running:
            return [None] * rows
        latents = torch.stack([self._latents[int(event.parents[row])][row] for row in range(rows)])
        timesteps = self._stock_timesteps(batch)
        lookups = self._node_lookups(batch, timesteps)
        stock.naming, stock.served, stock.reanalyze_phase = batch.names, [], self._reanalysis
        history = [(latents.detach().cpu().numpy(), event.actions[:rows])]
        try:
            _, new, reward, policy, value = stock.forward_recurrent_inference(
                history, event.simulation - 1, batch.depths.tolist(), batch.start_pos
            )
        except Exception as error:  # whatever the stock code meets: that is its answer
            missing = any(not lookup.found for lookup, _ in lookups) and isinstance(error, TypeError)
            return self._crash(error, rows, missing and not self._reanalysis)
        self._latents.append(new)
        named = {'reward': reward, 'latent': new, 'policy': policy, 'value': value}
        longest = max(kv.shape[1] for kv in stock.served)
        found: list[StockRow | None] = []
        for row, ((lookup, causes), truth) in enumerate(zip(lookups, batch.truths, strict=True)):
            kv, own = stock.served[row], truth.positions
            at = self._rotated_at(int(batch.depths[row]), int(timesteps[row])) or own
            latent, zeros = new[row].reshape(-1), longest - kv.shape[1]
            step = StockStep(kv, truth.action, truth.action, latent, zeros, at, own, False)
            answers = {name: logits[row].reshape(-1) for name, logits in named.items()}
            found.append(self._answered(row, lookup.key, answers, step, causes, truth))
        return found

    def _rotated_at(self, depth: int, timestep: int) -> tuple[int, int] | None:
        """Logical positions at which the stock model rotates a node's tokens; None for learned positions."""
        if not self.stock.config.rotary_emb:
            return None
        first = 2 * (depth + timestep) + 1
        return self._wrapped(first + 2, first + 2) if self._reanalysis else self._wrapped(first, first + 1)

    def _wrapped(self, first: int, second: int) -> tuple[int, int]:
        """Positions in the stock table of rotations, which has ``max_seq_len`` of them and begins again."""
        end = self.stock.config.max_seq_len
        return first % end, second % end

    def _answered(
        self, row: int, key: str, answers: Logits, step: StockStep, served: Causes | None, truth: Truth
    ) -> StockRow:
        kv = step.kv

        @functools.cache
        def proof() -> tuple[Causes | None, StepResult]:
            right = (kv is None) == (truth.served is None) and (
                kv is None or truth.served is None or self._replay.close(kv, truth.served)
            )
            own, result = proofs.step_causes(step, answers, self._replay)
            before = frozenset() if right else served
            return (None if before is None or own is None else before | own), result

        self._proofs[row] = proof
        return StockRow(key, kv, answers, explain=lambda: proof()[0], moved=lambda: answers)

    def store(self, row: int, truth: Truth) -> None:
        """Record on what the stock model stored for ``row`` why it is not what it should be."""
        newest = self.stock.newest(row)
        if newest is None or row not in self._proofs:
            return
        slot, stored = newest
        if self._replay.close(stored, truth.stored):
            return
        causes, result = self._proofs[row]()
        if causes is None or not self._replay.close(stored, result.stored):
            slot.causes = None
            return
        slot.causes = causes | ({Cause.WINDOW_CORRECTION} if result.stale else frozenset())

    def _crash(self, error: Exception, rows: int, expected: bool) -> list[StockRow | None]:
        """Answers of stock code that ended with an error, which what was missing proves (``expected``) or
        not."""
        self._running = False
        causes = CRASHED if expected else None
        key = f'{type(error).__name__}: {error}'
        return [StockRow(key, None, explain=lambda: causes) for _ in range(rows)]
