"""Layer budgets of a world model's windows: root inference reads the attention and drops tokens; searches
only look.

A root's window holds in each layer the tokens that its budget allows. Root inference appends two tokens and
drops the worst ones; what stays keeps its rotation or its learned position. A window that overflows moves as
without budgets: what stays of it is computed from the raw tokens, and chosen by the attention of that pass.
Searches append to their windows and drop nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lzero_kv.budget import (
    AttentionRecord,
    BudgetCounters,
    BudgetSnapshot,
    BudgetTracker,
    Kept,
    LayerCache,
    layer_preference,
)
from lzero_kv.cache.keys import NO_SLOT, RootKey
from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP
from lzero_kv.config import NodeBudget

from .attention import Columns, additive_mask, attention_probabilities, decode, prefill
from .resources import InferenceResources
from .rows import Geometry, ResidentRows

NOT_SHOWN = 'observers compare whole histories, and kv_cache.budget keeps a part of them; leave budget out'


class WindowBudget:
    """Which tokens the layers keep of a world model's windows, and what is remembered of those of roots.

    A slot of the storage has the same number of tokens whatever the budgets are; the layers divide it among
    themselves. Positions and attention of a root's tokens lie in tensors of their own in the same order.

    Args:
        resources: of the world model.
        budget: what was chosen.

    Attributes:
        tracker: the tokens of each layer.
        counters: what was dropped.
    """

    def __init__(self, resources: InferenceResources, budget: NodeBudget) -> None:
        self._resources = resources
        manager, layers = resources.manager, resources.world_model.num_layers
        layout, config = manager.layout, manager.cache_config
        self._selection = budget.selector()
        kept = resources.window.kept
        self.tracker = BudgetTracker(
            budget, layers, kept, smoothing=budget.smoothing, hysteresis=budget.hysteresis
        )
        self.counters = BudgetCounters(layers)
        sizes = self._sizes = self.tracker.sizes
        self._groups = groups = layout.heads if budget.per_head else 1
        self._reads = self._selection.reads | ({'recent'} if self.tracker.needs_preference else set())
        self._roots = roots = manager.env_num * config.root_slots
        device: Any = dict(device=layout.device)
        scores: Any = dict(dtype=torch.promote_types(layout.dtype, torch.float32), **device)
        self._positions = torch.zeros(roots, groups, layout.tokens, dtype=torch.int64, **device)
        self._accumulated = self._recent = None
        if 'accumulated' in self._reads:
            self._accumulated = torch.zeros(roots, groups, layout.tokens, **scores)
        if 'recent' in self._reads:
            self._recent = torch.zeros(roots, layout.heads, sizes.window, layout.tokens, **scores)
        self._queries = torch.zeros(roots, groups, dtype=torch.int64, **device)
        self._held = np.zeros((roots, layers), np.int64)
        self._lengths = np.zeros(roots, np.int64)  # before anything was dropped
        manager.record_bytes = self.record_bytes
        self._take_widths()

    def _take_widths(self) -> None:
        """Let windows lie in their slots as the budgets are now."""
        layout, self._widths = self._resources.manager.layout, self.tracker.slots
        self._resources.geometry = Geometry(layout.heads, layout.head_dim, self._widths)

    @property
    def record_bytes(self) -> int:
        """Bytes of what is remembered of the roots' tokens."""
        tensors = self._positions, self._accumulated, self._recent, self._queries
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def reads_attention(self) -> bool:
        """Whether root inference has to look at the attention."""
        return bool(self._reads)

    def advance(self) -> None:
        """Bring the budgets up to date, and the stored roots within them."""
        if not self.tracker.advance():
            return
        slots = np.arange(self._roots)
        layers = self.load(slots)
        self._take_widths()
        for number, layer in enumerate(layers):
            self.narrow(layer, number)
        self._resources.manager.storage.store(slots, self._packed(layers))
        self._note(slots, layers, self._lengths)

    def snapshot(self) -> BudgetSnapshot:
        """The budgets of this moment, and what the latest roots hold."""
        roots = np.flatnonzero(self._lengths)
        oldest = self._resources.manager.next_positions(roots) - self._lengths[roots]
        positions = self._positions[to_device(roots, self._positions.device), 0].cpu().numpy()
        ends = np.cumsum(self._widths)
        kept = [
            [
                positions[row, end - count : end] - first
                for row, (count, first) in enumerate(zip(counts, oldest, strict=True))
            ]
            for end, counts in zip(ends.tolist(), self._held[roots].T, strict=True)
        ]
        nothing = np.empty(0, np.int64)
        return BudgetSnapshot(
            self._resources.window.kept,
            self.tracker.slots,
            self.tracker.preferences,
            self.counters.losses(),
            tuple(np.concatenate([nothing, *layer]) for layer in kept),
            tuple(layer[0] if layer else nothing for layer in kept),
        )

    # the layers of a batch of windows

    def load(self, slots: np.ndarray, room: int = 0) -> list[LayerCache]:
        """What the layers hold of the roots in ``slots`` (int64 ``[B]``), in tensors of their own.

        Args:
            slots: ``NO_SLOT`` for a root that is not stored, whose layers are empty.
            room: columns behind for tokens to come.
        """
        device = self._positions.device
        present, slots = slots != NO_SLOT, np.maximum(slots, 0)
        at, known = to_device(slots, device), to_device(present, device)
        held = to_device(np.where(present[:, None], self._held[slots], 0), device)
        storage = self._resources.manager.storage.tensor
        layers, begin = [], 0
        for number, width in enumerate(self._widths):
            part = slice(begin, begin + width)
            begin += width
            kv = F.pad(storage[:, :, :, part].index_select(0, at), (0, 0, 0, room))
            positions = F.pad(self._positions[at, :, part], (0, room))
            record = self._record()
            if self._accumulated is not None:
                record.accumulated = torch.where(known[:, None, None], self._accumulated[at, :, part], 0.0)
            if self._recent is not None:
                record.queries = torch.where(known[:, None], self._queries[at], 0)
                record.recent = torch.where(known[:, None, None, None], self._recent[at, :, :, part], 0.0)
            layers.append(self._layer(kv, positions, held[:, number], record))
        return layers

    def prefill(
        self, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> list[LayerCache]:
        """What the layers keep of whole histories, from their raw embeddings alone; arguments as of
        :meth:`InferenceResources.prefilled`. Each layer is cut to its budget before the next one is
        computed."""
        resources, (rows, width, _) = self._resources, tokens.shape
        device, window = tokens.device, self._sizes.window
        first = to_device(next_positions, device)[:, None] - width
        positions = (first + torch.arange(width, device=device)).clamp(min=0)
        positions = positions[:, None].expand(rows, self._groups, width)
        held, layers = to_device(lengths, device), list[LayerCache]()
        for seen in prefill(resources.weights, *resources.placed(tokens, lengths, next_positions)):
            kv = torch.stack([seen.keys, seen.values], dim=1)
            layer = self._layer(kv, positions, held, self._record())
            if self._reads:
                # accumulated attention is that of all queries, anything else that of the last ones
                last = width if 'accumulated' in self._reads else min(width, window)
                queries, mask = seen.queries[:, :, width - last :], seen.mask[:, :, width - last :]
                observe(layer, len(layers), attention_probabilities(queries, seen.keys, mask))
            self.narrow(layer, len(layers))
            layers.append(layer)
            if len(layers) == len(self._widths):
                break  # what follows the last layer's keys and values is not asked for
        return layers

    def choose(self, layer: LayerCache, number: int) -> Kept:
        """The tokens that stay of a layer: all of them, if it is not over its budget."""
        slots = min(self._widths[number], layer.columns)
        if int(layer.lengths.max()) <= slots:
            return layer.newest(slots)
        return layer.choose(slots, self._selection)

    def narrow(self, layer: LayerCache, number: int) -> None:
        """Give a layer as many columns as its budget has tokens, and those tokens that stay."""
        layer.keep(self.choose(layer, number))
        layer.pad(self._widths[number])

    def store(
        self,
        keys: Sequence[RootKey],
        layers: Sequence[LayerCache],
        lengths: np.ndarray,
        next_positions: np.ndarray,
    ) -> None:
        """Store roots (``lengths`` before anything was dropped, int64 ``[B]``) under their keys."""
        most = held_by(layers).max(axis=1)
        slots = self._resources.manager.store(keys, self._packed(layers), most, next_positions)
        self._note(slots, layers, lengths)

    def derive(
        self,
        resident: ResidentRows,
        rows: np.ndarray,
        tokens: torch.Tensor,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        stays: np.ndarray,
        slots: np.ndarray,
    ) -> np.ndarray:
        """Compute windows of a search beside their rows, and store them. What stays of a layer is chosen
        before the next layer is computed, so this pass is one of its own.

        Args:
            resident: where the windows belong.
            rows: int64 ``[N]``, of them.
            tokens, lengths, next_positions: of the windows, as of :meth:`prefill`.
            stays: bool ``[N]``, windows that are stored.
            slots: int64, where those are stored.

        Returns:
            int64 ``[N, layers]``: tokens that the layers keep.
        """
        layers = self.prefill(tokens, lengths, next_positions)
        at, window = to_device(rows, tokens.device), resident.geometry.window
        for number, layer in enumerate(layers):
            kv = torch.stack([layer.keys, layer.values], dim=1)
            place = resident.buffer[:, number, :, :, window - layer.columns : window]
            place.index_copy_(0, at, kv)
        held = held_by(layers)
        if len(slots):
            kept = to_device(np.flatnonzero(stays), tokens.device)
            packed = self._packed(layers).index_select(0, kept)
            storage = self._resources.manager.storage
            storage.write(slots, packed, held[stays].max(axis=1), next_positions[stays])
        return held

    def _record(self) -> AttentionRecord:
        return AttentionRecord(self._groups, self._sizes.window, self._selection.decay, self._reads)

    def _layer(
        self, kv: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, record: AttentionRecord
    ) -> LayerCache:
        """A layer of keys and values ``[B, 2, heads, n, head_dim]``, one tensor, and lengths ``[B]``."""
        of_groups = lengths[:, None].repeat(1, self._groups)
        sizes = self._sizes
        return LayerCache(kv[:, 0], kv[:, 1], positions, of_groups, record, sizes.sinks, sizes.step)

    def _packed(self, layers: Sequence[LayerCache]) -> torch.Tensor:
        """Layers with exactly their part of the columns, as windows ``[B, 2, heads, total, head_dim]``."""
        kv = torch.stack(
            [torch.cat([getattr(layer, name) for layer in layers], dim=2) for name in ('keys', 'values')],
            dim=1,
        )
        return F.pad(kv, (0, 0, 0, self._resources.manager.layout.tokens - kv.shape[3]))

    def _note(self, slots: np.ndarray, layers: Sequence[LayerCache], lengths: np.ndarray) -> None:
        """Remember what is known of roots that were stored in ``slots`` (int64 ``[B]``)."""
        self._lengths[slots] = lengths
        self._held[slots] = held_by(layers)
        at, begin = to_device(slots, self._positions.device), 0
        for layer in layers:
            part = slice(begin, begin + layer.columns)
            begin += layer.columns
            record = layer.record
            self._positions[at, :, part] = layer.positions
            if self._accumulated is not None and record.accumulated is not None:
                self._accumulated[at, :, part] = record.accumulated
            if self._recent is not None and record.recent is not None and record.queries is not None:
                self._recent[at, :, :, part] = record.recent
                self._queries[at] = record.queries

    def lengths(self, slots: np.ndarray) -> np.ndarray:
        """int64 ``[B]``: tokens of the roots in these slots before anything was dropped."""
        return self._lengths[slots]

    def observe_preferences(self, layers: Sequence[LayerCache]) -> None:
        """Measure what the layers need, where the budgets follow that."""
        if not self.tracker.needs_preference:
            return
        sizes = self._sizes
        self.tracker.observe(
            [
                layer_preference(
                    layer.record.recent,
                    layer.lengths[:, 0],
                    window=sizes.window,
                    sinks=sizes.sinks,
                    step=sizes.step,
                )
                for layer in layers
                if layer.record.recent is not None
            ]
        )


class BudgetedRootStep:
    """Histories of a batch of environments under a budget, from load to store: as :class:`RootStep`."""

    def __init__(self, resources: InferenceResources, budget: WindowBudget, slots: np.ndarray) -> None:
        self._resources = resources
        self._budget = budget
        self._layers = budget.load(slots)
        self._newest: list[torch.Tensor] = []  # attention of the newest token, [B, heads, n_l]
        self.lengths = np.where(slots == NO_SLOT, 0, budget.lengths(slots))
        self.next_positions = np.zeros(len(slots), np.int64)
        present = slots != NO_SLOT
        if present.any():
            self.next_positions[present] = resources.manager.next_positions(slots[present])

    def restore(
        self, rows: np.ndarray, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """Compute histories that are not stored: :meth:`RootStep.restore`."""
        at = to_device(rows, tokens.device)
        computed = self._budget.prefill(tokens, lengths, next_positions)
        for layer, other in zip(self._layers, computed, strict=True):
            layer.put_rows(at, other)
        self.lengths[rows], self.next_positions[rows] = lengths, next_positions

    def append(
        self,
        actions: torch.Tensor | None,
        observations: torch.Tensor,
        first: np.ndarray,
        positions: np.ndarray,
        windows: torch.Tensor,
    ) -> torch.Tensor:
        """Append an action and the observation behind it to every row, and drop what is over the budgets:
        :meth:`RootStep.append`. One after the other: each token's attention is seen by itself."""
        device, before = observations.device, self.lengths
        ahead = self.next_positions
        logical = np.stack([ahead, np.where(first, positions, ahead + 1)], axis=1)
        places = np.stack([before, before + ~first], axis=1)
        placed = self._resources.positions.at(places, logical)
        own, grown = to_device(logical, device), to_device(1 + ~first, device)
        blocks = [self._widened(layer, own, grown) for layer in self._layers]
        hidden = observations
        for token, x in enumerate((actions, observations)):
            if x is None:
                continue
            added, rotation = placed
            now = slice(token, token + 1)
            hidden = decode(
                self._resources.weights,
                self._columns(blocks, token, grown),
                x[:, None] if added is None else x[:, None] + added[:, now],
                None if rotation is None else rotation[:, now],
                watch=self._watch() if self._budget.reads_attention else None,
            )
        self.lengths, moved = self._resources.window.advance(places[:, 1] + 1)
        self.next_positions = logical[:, 1] + 1
        self._budget.observe_preferences(self._layers)
        for number, layer in enumerate(self._layers):
            kept = self._budget.choose(layer, number)
            newest = self._newest[number] if self._newest else None
            self._budget.counters.dropped(number, layer.tokens, kept, newest)
            layer.keep(kept)
        rows = np.flatnonzero(moved)
        if len(rows):
            tokens = windows.index_select(0, to_device(rows, device))
            self.restore(rows, tokens, self.lengths[rows], self.next_positions[rows])
        return hidden

    def _widened(self, layer: LayerCache, positions: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
        """Give a layer two columns for new tokens; its keys and values as one tensor ``[B, 2, heads, n,
        head_dim]``, in which they are written."""
        kv = F.pad(torch.stack([layer.keys, layer.values], dim=1), (0, 0, 0, TOKENS_PER_STEP))
        layer.keys, layer.values = kv[:, 0], kv[:, 1]
        of_groups = positions[:, None].expand(-1, layer.positions.shape[1], -1)
        layer.positions = torch.cat([layer.positions, of_groups], dim=2)
        layer.lengths = layer.lengths + grown[:, None]
        return kv

    def _columns(self, blocks: Sequence[torch.Tensor], token: int, grown: torch.Tensor) -> Columns:
        keys, values, own, masks = [], [], [], []
        for kv, layer in zip(blocks, self._layers, strict=True):
            end = kv.shape[3] - TOKENS_PER_STEP + token + 1
            keys.append(kv[:, 0, :, :end])
            values.append(kv[:, 1, :, :end])
            own.append(kv[:, :, :, end - 1 : end])
            before = (layer.lengths[:, 0] - grown).cpu().numpy()
            visible = before + 1 if not token else layer.lengths[:, 0].cpu().numpy()
            masks.append(additive_mask((np.arange(end) >= end - visible[:, None])[:, None, None], kv))
        return Columns(keys, values, own, masks)

    def _watch(self) -> Any:
        """A function that records the attention of a token in each layer."""
        self._newest = []

        def watch(number: int, probabilities: torch.Tensor) -> None:
            observe(self._layers[number], number, probabilities)
            self._newest.append(probabilities[:, :, -1])

        return watch

    @property
    def held(self) -> np.ndarray:
        """int64 ``[B, layers]``: tokens that the layers hold of each history."""
        return held_by(self._layers)

    def store(self, keys: Sequence[RootKey]) -> None:
        """Store all histories under their keys."""
        self._budget.store(keys, self._layers, self.lengths, self.next_positions)

    def histories(self, behind: int) -> list[torch.Tensor]:
        """Whole histories are not there to be shown.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(NOT_SHOWN)


def observe(layer: LayerCache, number: int, attention: torch.Tensor) -> None:
    """Record the attention of a layer's newest tokens, ``[B, heads, Q, n]``.

    Raises:
        RuntimeError: it is not finite, as with broken weights.
    """
    try:
        layer.observe(attention)
    except ValueError as error:
        raise RuntimeError(f'layer {number} of the world model: {error}') from error


def held_by(layers: Sequence[LayerCache]) -> np.ndarray:
    """Tokens that each layer holds of each row, int64 ``[B, layers]``."""
    return torch.stack([layer.lengths[:, 0] for layer in layers], dim=1).cpu().numpy()
