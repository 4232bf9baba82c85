"""Faults that layer budgets may have, planted one at a time: the comparison with the references must find
each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from lzero_kv.budget import allocation, attention, cascade, config, selection, tokens
from lzero_kv.budget import layer as layer_module
from lzero_kv.budget.attention import AttentionRecord, QueryAttention
from lzero_kv.budget.cascade import BudgetedCache
from lzero_kv.budget.config import BudgetConfig, Sizes
from lzero_kv.budget.layer import LayerCache
from lzero_kv.budget.selection import HACE, Kept
from lzero_kv.budget.tokens import Tokens

from . import reference
from .driving import HEAD_DIM, Case, compare
from .layer_driving import check_layer
from .methods import config_of

Patch = pytest.MonkeyPatch


# --- rounding ---


def rounded_by_largest_remainder(weights: Any, total: int, caps: Any, minimum: int = 0) -> tuple[int, ...]:
    """Hamilton's rule, with what is over the caps handed on."""
    slots, left = [0] * len(caps), min(total, sum(caps))
    while left:
        free = [layer for layer, cap in enumerate(caps) if slots[layer] < cap]
        whole = sum(Fraction(weights[layer]) for layer in free)
        quotas = {layer: left * Fraction(weights[layer]) / whole for layer in free}
        shares = {layer: int(quota) for layer, quota in quotas.items()}
        for layer in sorted(free, key=lambda item: quotas[item] - shares[item], reverse=True):
            shares[layer] += 1 if sum(shares.values()) < left else 0
        for layer, share in shares.items():
            slots[layer] = min(caps[layer], slots[layer] + share)
        left = min(total, sum(caps)) - sum(slots)
    return tuple(slots)


def largest_remainder(patch: Patch) -> None:
    patch.setattr(allocation, 'apportion', rounded_by_largest_remainder)


def caps_exceeded(patch: Patch) -> None:
    original = allocation.apportion
    patch.setattr(
        allocation, 'apportion', lambda weights, total, caps, least=0: original(
            weights, total, [cap + 3 for cap in caps], least)
    )  # fmt: skip


def minimum_ignored(patch: Patch) -> None:
    original = allocation.apportion
    patch.setattr(
        allocation, 'apportion', lambda weights, total, caps, least=0: original(weights, total, caps)
    )


def window_and_sinks_paid_twice(patch: Patch) -> None:
    original = allocation.allocate
    patch.setattr(
        cascade, 'allocate', lambda weights, total, contexts, *, window, sinks, **rest: original(
            weights, total - window - sinks, contexts, window=window, sinks=sinks, **rest)
    )  # fmt: skip


def ratio_rounded_to_nothing(patch: Patch) -> None:
    def sizes(self: BudgetConfig, layers: int, context: int) -> Sizes:
        return Sizes(int(self.ratio * context) * layers if self.ratio else self.tokens * layers,
                     self.window, self.sinks, self.minimum, self.step)  # fmt: skip

    patch.setattr(BudgetConfig, 'sizes', sizes)


def ratio_rounded_down_in_every_layer(patch: Patch) -> None:
    original = BudgetConfig._sizes

    def sizes(self: BudgetConfig, seen: int, contexts: Any, minimum: int | None = None) -> Any:
        found, needed = original(self, seen, contexts, minimum)
        total = sum(int(self.ratio * context) for context in contexts) if self.ratio else found.total
        return found._replace(total=total), needed

    patch.setattr(BudgetConfig, '_sizes', sizes)


def ratio_in_binary(patch: Patch) -> None:
    patch.setattr(config, '_exact', Fraction)


# --- preference ---


def dispersion_over_the_window_too(patch: Patch) -> None:
    original = attention.dispersion_and_shift
    for module in (attention, cascade):
        patch.setattr(
            module, 'dispersion_and_shift',
            lambda probabilities, evictable, *rest: original(probabilities, torch.ones_like(evictable), *rest)
        )  # fmt: skip


