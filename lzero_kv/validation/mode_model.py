"""Mode ``model``: what a whole stock world model answers, with its own cache and latent states."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from lzero_kv.lightzero.inference.events import SearchBegun
from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation import causes as proofs
from lzero_kv.validation.causes import StepResult, StockStep
from lzero_kv.validation.mode import CRASHED, UNREAD, WIPED, NodeBatch, RootBatch, StockMode
from lzero_kv.validation.rows import Causes, Logits, StockRow, Truth
from lzero_kv.validation.stock import Lookup


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

    def roots(self, batch: RootBatch) -> list[StockRow | None]:
        """Answers for each row, by the stock root inference on the inputs that LightZero would pass."""
        stock, rows = self.stock, len(batch.names)
        lookups = self._root_lookups(batch)
        causes = [self._root_causes(batch, row, lookups[row]) for row in range(rows)]
        stock.naming, stock.served, self._proofs = batch.names, [], {}
        inputs = dict(obs=batch.observations, action=batch.actions, current_obs=batch.event.observations)
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
            now = 2 * int(batch.event.timesteps[row])
            # Learned positions follow from the batch; rotations from the timestep, -1 where there is none.
            at = self._wrapped(now - 1, now) if stock.config.rotary_emb else truth.positions
            latent = latents[row].reshape(-1)
            step = StockStep(kv, action, truth.action, latent, zeros, at, truth.positions, True)
            answers = {'policy': policy[row].reshape(-1), 'value': value[row].reshape(-1)}
            key = WIPED if lookup is None else lookup.key
            found.append(self._answered(row, key, answers, step, causes[row], truth))
        return found

    def nodes(self, batch: NodeBatch) -> list[StockRow | None]:
        """Answers for each row, by the stock recurrent inference on its own latent states."""
        stock, event, rows = self.stock, batch.event, len(batch.names)
        self._proofs = {}
        if not self._running:
            return [None] * rows
        latents = torch.stack([self._latents[int(event.parents[row])][row] for row in range(rows)])
        timesteps = self._stock_timesteps(batch)
        lookups, causes = [], []
        for row in range(rows):
            if self._reanalysis:
                lookup = Lookup(UNREAD)
                given = int(timesteps[row]), int(batch.timesteps[row])
                cause = self._restart_causes(int(event.parents[row]), *given)
            else:
                lookup = stock.lookup_node(row, latents[row])
                cause = proofs.served_causes(lookup, batch.asked[row]) if lookup.found else CRASHED
            lookups.append(lookup)
            causes.append(cause)
        stock.naming, stock.served, stock.reanalyze_phase = batch.names, [], self._reanalysis
        history = [(latents.detach().cpu().numpy(), event.actions[:rows])]
        try:
            _, new, reward, policy, value = stock.forward_recurrent_inference(
                history, event.simulation - 1, batch.depths.tolist(), batch.start_pos
            )
        except Exception as error:  # whatever the stock code meets: that is its answer
            missing = any(not lookup.found for lookup in lookups) and isinstance(error, TypeError)
            return self._crash(error, rows, missing and not self._reanalysis)
        self._latents.append(new)
        named = {'reward': reward, 'latent': new, 'policy': policy, 'value': value}
        longest = max(kv.shape[1] for kv in stock.served)
        found: list[StockRow | None] = []
        for row, truth in enumerate(batch.truths):
            kv, own = stock.served[row], truth.positions
            at = self._rotated_at(int(batch.depths[row]), int(timesteps[row])) or own
            latent, zeros = new[row].reshape(-1), longest - kv.shape[1]
            step = StockStep(kv, truth.action, truth.action, latent, zeros, at, own, False)
            answers = {name: logits[row].reshape(-1) for name, logits in named.items()}
            found.append(self._answered(row, lookups[row].key, answers, step, causes[row], truth))
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
