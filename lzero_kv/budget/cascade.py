"""A cache under a budget: prompts layer by layer, then token by token."""

from __future__ import annotations

import torch

from lzero_kv.budget.allocation import allocate
from lzero_kv.budget.attention import AttentionRecord, Preference, layer_preference
from lzero_kv.budget.config import BudgetConfig
from lzero_kv.budget.layer import LayerCache


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
        self._held: list[LayerCache] = []
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
        return sum(layer.columns for layer in self._held)

    @property
    def bytes(self) -> int:
        """Bytes of all layers, what is remembered of the attention included."""
        return sum(layer.bytes for layer in self._held)

    def __getitem__(self, layer: int) -> LayerCache:
        return self._held[layer]

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> LayerCache:
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
            self._check_next_block(self._held[layer], keys, lengths)
            self._held[layer].append(keys, values)
        if layer == 0:
            self._seen += keys.shape[2]
        self._waiting, self._block = layer, keys.shape[2]
        self.peak_tokens = max(self.peak_tokens, self.held_tokens)
        return self._held[layer]

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
        self._check_attention(held, attention)
        self._waiting, self._turn = None, (layer + 1) % self.layers
        if attention is not None:
            held.observe(attention)
        if layer == len(self._preferences):
            self._observe_prompt(held, attention)
            return
        # a layer that held all it had seen may hold the new tokens too, at the cost of others
        if layer == 0 and max(self.slots) >= self._shared_out_at:
            self._share_out()
        held.shrink(self.slots[layer], self._selection)

    def _observe_prompt(self, held: LayerCache, attention: torch.Tensor | None) -> None:
        self._preferences.append(self._preference_of(held, attention))
        # until the next block: scored anew, tokens that are left would have other neighbours, and shrinking
        # twice would not be shrinking once
        held.scores = self._selection.scores(held.record, held.tokens)
        if self.cascade or len(self._held) == self.layers:
            self._share_out()
            for one, slots in zip(self._held, self.slots, strict=True):
                one.shrink(slots, self._selection)

    def _preference_of(self, held: LayerCache, attention: torch.Tensor | None) -> Preference:
        if attention is None or not self._allocation.needs_preference:
            return Preference(0.0, 0.0)
        sizes = self.sizes
        return layer_preference(
            attention, held.lengths[:, 0], window=sizes.window, sinks=sizes.sinks, step=sizes.step
        )

    def _share_out(self) -> None:
        seen = len(self._preferences)
        self._shared_out_at = self._seen
        self.slots = allocate(
            self._allocation.weights(self.layers, self._preferences)[:seen],
            contexts=[self._seen] * seen,
            reserved_layers=self.layers,
            **self.sizes._asdict(),
        )

    def _first_block(
        self, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None
    ) -> LayerCache:
        rows, heads, columns = keys.shape[:3]
        full = torch.full((rows,), columns, device=keys.device)
        lengths = full if lengths is None else lengths
        if lengths.shape != (rows,) or int(lengths.min()) < 1 or int(lengths.max()) > columns:
            raise ValueError(
                f'lengths must be {rows} integers in [1, {columns}], the columns of keys, '
                f'got {lengths.tolist()}'
            )
        groups, sizes, reads = heads if self.config.per_head else 1, self.sizes, self._selection.reads
        record = AttentionRecord(groups, sizes.window, self._selection.decay, reads)
        return LayerCache.of_prompt(keys, values, lengths, record, sizes.sinks, sizes.step)

    @staticmethod
    def _check_next_block(held: LayerCache, keys: torch.Tensor, lengths: torch.Tensor | None) -> None:
        if lengths is not None:
            raise ValueError('lengths belong to the first block, later ones are full; leave lengths out')
        expected = (*held.keys.shape[:2], keys.shape[2], held.keys.shape[3])
        if keys.shape != expected:
            raise ValueError(f'keys must be {list(expected)} as in the first block, got {list(keys.shape)}')

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

    def _check_attention(self, held: LayerCache, attention: torch.Tensor | None) -> None:
        if attention is None:
            if self.reads_attention:
                raise ValueError(
                    f'attention must be the probabilities of the new tokens, got None; allocation='
                    f'{self.config.allocation!r} with selection={self.config.selection!r} reads them'
                )
            return
        rows, heads, columns = held.keys.shape[:3]
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
