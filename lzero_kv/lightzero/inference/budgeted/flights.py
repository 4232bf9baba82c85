"""Histories under layer budgets: root inference reads the attention and drops tokens; searches only look.

A root's history holds in each layer the tokens that its budget allows. Root inference appends two tokens and
drops the worst ones; what is dropped is gone, and what stays keeps its place in the history: its rotation, or
its learned position. A window that is full moves as without budgets: what stays of it is computed from the
raw tokens, and chosen by the attention of that pass. Searches append to their roots' histories and drop
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lzero_kv.budget import BudgetCounters, BudgetSnapshot, BudgetTracker, Kept, select
from lzero_kv.cache.keys import NO_SLOT
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP, Window
from lzero_kv.config import KVCacheConfig, NodeBudget
from lzero_kv.lightzero.inference.attention import attention_probabilities, layers_of_pass
from lzero_kv.lightzero.inference.budgeted.flight import BudgetedFlight
from lzero_kv.lightzero.inference.budgeted.held import HeldLayer, HeldTable, Terms
from lzero_kv.lightzero.inference.flights import Flights


def limiting_budget(config: KVCacheConfig, layers: int, window: Window) -> NodeBudget | None:
    """The budget, if it holds less than all tokens of a full window.

    Raises:
        ValueError: it does not hold what is always kept.
    """
    budget = config.budget
    if budget is None or budget.sizes(layers, window.kept).total >= layers * window.kept:
        return None
    return budget


class BudgetedFlights(Flights):
    """Makes flights whose layers hold what a budget allows.

    Attributes:
        tracker: the tokens of each layer.
        tally: what was dropped.
    """

    def __init__(
        self, world_model: Any, manager: KVCacheManager, config: KVCacheConfig, budget: NodeBudget
    ) -> None:
        super().__init__(world_model, manager, config)
        self.selector = budget.selector()
        self.tracker = BudgetTracker(budget, self.layers, self.window.kept)
        self.tally = BudgetCounters(self.layers)
        self.shares_histories = True
        sizes, layout = self.tracker.sizes, manager.layout
        reads = self.selector.reads | ({'recent'} if self.tracker.needs_preference else set())
        terms = Terms(
            self.heads if budget.per_head else 1,
            self.heads,
            sizes.window,
            sizes.sinks,
            sizes.step,
            self.selector.decay,
            reads,
        )
        roots = manager.env_num * config.root_slots
        self.table = HeldTable(terms, self.tracker.slots, sizes.total, roots, layout.dtype, layout.device)
        manager.record_bytes = self.table.bytes

    @property
    def reads_attention(self) -> bool:
        """Whether root inference has to look at the attention."""
        return bool(self.table.terms.reads)

    def reading(self) -> BudgetSnapshot:
        """The budgets of this moment, and what the latest roots hold."""
        roots = np.flatnonzero(self.table.lengths(np.arange(self.table.roots)))
        lengths, held = self.table.lengths(roots), self.table.held(roots)
        oldest = self.manager.next_positions(roots) - lengths
        kept = [
            [
                ends[len(ends) - count :] - first
                for ends, count, first in zip(columns, counts, oldest, strict=True)
            ]
            for columns, counts in zip(self.table.positions(roots), held.T, strict=True)
        ]
        nothing = np.empty(0, np.int64)
        return BudgetSnapshot(
            self.window.kept,
            self.tracker.slots,
            self.tracker.preferences,
            self.tally.losses(),
            tuple(np.concatenate([nothing, *layer]) for layer in kept),
            tuple(layer[0] if layer else nothing for layer in kept),
        )

    def begin_roots(self) -> None:
        """Bring the budgets up to date, and the stored roots within them."""
        super().begin_roots()
        if not self.tracker.advance():
            return
        slots = np.arange(self.table.roots)
        rows = self.manager.load(slots)
        layers = self.table.unpack(rows, slots, np.ones(len(slots), dtype=bool), watched=True)
        lengths = self.table.lengths(slots)
        self.table.slots = self.tracker.slots
        narrowed = [self.within(layer, number) for number, layer in enumerate(layers)]
        self.manager.slab.store(slots, self.table.pack(narrowed))
        self.table.note(slots, narrowed, lengths)

    def load(self, slots: np.ndarray, *, watched: bool = False) -> BudgetedFlight:
        """Load the histories in ``slots`` (int64 ``[B]``); a row with ``NO_SLOT`` starts empty, for the
        caller to restore.

        Args:
            watched: the flight reads the attention of what is appended, and drops what is over the budget.
        """
        present = slots != NO_SLOT
        lengths = np.zeros(len(slots), dtype=np.int64)
        next_positions = np.zeros(len(slots), dtype=np.int64)
        layout = self.manager.layout
        rows = torch.zeros(layout.batch_shape(len(slots)), dtype=layout.dtype, device=layout.device)
        if present.any():
            known = slots[present]
            lengths[present] = self.table.lengths(known)
            next_positions[present] = self.manager.next_positions(known)
            rows = self.manager.load(np.where(present, slots, known[0]))
        layers = self.table.unpack(rows, np.where(present, slots, 0), present, watched)
        grown = [layer.widened(0, TOKENS_PER_STEP) for layer in layers]
        return BudgetedFlight(self, grown, lengths, next_positions, watched)

    def widths(self, tokens: int) -> list[int]:
        """Tokens that each layer holds of histories of at most ``tokens`` tokens."""
        return [min(tokens, slots) for slots in self.tracker.slots]

    def prefill(
        self, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> list[HeldLayer]:
        """What the layers hold of whole histories, from their raw embeddings alone; arguments as of
        :meth:`recompute`. Each layer is cut to its budget before the next one is computed."""
        terms, (rows, width, _) = self.table.terms, tokens.shape
        device = tokens.device
        first = to_device(next_positions, device)[:, None] - width
        positions = (first + torch.arange(width, device=device)).clamp(min=0)
        held = to_device(lengths, device)
        layers = []
        seen_by_layers = layers_of_pass(self.prepared, *self.placed(tokens, lengths, next_positions))
        for number, layer in enumerate(seen_by_layers):
            whole = HeldLayer(
                terms,
                torch.stack([part.transpose(1, 2).flatten(2) for part in (layer.keys, layer.values)], dim=1),
                positions[:, None].expand(rows, terms.groups, width),
                held,
                terms.record(),
            )
            if terms.reads:
                # accumulated attention is that of all queries, anything else that of the last ones
                queries = width if 'accumulated' in terms.reads else min(width, terms.window)
                mask = layer.mask[:, :, width - queries :]
                seen = attention_probabilities(layer.queries[:, :, width - queries :], layer.keys, mask)
                whole.record.observe(seen, whole.lengths_of_groups, token_by_token=True)
            layers.append(self.within(whole, number))
            if len(layers) == self.layers:
                break  # what follows the last layer's keys and values is not asked for
        return layers

    def within(self, layer: HeldLayer, number: int) -> HeldLayer:
        """A layer with as many columns as its budget has tokens, and those tokens that stay."""
        missing = self.tracker.slots[number] - layer.kv.shape[2]
        return layer.keep(self.choose(layer, number)).widened(max(0, missing))

    def choose(self, layer: HeldLayer, number: int) -> Kept:
        """The tokens that stay of a layer: all of them, if it is not over its budget."""
        slots, tokens = min(self.tracker.slots[number], layer.kv.shape[2]), layer.tokens
        if int(layer.lengths.max()) <= slots:
            return layer.newest(slots)
        return select(self.selector.scores(layer.record, tokens), tokens, slots)

    def put_away(
        self,
        keys: Sequence[Any],
        layers: Sequence[HeldLayer],
        lengths: np.ndarray,
        next_positions: np.ndarray,
    ) -> None:
        """Store histories (``lengths`` before anything was dropped, int64 ``[B]``) under their keys."""
        slots = self.manager.store(keys, self.table.pack(layers), held_by(layers), next_positions)
        self.table.note(slots, layers, lengths)

    def write(
        self,
        slots: np.ndarray,
        layers: Sequence[HeldLayer],
        lengths: np.ndarray,
        next_positions: np.ndarray,
    ) -> None:
        """:meth:`put_away` for slots (int64 ``[B]``) that were reserved."""
        self.manager.slab.write(slots, self.table.pack(layers), held_by(layers), next_positions)
        self.table.note(slots, layers, lengths)


def held_by(layers: Sequence[HeldLayer]) -> np.ndarray:
    """Most tokens that a layer holds of each row, int64 ``[B]``."""
    return torch.stack([layer.lengths for layer in layers]).amax(0).cpu().numpy()
