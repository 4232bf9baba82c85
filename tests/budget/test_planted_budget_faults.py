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
from lzero_kv.budget.attention import AttentionRecord
from lzero_kv.budget.cascade import BudgetedCache
from lzero_kv.budget.config import BudgetConfig, Sizes
from lzero_kv.budget.layer import LayerCache
from lzero_kv.budget.selection import HACE, Kept
from lzero_kv.budget.tokens import Tokens

from . import reference
from .driving import Case, compare
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


def ratio_in_binary(patch: Patch) -> None:
    patch.setattr(config, '_exact', Fraction)


# --- preference ---


def dispersion_over_the_window_too(patch: Patch) -> None:
    original = attention.dispersion_and_shift
    patch.setattr(
        attention, 'dispersion_and_shift',
        lambda probabilities, evictable: original(probabilities, torch.ones_like(evictable))
    )  # fmt: skip


def variance_of_the_population(patch: Patch) -> None:
    def moments(probabilities: torch.Tensor, queries: torch.Tensor) -> Any:
        mean, variance = original(probabilities, queries)
        count = queries[..., None].to(probabilities.dtype)
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


def budgets_of_short_prompts_never_updated(patch: Patch) -> None:
    original = BudgetedCache._share_out

    def share_out(self: BudgetedCache) -> None:
        if not self.slots or len(self.slots) < self.layers:
            original(self)

    patch.setattr(BudgetedCache, '_share_out', share_out)


def weights_leak_into_the_next_cache(patch: Patch) -> None:
    shared: list[Any] = []
    original = BudgetedCache.__init__

    def init(self: BudgetedCache, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self._preferences = shared

    patch.setattr(BudgetedCache, '__init__', init)


FAULTS: list[Callable[[Patch], None]] = [
    largest_remainder,
    caps_exceeded,
    minimum_ignored,
    window_and_sinks_paid_twice,
    ratio_rounded_to_nothing,
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
    positions_forgotten,
    rows_put_without_their_record,
    rows_selected_without_their_record,
    columns_padded_without_the_record,
    absent_tokens_counted,
    attention_before_the_newest_token_counts_it,
    scored_anew_while_shrinking,
    budgets_of_short_prompts_never_updated,
    weights_leak_into_the_next_cache,
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

    def of(blocks: tuple[int, ...] = (1, 1, 2), lengths: tuple[int, ...] = (17, 17, 10), **given: Any) -> Any:
        full = config_of(dict(tokens=9, window=4, sinks=2), given)
        return lambda: compare(Case(full, lengths=lengths), blocks)

    return [
        check_rounding,
        check_ratio,
        check_layer,
        of(selection='hace', mix=0.4, kernel=3),
        of(selection='cake', step=2, lengths=(17, 13, 5)),
        of(allocation='adaptive', selection='snapkv', blocks=(2, 3), lengths=(7, 6)),
        of(selection='cake', gamma=11.0, kernel=1),
        of(selection='hace', strategy='time_decay', rho=0.2, blocks=(1, 1, 1, 1, 1)),
        # most scores are below the threshold, which makes them equal
        of(selection='hace', strategy='attention', theta=0.8),
    ]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_finds(fault, monkeypatch):
    fault(monkeypatch)
    for check in checks():
        try:
            check()
        except (AssertionError, pytest.fail.Exception, ValueError, IndexError, RuntimeError, AttributeError):
            return
    pytest.fail(f'{fault.__name__} was not found')


def test_the_comparison_finds_nothing_without_a_fault():
    for check in checks():
        check()
