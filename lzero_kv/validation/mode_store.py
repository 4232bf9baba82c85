"""Mode ``store``: what the stock cache hands out, holding the keys and values that this cache stores."""

from __future__ import annotations

import torch

from lzero_kv.validation import causes as proofs
from lzero_kv.validation.causes import StockStep
from lzero_kv.validation.histories import HistoryName
from lzero_kv.validation.mode import CRASHED, UNREAD, WIPED, NodeBatch, RootBatch, StockMode
from lzero_kv.validation.rows import Causes, StockRow, Truth
from lzero_kv.validation.stock import Lookup, contents


class StockStore(StockMode):
    """Mode ``store``: the stock dictionaries and rings hold what this cache stores, under their own keys."""

    def roots(self, batch: RootBatch) -> list[StockRow | None]:
        """Answers for each row; afterwards the stock structures hold the new roots."""
        lookups, rows = self._root_lookups(batch), len(batch.names)
        found: list[StockRow | None] = [self._root(batch, row, lookups[row]) for row in range(rows)]
        self.stock.naming, stored = batch.names, batch.event.stored
        for row in range(min(rows, self.stock.env_num)):
            kv, exact = stored.row(row), not stored.rounded
            self.stock.keep(row, batch.event.latents[row], kv, root=True, exact=exact)
        self.stock.past_kv_cache_recurrent_infer.clear()
        return found

    def _root(self, batch: RootBatch, row: int, lookup: Lookup | None) -> StockRow:
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
            kv = self._restart(latent, int(event.timesteps[row]))
        present = bool(event.served.present[row])
        return self._served(lookup, batch.asked[row], kv, truth, causes, present=present, root=True)

    def _served(
        self,
        lookup: Lookup,
        asked: HistoryName | None,
        kv: torch.Tensor,
        truth: Truth,
        causes: Causes | None,
        *,
        present: bool,
        root: bool,
    ) -> StockRow:
        """``present``: whether this cache had the entry too, and did not compute it again."""
        slot, action, at = lookup.slot, truth.action, truth.positions
        step = StockStep(kv, action, action, truth.latent, 0, at, at, root)
        return StockRow(
            lookup.key,
            kv,
            exact=present and slot is not None and slot.history == asked and slot.exact,
            explain=lambda: causes,
            moved=lambda: self._replay.run(step).answers,
        )

    def nodes(self, batch: NodeBatch) -> list[StockRow | None]:
        """Answers for each row; afterwards the stock structures hold the new nodes."""
        event, timesteps = batch.event, self._stock_timesteps(batch)
        found: list[StockRow | None] = []
        for row, truth in enumerate(batch.truths):
            parent = int(event.parents[row])
            latent = self._latents[parent][row]
            if self._reanalysis:
                causes = self._restart_causes(parent, int(timesteps[row]), int(batch.timesteps[row]))
                lookup, kv = Lookup(UNREAD), self._restart(latent, int(timesteps[row]))
            else:
                lookup = self.stock.lookup_node(row, latent)
                if not lookup.found:
                    found.append(StockRow(lookup.key, None, explain=lambda: CRASHED))
                    continue
                causes = proofs.served_causes(lookup, batch.asked[row])
                kv = contents(lookup.entry)
            present = bool(event.served.present[row])
            asked = batch.asked[row]
            found.append(self._served(lookup, asked, kv, truth, causes, present=present, root=False))
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
