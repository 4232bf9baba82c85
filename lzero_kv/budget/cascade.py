"""A cache under a budget: prompts layer by layer, then token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lzero_kv.budget.allocation import allocate
from lzero_kv.budget.config import BudgetConfig
from lzero_kv.budget.preference import Preference, layer_preference
from lzero_kv.budget.ragged import LayerKV
from lzero_kv.budget.record import AttentionRecord
from lzero_kv.budget.selection import select
from lzero_kv.budget.tokens import Tokens, gather_tokens


@dataclass
class _Layer:
    """One layer's tokens and what is known of them."""

    kv: LayerKV
    record: AttentionRecord
    scores: torch.Tensor | None = None
    """``[B, G, n]``: scores of the prompt's tokens, until all layers have seen it. Scored anew, tokens that
    are left would have other neighbours, and shrinking twice would not be shrinking once."""


class BudgetedCache:
    """Keys and values of one batch of prompts, each layer within its budget. A new prompt needs a new cache;
    nothing is kept anywhere else.

    For each block of tokens (the prompt first, then usually single tokens) and each layer in order: call
    :meth:`append`, attend over what it returns, call :meth:`observe` with the attention.

    While the prompt passes through the layers, budgets of the layers seen so far are computed again at the
    same total and those layers shrink (CAKE's cascade), so that no more than the total and one full layer are
    held. The weights of the layers are taken from the first block. Later a layer drops tokens when it is over
    its budget; a layer's budget rises only while it holds every token it has seen.

    Arguments:
        config: what was chosen.
        layers: layers of the model.
        context: tokens that ``config.ratio`` is meant for: those of the prompt, or of a full window.
        cascade: whether layers shrink before the last one has seen the prompt. The kept tokens are the same.

    Raises:
        ValueError: the budget does not hold what is always kept, or ``cascade`` with weights that every
            further layer changes (``allocation='attention_based'`` with ``alpha`` < 1).
    """

    def __init__(self, config: BudgetConfig, layers: int, context: int, *, cascade: bool = True) -> None:
        self._allocation, self._selection = config.allocator(), config.selector()
        if cascade and not self._allocation.cascades:
            raise ValueError(
                f'alpha={config.alpha} mixes with the mean over all layers, and budgets of earlier layers '
                f'could rise when their tokens are gone; write alpha=1.0, or cascade=False to shrink all '
                f'layers at the end'
            )
        self.config = config
        self.layers = layers
        self.sizes = config.sizes(layers, context)
        self.cascade = cascade
        self.slots: tuple[int, ...] = ()
        """Tokens that each layer seen so far may hold."""
        self.peak_tokens = 0
        """Most tokens of all layers together that were held at once, for each row."""
        self._held: list[_Layer] = []
        self._preferences: list[Preference] = []
        self._seen = 0
        self._block = 0
        self._shared_out_at = 0
        self._waiting: int | None = None
        self._turn = 0

    @property
    def reads_attention(self) -> bool:
        """Whether :meth:`observe` needs the attention."""
        return self._allocation.needs_preference or bool(self._selection.reads)

    @property
    def held_tokens(self) -> int:
        """Tokens of all layers together, for each row."""
        return sum(layer.kv.tokens for layer in self._held)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values of all layers."""
        return sum(layer.kv.bytes for layer in self._held)

    def __getitem__(self, layer: int) -> LayerKV:
        return self._held[layer].kv

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> LayerKV:
        """Add a block of tokens to a layer.

        Arguments:
            layer: number of the layer; the layers see a block one after another.
            keys, values: ``[B, heads, Q, head_dim]``, ``heads`` key-value heads.
            lengths: with the first block, int64 ``[B]``: tokens of each right-aligned row; None for ``Q``.

        Returns:
            All tokens of the layer, the new ones in the last columns.

        Raises:
            RuntimeError: the call is out of order; nothing is changed.
            ValueError: ``lengths`` with a later block, or a shape that does not fit; nothing is changed.
        """
        self._check_turn(layer)
        if keys.shape != values.shape or keys.ndim != 4:
            raise ValueError(
                f'keys and values must both be [B, heads, Q, head_dim], got {list(keys.shape)} and '
                f'{list(values.shape)}'
            )
        if layer == len(self._held):
            self._held.append(self._first_block(keys, values, lengths))
        else:
            self._held[layer].kv = self._next_block(self._held[layer].kv, keys, values, lengths)
        if layer == 0:
            self._seen += keys.shape[2]
        self._waiting, self._block = layer, keys.shape[2]
        self.peak_tokens = max(self.peak_tokens, self.held_tokens)
        return self._held[layer].kv

    def observe(self, layer: int, attention: torch.Tensor | None = None) -> None:
        """Take in the attention over the tokens that :meth:`append` returned, and drop what is over the
        budget.

        Arguments:
            layer: the layer appended to last.
            attention: ``[B, query heads, Q, n]``, probabilities of the block's ``Q`` tokens over all ``n``.
                The last ``window`` queries suffice, unless accumulated attention is read. None where
                :attr:`reads_attention` is False.

        Raises:
            RuntimeError: :meth:`append` was not called for this layer just before; nothing is changed.
            ValueError: the attention is missing or of another shape; nothing is changed.
        """
        if self._waiting != layer:
            raise RuntimeError(
                f'observe({layer}) must follow append({layer}), the last append was of {self._waiting}'
            )
        held = self._held[layer]
        self._check_attention(held.kv, attention)
        self._waiting, self._turn = None, (layer + 1) % self.layers
        if attention is not None:
            held.record.observe(attention, held.kv.lengths)
        if layer == len(self._preferences):
            self._observe_prompt(held, attention)
            return
        # a layer that held all it had seen may hold the new tokens too, at the cost of others
        if layer == 0 and max(self.slots) >= self._shared_out_at:
            self._share_out()
        self._shrink(held, self.slots[layer])

    def _observe_prompt(self, held: _Layer, attention: torch.Tensor | None) -> None:
        self._preferences.append(self._preference_of(held.kv, attention))
        held.scores = self._selection.scores(held.record, self._tokens(held.kv))
        complete = len(self._held) == self.layers
        if self.cascade or complete:
            self._share_out()
            for one, slots in zip(self._held, self.slots, strict=True):
                self._shrink(one, slots)
        if complete:
            for one in self._held:
                one.scores = None

    def _preference_of(self, kv: LayerKV, attention: torch.Tensor | None) -> Preference:
        if attention is None or not self._allocation.needs_preference:
            return Preference(0.0, 0.0)
        sizes = self.sizes
        return layer_preference(
            attention, kv.lengths[:, 0], window=sizes.window, sinks=sizes.sinks, step=sizes.step
        )

    def _share_out(self) -> None:
        sizes, seen = self.sizes, len(self._preferences)
        self._shared_out_at = self._seen
        self.slots = allocate(
            self._allocation.weights(self.layers, self._preferences)[:seen],
            sizes.total,
            [self._seen] * seen,
            window=sizes.window,
            sinks=sizes.sinks,
            minimum=sizes.minimum,
            step=sizes.step,
            reserved_layers=self.layers,
        )

    def _shrink(self, held: _Layer, slots: int) -> None:
        if held.kv.tokens <= slots:
            return
        tokens = self._tokens(held.kv)
        scores = self._selection.scores(held.record, tokens) if held.scores is None else held.scores
        kept = select(scores, tokens, slots)
        held.kv = held.kv.keep(kept)
        held.record.keep(*kept)
        if held.scores is not None:
            held.scores = gather_tokens(held.scores, kept.indices)

    def _tokens(self, kv: LayerKV) -> Tokens:
        sizes = self.sizes
        return Tokens(kv.positions, kv.lengths, sizes.window, sizes.sinks, sizes.step)

    def _first_block(self, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None) -> _Layer:
        rows, heads, columns = keys.shape[:3]
        full = torch.full((rows,), columns, device=keys.device)
        lengths = full if lengths is None else lengths
        if lengths.shape != (rows,) or int(lengths.min()) < 1 or int(lengths.max()) > columns:
            raise ValueError(
                f'lengths must be {rows} integers in [1, {columns}], the columns of keys, '
                f'got {lengths.tolist()}'
            )
        groups = heads if self.config.per_head else 1
        tokens = Tokens.of_prompt(lengths[:, None].expand(-1, groups), columns, window=self.sizes.window)
        record = AttentionRecord(groups, self.sizes.window, self._selection.decay, self._selection.reads)
        return _Layer(LayerKV(keys, values, tokens.positions, tokens.lengths), record)

    @staticmethod
    def _next_block(
        old: LayerKV, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None
    ) -> LayerKV:
        if lengths is not None:
            raise ValueError('lengths belong to the first block, later ones are full; leave lengths out')
        expected = (*old.keys.shape[:2], keys.shape[2], old.keys.shape[3])
        if keys.shape != expected:
            raise ValueError(f'keys must be {list(expected)} as in the first block, got {list(keys.shape)}')
        # the newest token is never dropped and lies in the last column
        positions = old.positions[:, 0, -1:] + 1 + torch.arange(keys.shape[2], device=keys.device)
        return old.append(keys, values, positions)

    def _check_turn(self, layer: int) -> None:
        if self._waiting is not None:
            raise RuntimeError(
                f'append({layer}) while the attention of layer {self._waiting} is awaited; '
                f'call observe({self._waiting}, ...) first'
            )
        if layer != self._turn:
            raise RuntimeError(
                f'layers see a block one after another: expected append({self._turn}), got append({layer})'
            )

    def _check_attention(self, kv: LayerKV, attention: torch.Tensor | None) -> None:
        if attention is None:
            if self.reads_attention:
                raise ValueError(
                    f'attention must be the probabilities of the new tokens, got None; allocation='
                    f'{self.config.allocation!r} with selection={self.config.selection!r} reads them'
                )
            return
        rows, heads, columns = kv.keys.shape[:3]
        shape, block = tuple(attention.shape), self._block
        if attention.ndim != 4 or (shape[0], shape[3]) != (rows, columns) or shape[1] % heads:
            raise ValueError(
                f'attention must be [{rows}, a multiple of {heads}, Q, {columns}], got {list(shape)}'
            )
        least = block if 'accumulated' in self._selection.reads else min(block, self.sizes.window)
        if not least <= shape[2] <= block:
            raise ValueError(
                f'attention must be of at least the last {least} queries of the block of {block}, '
                f'got {shape[2]}'
            )