def variance_of_the_population(patch: Patch) -> None:
    def moments(probabilities: torch.Tensor, queries: torch.Tensor | None) -> Any:
        mean, variance = original(probabilities, queries)
        count = probabilities.shape[2] if queries is None else queries[..., None].to(probabilities.dtype)
        return mean, variance * (count - 1) / count

    original = attention.query_moments
    patch.setattr(attention, 'query_moments', moments)


# --- scores ---


def pooled_in_the_order_of_scores(patch: Patch) -> None:
    def indicator(known: AttentionRecord, held: Tokens, gamma: float, kernel: int) -> torch.Tensor:
        mean, variance = known.moments()
        value = torch.where(held.evictable, mean + gamma * variance, 0.0)
        order = value.argsort(-1, descending=True)
        pooled = torch.nn.functional.avg_pool1d(value.gather(-1, order), kernel, 1, kernel // 2)
        return torch.empty_like(value).scatter_(-1, order, pooled)

    patch.setattr(selection, 'indicator', indicator)


def pooled_over_sinks_and_window(patch: Patch) -> None:
    def indicator(known: AttentionRecord, held: Tokens, gamma: float, kernel: int) -> torch.Tensor:
        mean, variance = known.moments()
        return torch.nn.functional.avg_pool1d(mean + gamma * variance, kernel, 1, kernel // 2)

    patch.setattr(selection, 'indicator', indicator)


def padding_attended(patch: Patch) -> None:
    patch.setattr(
        attention, 'real_columns',
        lambda lengths, columns: torch.ones(*lengths.shape, columns, dtype=torch.bool)
    )  # fmt: skip


def heads_grouped_across(patch: Patch) -> None:
    patch.setattr(
        attention, 'mean_of_groups', lambda values, groups: values.unflatten(1, (-1, groups)).mean(1)
    )


def decay_forgotten(patch: Patch) -> None:
    patch.setattr(HACE, 'decay', 1.0)


def threshold_forgotten(patch: Patch) -> None:
    original = HACE.scores

    def scores(self: HACE, known: AttentionRecord, held: Tokens) -> torch.Tensor:
        return original(dataclasses.replace(self, theta=0.0), known, held)

    patch.setattr(HACE, 'scores', scores)


def all_queries_remembered(patch: Patch) -> None:
    original = AttentionRecord.__init__
    patch.setattr(
        AttentionRecord, '__init__',
        lambda self, groups, window, *rest: original(self, groups, window + 3, *rest)
    )  # fmt: skip


def record_not_shrunk(patch: Patch) -> None:
    def keep(self: AttentionRecord, indices: torch.Tensor) -> None:
        for name in ('accumulated', 'recent'):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[..., -indices.shape[2] :])

    patch.setattr(AttentionRecord, 'keep', keep)


# --- choice ---


def indices_unsorted(patch: Patch) -> None:
    original = selection.select

    def select(scores: torch.Tensor, held: Tokens, slots: int) -> Kept:
        kept = original(scores, held, slots)
        order = scores.gather(-1, kept.indices).argsort(-1, descending=True)
        return Kept(kept.indices.gather(-1, order), kept.lengths)

    patch.setattr(layer_module, 'select', select)


def ties_to_the_earlier(patch: Patch) -> None:
    original = selection.select

    def select(scores: torch.Tensor, held: Tokens, slots: int) -> Kept:
        return original(scores - 1e-9 * held.positions, held, slots)

    patch.setattr(layer_module, 'select', select)


def window_evicted(patch: Patch) -> None:
    evictable = property(lambda self: self.real & (self.step_numbers >= self.sinks // self.step))
    patch.setattr(Tokens, 'evictable', evictable)


def sinks_evicted(patch: Patch) -> None:
    def evictable(self: Tokens) -> torch.Tensor:
        numbers = self.step_numbers
        return self.real & (numbers <= numbers[..., -1:] - self.window // self.step)

    patch.setattr(Tokens, 'evictable', property(evictable))


def steps_cut_in_half(patch: Patch) -> None:
    patch.setattr(Tokens, 'max_of_steps', lambda self, values: values)


def steps_counted_by_column(patch: Patch) -> None:
    original = Tokens.step_numbers.func

    def numbers(self: Tokens) -> torch.Tensor:
        column = torch.arange(self.positions.shape[-1]).expand_as(self.positions)
        return original(Tokens(column, self.lengths, self.window, self.sinks, self.step))

    patch.setattr(Tokens, 'step_numbers', property(numbers))


# --- the cache ---


def values_left_behind(patch: Patch) -> None:
    original = LayerCache.keep

    def keep(self: LayerCache, kept: Kept) -> None:
        values = self.values
        original(self, kept)
        self.values = values[:, :, : self.columns]

    patch.setattr(LayerCache, 'keep', keep)


def tokens_renumbered(patch: Patch) -> None:
    original = LayerCache.keep

    def keep(self: LayerCache, kept: Kept) -> None:
        original(self, kept)
        self.positions = Tokens.of_prompt(self.lengths, self.columns, window=1).positions

    patch.setattr(LayerCache, 'keep', keep)


def heads_share_the_first_ones_tokens(patch: Patch) -> None:
    original = tokens.gather_tokens
    patch.setattr(
        layer_module, 'gather_tokens',
        lambda values, indices: original(values, indices[:, :1].expand_as(indices).contiguous())
    )  # fmt: skip


def scored_anew_while_shrinking(patch: Patch) -> None:
    original = LayerCache.choose

    def choose(self: LayerCache, slots: int, chosen_by: selection.Selection) -> Kept:
        self.scores = None
        return original(self, slots, chosen_by)

    patch.setattr(LayerCache, 'choose', choose)


def positions_forgotten(patch: Patch) -> None:
    original = LayerCache.keep

    def keep(self: LayerCache, kept: Kept) -> None:
        positions = self.positions
        original(self, kept)
        self.positions = positions[..., -self.columns :]

    patch.setattr(LayerCache, 'keep', keep)


def rows_put_without_their_record(patch: Patch) -> None:
    original = LayerCache.put_rows

    def put_rows(self: LayerCache, rows: torch.Tensor, other: LayerCache) -> None:
        original(dataclasses.replace(self, record=AttentionRecord(2, 4, 1.0, ())), rows, other)

    patch.setattr(LayerCache, 'put_rows', put_rows)


def rows_selected_without_their_record(patch: Patch) -> None:
    original = LayerCache.select_rows

    def select_rows(self: LayerCache, rows: torch.Tensor) -> None:
        known, self.record = self.record, AttentionRecord(2, 4, 1.0, ())
        original(self, rows)
        self.record = known

    patch.setattr(LayerCache, 'select_rows', select_rows)


def columns_padded_without_the_record(patch: Patch) -> None:
    original = LayerCache.pad

    def pad(self: LayerCache, columns: int) -> None:
        known, self.record = self.record, AttentionRecord(2, 4, 1.0, ())
        original(self, columns)
        self.record = known

    patch.setattr(LayerCache, 'pad', pad)


def absent_tokens_counted(patch: Patch) -> None:
    original = LayerCache.append
    patch.setattr(
        LayerCache, 'append',
        lambda self, keys, values, positions=None, added=None: original(self, keys, values, positions)
    )  # fmt: skip


def attention_before_the_newest_token_counts_it(patch: Patch) -> None:
    patch.setattr(
        LayerCache, 'observe',
        lambda self, probabilities, **rest: self.record.observe(probabilities, self.lengths, **rest)
    )  # fmt: skip


# --- queries that are read ---


def scores_not_averaged(patch: Patch) -> None:
    original = LayerCache.read

    def read(self: LayerCache, *arguments: Any) -> None:
        self.scores = None
        original(self, *arguments)

    patch.setattr(LayerCache, 'read', read)


def unscored_tokens_taken_as_0(patch: Patch) -> None:
    original = LayerCache.read

    def read(self: LayerCache, *arguments: Any) -> None:
        if self.scores is not None:
            new = self.columns - self.scores.shape[2]
            self.scores = torch.nn.functional.pad(self.scores.clamp(min=0), (0, new))
        original(self, *arguments)

    patch.setattr(LayerCache, 'read', read)


def scores_averaged_over_readings_of_equal_weight(patch: Patch) -> None:
    original = LayerCache.read
    patch.setattr(
        LayerCache, 'read',
        lambda self, reading, recent, chosen_by, horizon: original(
            self, reading, recent, chosen_by, 2 * reading.queries.shape[2])
    )  # fmt: skip


def pending_queries_forgotten(patch: Patch) -> None:
    original = BudgetedCache.observe

    def observe(self: BudgetedCache, layer: int, queries: torch.Tensor) -> None:
        original(self, layer, queries)
        self[layer].queries = None

    patch.setattr(BudgetedCache, 'observe', observe)


def reading_with(patch: Patch, **changes: Any) -> None:
    original = BudgetedCache._reading
    patch.setattr(
        BudgetedCache, '_reading',
        lambda self, *arguments: dataclasses.replace(original(self, *arguments), **changes)
    )  # fmt: skip


def queries_see_beyond_their_reach(patch: Patch) -> None:
    reading_with(patch, positions=None)


def queries_of_padding_counted(patch: Patch) -> None:
    reading_with(patch, counts=None)


def padding_seen(patch: Patch) -> None:
    reading_with(patch, hidden=None)


def scale_ignored(patch: Patch) -> None:
    reading_with(patch, scale=HEAD_DIM**-0.5)


def sums_of_long_blocks_lose_a_piece(patch: Patch) -> None:
    patch.setitem(attention._PIECE, 'cpu', 5)
    original = QueryAttention._probabilities
    patch.setattr(
        QueryAttention, '_probabilities', lambda self, first, end: original(self, first, end) * (first != 5)
    )


def accumulated_before_not_decayed(patch: Patch) -> None:
    original = QueryAttention.accumulated

    def accumulated(
        self: QueryAttention, groups: int, decay: float, before: Any, recent: Any
    ) -> torch.Tensor:
        sums = original(self, groups, decay, None, recent)
        if before is not None:
            sums[..., : before.shape[2]] += before
        return sums

    patch.setattr(QueryAttention, 'accumulated', accumulated)


# --- budgets of rows ---


def limit_ignored(patch: Patch) -> None:
    original = BudgetedCache.__init__
    patch.setattr(
        BudgetedCache, '__init__',
        lambda self, *arguments, limits, **named: original(self, *arguments, **named)
    )  # fmt: skip


def expired_sinks_still_counted(patch: Patch) -> None:
    original = BudgetedCache._set_always_kept

    def set_always_kept(self: BudgetedCache, layer: int, held: LayerCache, sizes: Any) -> None:
        original(self, layer, held, sizes)
        held.sinks = sizes[0].sinks

    patch.setattr(BudgetedCache, '_set_always_kept', set_always_kept)


def half_a_step_of_sinks_given_up(patch: Patch) -> None:
    def evictable(self: Tokens) -> torch.Tensor:
        numbers = self.step_numbers
        last = numbers[..., -1:] - self.window // self.step
        return self.real & (numbers >= self.sinks // self.step) & (numbers <= last)

    patch.setattr(Tokens, 'evictable', property(evictable))


def rows_sharing_one_budget(patch: Patch) -> None:
    original = BudgetedCache._slots_of
    patch.setattr(
        BudgetedCache, '_slots_of',
        lambda self, row, layer, known, sizes: original(self, 0, layer, known, self._sizes(self.seen[0]))
    )  # fmt: skip


def rows_sharing_one_window(patch: Patch) -> None:
    original = BudgetedCache._set_always_kept
    patch.setattr(
        BudgetedCache, '_set_always_kept',
        lambda self, layer, held, sizes: original(self, layer, held, [max(sizes)] * len(sizes))
    )  # fmt: skip


def total_not_following_the_tokens_seen(patch: Patch) -> None:
    original = BudgetedCache._share_out
    patch.setattr(
        BudgetedCache, '_share_out',
        lambda self, begins, *others: original(self, begins, *others) if begins else None
    )  # fmt: skip


def preferences_of_two_blocks_mixed(patch: Patch) -> None:
    read, share_out = BudgetedCache._read, BudgetedCache._share_out

    def read_and_share(self: BudgetedCache, layer: int, held: LayerCache, queries: Any, sizes: Any) -> None:
        read(self, layer, held, queries, sizes)
        if not any(self._begin):
            share_out(self, False, layer, self.layers, sizes)

    patch.setattr(BudgetedCache, '_read', read_and_share)


def fixed_slots_without_bound(patch: Patch) -> None:
    original = BudgetedCache._slots_of

    def slots_of(self: BudgetedCache, row: int, layer: int, known: int, sizes: Sizes) -> tuple[int, ...]:
        ahead = self.seen[row] + self._slack
        if self._sizes(ahead).total >= sum(min(ahead, limit or ahead) for limit in self.limits):
            return tuple(self._most(row, number, layer) for number in range(known))
        return original(self, row, layer, known, sizes)

    patch.setattr(BudgetedCache, '_slots_of', slots_of)


def no_room_for_the_tokens_before_the_next_choice(patch: Patch) -> None:
    patch.setattr(BudgetedCache, '_slack', 0)


def rows_selected_without_their_numbers(patch: Patch) -> None:
    def select_rows(self: BudgetedCache, rows: torch.Tensor) -> None:
        for held in self._held:
            held.select_rows(rows)

    patch.setattr(BudgetedCache, 'select_rows', select_rows)


def rows_selected_without_their_waiting_queries(patch: Patch) -> None:
    original = LayerCache.select_rows

    def select_rows(self: LayerCache, rows: torch.Tensor) -> None:
        waiting, self.queries = self.queries, None
        original(self, rows)
        self.queries = waiting

    patch.setattr(LayerCache, 'select_rows', select_rows)


def tokens_of_a_short_row_counted_with_its_padding(patch: Patch) -> None:
    original = LayerCache.extend
    patch.setattr(
        LayerCache, 'extend',
        lambda self, keys, values, positions=None, added=None: original(self, keys, values, positions)
    )  # fmt: skip


def preferences_leak_into_the_next_cache(patch: Patch) -> None:
    shared: dict[int, Any] = {}
    original = BudgetedCache._begin_block

    def begin_block(self: BudgetedCache, block: int, rows: int, added: Any) -> None:
        original(self, block, rows, added)
        if any(self._begin):
            self.preferences = shared.setdefault(rows, self.preferences)

    def rows_to_measure(self: BudgetedCache, layer: int, *_: Any) -> list[int]:
        return [row for row, known in enumerate(self.preferences) if layer >= len(known)]

    patch.setattr(BudgetedCache, '_begin_block', begin_block)
    patch.setattr(BudgetedCache, '_rows_to_measure', rows_to_measure)


FAULTS: list[Callable[[Patch], None]] = [
    largest_remainder,
    caps_exceeded,
    minimum_ignored,
    window_and_sinks_paid_twice,
    ratio_rounded_to_nothing,
    ratio_rounded_down_in_every_layer,
    ratio_in_binary,
    dispersion_over_the_window_too,
    variance_of_the_population,
    pooled_in_the_order_of_scores,
    pooled_over_sinks_and_window,
    padding_attended,
    heads_grouped_across,
    decay_forgotten,
    threshold_forgotten,
    all_queries_remembered,
    record_not_shrunk,
    indices_unsorted,
    ties_to_the_earlier,
    window_evicted,
    sinks_evicted,
    steps_cut_in_half,
    steps_counted_by_column,
    values_left_behind,
    tokens_renumbered,
    heads_share_the_first_ones_tokens,
    scored_anew_while_shrinking,
    positions_forgotten,
    rows_put_without_their_record,
    rows_selected_without_their_record,
    columns_padded_without_the_record,
    absent_tokens_counted,
    attention_before_the_newest_token_counts_it,
    scores_not_averaged,
    unscored_tokens_taken_as_0,
    scores_averaged_over_readings_of_equal_weight,
    pending_queries_forgotten,
    queries_see_beyond_their_reach,
    queries_of_padding_counted,
    padding_seen,
    scale_ignored,
    sums_of_long_blocks_lose_a_piece,
    accumulated_before_not_decayed,
    limit_ignored,
    expired_sinks_still_counted,
    half_a_step_of_sinks_given_up,
    rows_sharing_one_budget,
    rows_sharing_one_window,
    total_not_following_the_tokens_seen,
    preferences_of_two_blocks_mixed,
    fixed_slots_without_bound,
    no_room_for_the_tokens_before_the_next_choice,
    rows_selected_without_their_numbers,
    rows_selected_without_their_waiting_queries,
    tokens_of_a_short_row_counted_with_its_padding,
    preferences_leak_into_the_next_cache,
]


def check_rounding() -> None:
    for total in range(0, 61, 3):
        expected = reference.apportion(
            [Fraction(7), Fraction(6), Fraction(2), Fraction(1)], total, [16] * 4, 2
        )
        slots = allocation.allocate([7, 6, 2, 1], total + 4 * 5, [21] * 4, window=3, sinks=2, minimum=2)
        assert slots == tuple(5 + count for count in expected)


def check_ratio() -> None:
    with pytest.raises(ValueError, match='need 36 slots'):
        config_of(ratio=0.1, window=6, sinks=2).sizes(4, 10)
    assert config_of(ratio=0.3, window=2).sizes(1, 10).total == 3
    halves = config_of(dict(selection='h2o'), heavy_ratio=0.29, recent_ratio=0.29).sizes(1, 100)
    assert halves.total == 58


def checks() -> list[Callable[[], Any]]:
    """Comparisons with the references, from the quick to the slow ones."""

    def of(*blocks: Any, lengths: tuple[int, ...] = (17, 17, 10), case: Any = None, **given: Any) -> Any:
        sizes = dict(tokens=9, window=4, sinks=2) if not {'ratio', 'heavy_ratio'} & set(given) else {}
        named = dict(decoded=16, lengths=lengths) | (case or {})
        return lambda: compare(Case(config_of(sizes, given), **named), blocks or (1, 1, 2))

    part: dict[str, Any] = dict(ratio=0.63, window=4, sinks=2)
    sliding: dict[str, Any] = dict(interval=3, limits=(None, 7, 12, None))
    return [
        check_rounding,
        check_ratio,
        check_layer,
        of(selection='hace', mix=0.4, kernel=3),
        of(selection='cake', step=2, lengths=(17, 13, 5)),
        of(2, 3, allocation='adaptive', selection='snapkv', lengths=(7, 6)),
        of(selection='cake', gamma=11.0, kernel=1),
        of(1, 1, 1, 1, 1, selection='hace', strategy='time_decay', rho=0.2),
        # most scores are below the threshold, which makes them equal
        of(selection='hace', strategy='attention', theta=0.8),
        of(*[1] * 5, [1, 1], 1, 1, [0, 1, 1], 4, 1, selection='hace', rho=0.7, **part, lengths=(16, 9),
           case=dict(interval=3, scale=0.9)),
        of(*[1] * 7, 5, 1, 1, selection='cake', **part, lengths=(15, 6), case=sliding),
        of(*[1] * 9, selection='cake', step=2, tokens=9, window=4, sinks=2, lengths=(11, 8),
           case=dict(interval=1, limits=(9, 10, None, 12))),
        of(*[1] * 14, selection='h2o', **part, lengths=(4,), case=dict(interval=3, dynamic=False)),
        of(5, 1, 1, 1, selection='h2o', heavy_ratio=0.15, recent_ratio=0.35, lengths=(24, 9),
           case=dict(interval=2)),
        of(24, 1, selection='cake', tokens=11, window=4, sinks=2, lengths=(3,), case=dict(decoded=40)),
        of((6, (6, 3)), 1, 5, selection='hace', **part, lengths=(11, 0), case=sliding),
    ]  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_finds(fault, monkeypatch):
    fault(monkeypatch)
    for check in checks():
        try:
            check()
        except (AssertionError, pytest.fail.Exception, ValueError, IndexError, RuntimeError):
            return
    pytest.fail(f'{fault.__name__} was not found')


def test_the_comparison_finds_nothing_without_a_fault():
    for check in checks():
        check()
