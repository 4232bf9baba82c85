"""A cache under a budget: prompts layer by layer, then token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lzero_kv.budget.allocation import allocate
from lzero_kv.budget.attention import (
    AttentionRecord,
    Preference,
    QueryAttention,
    at_least_float32,
    dispersion_and_shift,
)
from lzero_kv.budget.config import INTERVAL, BudgetConfig, Sizes
from lzero_kv.budget.layer import LayerCache
from lzero_kv.budget.tokens import real_columns


class BudgetedCache:
    """Keys and values of one batch of sequences, each layer within its budget.

    A new prompt needs a new cache; nothing is kept anywhere else.

    For each block of tokens (a prompt, a part of one, the next token) and each layer in order: :meth:`join`
    the block to the keys and values that the layer holds, :meth:`append` it, attend, and :meth:`observe` the
    queries. Rows of a batch have budgets of their own, so a row is treated as if it were alone.

    While a row's first block passes through the layers, budgets of the layers seen so far are computed again
    at the same total and those layers shrink (CAKE's cascade), so that no more than the total and one full
    layer are held. Where every further layer changes the weights (``allocation='attention_based'`` with
    ``alpha`` < 1) the layers shrink behind the last one.

    Later blocks are cut to the budgets as they pass. Single tokens are appended without a choice; every
    ``interval`` tokens the queries since the last choice are read and a layer is cut so far that the next
    tokens fit. The total follows the tokens seen, and the slots are shared out again at each choice; a layer
    gets no more than it can hold. ``dynamic=False`` leaves the slots as the prompt made them.

    Arguments:
        config: what was chosen. A sequence that is too short for it keeps window, sinks and ``interval``
            other tokens in each layer.
        layers: layers of the model.
        limits: for each layer the newest tokens that it holds at most (a sliding window less one), None for
            all.
        dynamic: whether the slots move while single tokens are appended.
        interval: single tokens between two choices, at least 1; fewer where ``config.tokens`` is small.
        measure: whether dispersion and shift are read where the allocation needs none of them.
        scale: factor of the products of queries and keys; None for ``head_dim ** -0.5``.
    """

    def __init__(
        self,
        config: BudgetConfig,
        layers: int,
        *,
        limits: Sequence[int | None] | None = None,
        dynamic: bool = True,
        interval: int = INTERVAL,
        measure: bool = False,
        scale: float | None = None,
    ) -> None:
        self._allocation, self._selection = config.allocator(), config.selector()
        self.config = config
        self.layers = layers
        self.limits = tuple(limits) if limits is not None else (None,) * layers
        self.dynamic = dynamic
        self.interval = config.interval(interval)
        self.scale = scale
        self._measures = measure or self._allocation.needs_preference
        self.cascade = self._allocation.cascades
        """Whether layers shrink before the last one has seen the prompt."""
        self.seen: list[int] = []
        """Tokens of each row."""
        self.slots: list[tuple[int, ...]] = []
        """For each row the tokens that each layer seen so far may hold."""
        self.preferences: list[list[Preference]] = []
        """For each row what was read of each layer's attention at the last block of a window's size."""
        self.peak_tokens = 0
        """Most tokens of all layers together that were held at once, for each row."""
        self._held: list[LayerCache] = []
        self._counts: list[list[int]] = []  # for each layer the tokens of each row, at most
        self._whole: list[bool] = []  # whether no token was dropped for the budget
        self._joined: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self._added: list[int] = []
        self._placed: torch.Tensor | None = None  # positions of the block
        self._row_sizes: list[Sizes] = []  # of the block, where tokens are chosen; empty before
        self._block = 0
        self._begin: list[bool] = []  # rows without tokens before the block
        self._steps = -1  # single tokens since the last longer block; -1 in such a block
        self._waiting: int | None = None
        self._turn = 0

    @property
    def reads_attention(self) -> bool:
        """Whether :meth:`observe` reads the queries."""
        return not self._keeps_everything and (self._measures or bool(self._selection.reads))

    @property
    def held_tokens(self) -> int:
        """Tokens of all layers together, for each row."""
        return sum(layer.columns for layer in self._held)

    @property
    def bytes(self) -> int:
        """Bytes of all layers, what is remembered of the attention included."""
        return sum(layer.bytes for layer in self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, layer: int) -> LayerCache:
        return self._held[layer]

    def whole(self, layer: int) -> bool:
        """Whether a layer holds every token that is within its limit."""
        return self._whole[layer]

    def all_real(self, layer: int) -> bool:
        """Whether every column of a layer is known to hold a token."""
        exact = self.config.step == 1 and (self.limits[layer] is None or self._whole[layer])
        return exact and min(self._counts[layer]) == self._held[layer].columns

    def join(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer with a block of new tokens behind, ``[B, heads, n + Q, head_dim]``.

        Arguments:
            layer: number of the layer; the layers see a block one after another.
            keys, values: of the block, ``[B, heads, Q, head_dim]``, ``heads`` key-value heads.

        Raises:
            RuntimeError: the call is out of order; nothing is changed.
            ValueError: a shape does not fit; nothing is changed.
        """
        self._check_turn(layer)
        if keys.shape != values.shape or keys.ndim != 4:
            raise ValueError(
                f'keys and values must both be [B, heads, Q, head_dim], got {list(keys.shape)} and '
                f'{list(values.shape)}'
            )
        if layer < len(self._held):
            held = self._held[layer]
            expected = (*held.keys.shape[:2], keys.shape[2], held.keys.shape[3])
            if keys.shape != expected:
                raise ValueError(
                    f'keys must be {list(expected)} as in the first block, got {list(keys.shape)}'
                )
            self._joined = keys.shape[2], *held.joined(keys, values)
        else:
            # contiguous, as if joined: the memory of a projection is in another order
            self._joined = keys.shape[2], keys.contiguous(), values.contiguous()
        return self._joined[1:]

    def append(self, layer: int, added: Sequence[int] | None = None) -> LayerCache:
        """Add the block that was joined last.

        Arguments:
            layer: its layer.
            added: for each row the tokens of the block, its last ones: the others are padding in front of a
                row that has no tokens yet. None for all; read with the first layer.

        Returns:
            All tokens of the layer, the new ones in the last columns.

        Raises:
            RuntimeError: :meth:`join` was not called for this layer just before; nothing is changed.
            ValueError: ``added`` does not fit; nothing is changed.
        """
        if self._joined is None:
            raise RuntimeError(f'append({layer}) must follow join({layer}, ...)')
        block, keys, values = self._joined
        if layer == 0:
            self._begin_block(block, keys.shape[0], added)
        device = keys.device
        given = None if min(self._added) == block else torch.tensor(self._added, device=device)
        if layer == len(self._held):
            self._held.append(self._empty(keys))
            self._counts.append([0] * keys.shape[0])
            self._whole.append(True)
        held = self._held[layer]
        held.extend(keys, values, self._positions(device), given)
        counts = self._counts[layer]
        self._counts[layer] = [count + new for count, new in zip(counts, self._added, strict=True)]
        self._joined, self._waiting = None, layer
        self.peak_tokens = max(self.peak_tokens, self.held_tokens)
        return held

    def observe(self, layer: int, queries: torch.Tensor) -> None:
        """Take in the queries of the block that :meth:`append` added, and drop what is over the budget.

        Arguments:
            layer: the layer appended to last.
            queries: ``[B, query heads, Q, head_dim]``, with their rotation; neighbouring heads share a
                key-value head.

        Raises:
            RuntimeError: :meth:`append` was not called for this layer just before; nothing is changed.
            ValueError: the queries are of another shape; nothing is changed.
        """
        if self._waiting != layer:
            raise RuntimeError(
                f'observe({layer}) must follow append({layer}), the last append was of {self._waiting}'
            )
        held = self._held[layer]
        self._check_queries(held, queries)
        self._waiting, self._turn = None, (layer + 1) % self.layers
        if self._keeps_everything:
            self._expire(layer, held)
        else:
            self._take_in(layer, held, queries.detach())
        if self.limits[layer] is not None:
            held.trim(max(self._counts[layer]))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Row ``b`` becomes what row ``rows[b]`` was (int64 ``[N]``): the beams that go on.

        Raises:
            RuntimeError: a block is under way; nothing is changed.
        """
        if self._turn or self._waiting is not None or self._joined is not None:
            raise RuntimeError('rows are selected between two blocks; this block has not passed every layer')
        chosen = rows.tolist()
        for layer in self._held:
            layer.select_rows(rows.to(layer.keys.device))
        for table in (self.seen, self.slots, self.preferences, *self._counts):
            table[:] = [table[row] for row in chosen] if table else []

    # one block

    @property
    def _keeps_everything(self) -> bool:
        return self.config.ratio == 1

    def _begin_block(self, block: int, rows: int, added: Sequence[int] | None) -> None:
        seen = self.seen or [0] * rows
        given = [block] * rows if added is None else list(added)
        fits = len(given) == rows and all(
            0 <= new <= block and (new == block or not before)
            for new, before in zip(given, seen, strict=True)
        )
        if not fits:
            raise ValueError(
                f'added must be {rows} integers in [0, {block}], less than {block} for a row without tokens '
                f'alone; got {given}'
            )
        self._begin = [not before for before in seen]
        self.preferences = [[] if begins else self.preferences[row] for row, begins in enumerate(self._begin)]
        if not self._keeps_everything:
            self.slots = [() if begins else self.slots[row] for row, begins in enumerate(self._begin)]
        self._steps = self._steps + 1 if block == 1 and min(seen) else -1
        self._block, self._added, self._placed, self._row_sizes = block, given, None, []
        self.seen = [before + new for before, new in zip(seen, given, strict=True)]

    def _empty(self, keys: torch.Tensor) -> LayerCache:
        rows, heads = keys.shape[:2]
        groups, config, selection = heads if self.config.per_head else 1, self.config, self._selection
        record = AttentionRecord(groups, config.window, selection.decay, selection.reads)
        nothing, lengths = keys[:, :, :0], torch.zeros(rows, dtype=torch.int64, device=keys.device)
        return LayerCache.of_prompt(nothing, nothing, lengths, record, config.sinks, config.step)

    def _positions(self, device: torch.device) -> torch.Tensor:
        """int64 ``[B, Q]``: positions of the block; 0 for padding."""
        if self._placed is not None and self._placed.device == device:
            return self._placed
        ends = self.seen if len(set(self.seen)) > 1 else self.seen[:1]
        last = torch.tensor(ends, device=device)[:, None]
        back = torch.arange(self._block - 1, -1, -1, device=device)
        self._placed = (last - 1 - back).clamp(min=0).expand(len(self.seen), -1)
        return self._placed

    def _take_in(self, layer: int, held: LayerCache, queries: torch.Tensor) -> None:
        if self.reads_attention and held.queries is not None:
            # a query whose own token has left under the limit sees nothing that is held
            queries = torch.cat([held.queries, queries], dim=2)[:, :, -held.columns :]
        if self._steps > 0 and self._steps % self.interval:
            held.queries = queries if self.reads_attention else None
            self._expire(layer, held)
            return
        held.queries = None
        # the same for every layer
        sizes = self._row_sizes = self._row_sizes or [self._sizes(seen) for seen in self.seen]
        self._set_always_kept(layer, held, sizes)
        # before the first layer is measured anew: preferences of one block alone can be compared
        self._share_out_again(layer, sizes)
        if self.reads_attention:
            self._read(layer, held, queries, sizes)
        else:
            self._expire(layer, held)
        self._share_out_first(layer, sizes)
        cascades = self._allocation.needs_preference and any(self._begin)
        for number in range(0 if cascades else layer, layer + 1):
            self._cut(number, sizes, again=cascades and layer + 1 < self.layers)

    def _sizes(self, seen: int) -> Sizes:
        return self.config.sizes_at(seen, [least(seen, limit) for limit in self.limits], self.interval)

    def _set_always_kept(self, layer: int, held: LayerCache, sizes: Sequence[Sizes]) -> None:
        limit = self.limits[layer]
        gone = [0 if limit is None else max(0, seen - limit) for seen in self.seen]
        device = held.keys.device
        held.record.window = _of_rows([size.window for size in sizes], device)
        held.sinks = _of_rows(
            [max(0, size.sinks - left) for size, left in zip(sizes, gone, strict=True)], device
        )

    def _read(self, layer: int, held: LayerCache, queries: torch.Tensor, sizes: Sequence[Sizes]) -> None:
        reading = self._reading(layer, held, queries)
        horizon = max(size.window for size in sizes)
        rows = self._rows_to_measure(layer, queries.shape[2], sizes)
        recent = reading.newest(horizon) if rows or 'recent' in self._selection.reads else None
        self._expire(layer, held)
        if recent is not None and rows:
            self._measure(layer, rows, held, recent, reading)
        held.read(reading, recent, self._selection, horizon)

    def _reading(self, layer: int, held: LayerCache, queries: torch.Tensor) -> QueryAttention:
        block, limit, device = queries.shape[2], self.limits[layer], queries.device
        counts = None
        if min(self.seen) < block:
            counts = torch.tensor(self.seen, device=device).clamp(max=block)
        far = limit is not None and max(self.seen) > limit + 1
        return QueryAttention(
            queries,
            at_least_float32(held.keys),
            counts,
            None if self.all_real(layer) else ~held.tokens.real,
            held.positions if far else None,
            0 if limit is None else limit + 1,
            queries.shape[3] ** -0.5 if self.scale is None else self.scale,
        )

    def _expire(self, layer: int, held: LayerCache) -> None:
        """Drop tokens that no later query sees."""
        limit = self.limits[layer]
        if limit is None or max(self.seen) <= limit:
            return
        oldest = torch.tensor([seen - limit for seen in self.seen], device=held.keys.device)
        held.expire(oldest)
        self._counts[layer] = [min(count, limit) for count in self._counts[layer]]

    def _rows_to_measure(self, layer: int, queries: int, sizes: Sequence[Sizes]) -> list[int]:
        """Rows whose preference is measured: those with a block of their window's size, whose variance means
        something, and those that have none yet."""
        if not self._measures:
            return []
        return [
            row
            for row, known in enumerate(self.preferences)
            if (self._steps < 0 and queries >= sizes[row].window)
            or layer >= len(known)
            or not any(known[layer])
        ]

    def _measure(
        self,
        layer: int,
        rows: Sequence[int],
        held: LayerCache,
        recent: torch.Tensor,
        reading: QueryAttention,
    ) -> None:
        queries, window = reading.count(recent.shape[2]), held.record.window
        if isinstance(window, torch.Tensor):
            own = window[:, 0].clamp(max=recent.shape[2])
            queries = own if queries is None else queries.minimum(own)
            recent = recent * real_columns(queries, recent.shape[2])[..., None]
        found = torch.stack(dispersion_and_shift(recent, held.tokens.evictable, queries), dim=1).tolist()
        for row in rows:
            known = self.preferences[row]
            self.preferences[row] = [*known[:layer], Preference(*found[row]), *known[layer + 1 :]]

    def _share_out_again(self, layer: int, sizes: Sequence[Sizes]) -> None:
        """Slots of the rows that had tokens before the block, once for all layers."""
        if not layer and (self._steps <= 0 or self.dynamic):
            self._share_out(False, layer, self.layers, sizes)

    def _share_out_first(self, layer: int, sizes: Sequence[Sizes]) -> None:
        """Slots of the rows that begin, of the layers that are known."""
        if not self._allocation.needs_preference:
            if not layer:
                self._share_out(True, layer, self.layers, sizes)
        elif self.cascade or layer + 1 == self.layers:
            self._share_out(True, layer, layer + 1, sizes)

    def _share_out(self, begins: bool, layer: int, known: int, sizes: Sequence[Sizes]) -> None:
        for row, size in enumerate(sizes):
            if self._begin[row] == begins:
                self.slots[row] = self._slots_of(row, layer, known, size)

    def _slots_of(self, row: int, layer: int, known: int, sizes: Sizes) -> tuple[int, ...]:
        most = [self._most(row, number, layer) for number in range(self.layers)]
        contexts, deeper, kept = most[:known], most[known:], sizes.window + sizes.sinks
        ahead = self.seen[row] + self._slack
        full = [least(ahead, limit) for limit in self.limits]
        moves = self.dynamic or self._steps < 0  # slots that stay must bound the tokens after these, too
        if moves and self._sizes(ahead).total >= sum(full):
            return tuple(contexts)
        weights = self._allocation.weights(self.layers, self.preferences[row])
        # slots that stay are for more tokens than were counted for the total
        always = sum(min(context, kept + sizes.minimum) for context in contexts)
        numbers = sizes._replace(total=max(sizes.total, always))._asdict()
        reserved = sum(min(context, kept) for context in deeper)
        return allocate(weights[:known], contexts=contexts, reserved=reserved, **numbers)

    @property
    def _slack(self) -> int:
        """Tokens that come before the next choice."""
        return 0 if self._steps < 0 else self.interval - 1

    def _most(self, row: int, number: int, layer: int) -> int:
        """Tokens that layer ``number`` can hold at the next choice, when ``layer`` has taken in the block."""
        if self._begin[row]:
            return least(self.seen[row], self.limits[number])
        if not self.dynamic and self._steps >= 0:
            return least(_UNBOUNDED, self.limits[number])
        held = self._counts[number][row] + (self._added[row] if number > layer else 0)
        return least(held + self._slack, self.limits[number])

    def _cut(self, layer: int, sizes: Sequence[Sizes], again: bool) -> None:
        """Cut a layer to its slots. Where further layers cut it ``again``, its tokens lie best first until
        the last one has: a cut drops the last columns then."""
        held, counts = self._held[layer], self._counts[layer]
        targets = [self._target(row, layer, size) for row, size in enumerate(sizes)]
        kept = [min(pair) for pair in zip(counts, targets, strict=True)]
        slots = kept[0] if len(set(kept)) == 1 else kept
        if again and kept != counts:
            if held.needed is None:
                held.rank(self._selection)
            held.truncate(max(kept))
        elif not again and held.needed is not None:
            held.settle(slots)
        elif kept != counts:
            held.shrink(slots, self._selection)
        if kept != counts:
            self._counts[layer], self._whole[layer] = kept, False

    def _target(self, row: int, layer: int, sizes: Sizes) -> int:
        slots = self.slots[row][layer : layer + 1]
        if not slots or slots[0] >= self._most(row, layer, layer):
            return self._counts[layer][row]
        return max(slots[0] - self._slack, sizes.window + sizes.sinks)

    # refused calls

    def _check_turn(self, layer: int) -> None:
        if self._joined is not None:
            raise RuntimeError(f'join({layer}) while a block waits for append; call append first')
        if self._waiting is not None:
            raise RuntimeError(
                f'join({layer}) while the queries of layer {self._waiting} are awaited; '
                f'call observe({self._waiting}, ...) first'
            )
        if layer != self._turn:
            raise RuntimeError(
                f'layers see a block one after another: expected layer {self._turn}, got layer {layer}'
            )

    def _check_queries(self, held: LayerCache, queries: torch.Tensor) -> None:
        rows, heads, _, head_dim = held.keys.shape
        shape = tuple(queries.shape)
        if len(shape) != 4 or (shape[0], *shape[2:]) != (rows, self._block, head_dim) or shape[1] % heads:
            raise ValueError(
                f'queries must be [{rows}, a multiple of {heads}, {self._block}, {head_dim}], '
                f'got {list(shape)}'
            )


_UNBOUNDED = 2**40
"""More tokens than a layer will hold."""


def least(tokens: int, limit: int | None) -> int:
    """``tokens``, or ``limit`` where that is less."""
    return tokens if limit is None else min(tokens, limit)


def _of_rows(numbers: Sequence[int], device: torch.device) -> int | torch.Tensor:
    """One number where all rows have the same, else int64 ``[B, 1, 1]``."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return torch.tensor(numbers, device=device)[:, None, None]
