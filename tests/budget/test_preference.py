"""Dispersion and shift of attention, their average, and budgets that follow them between searches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lzero_kv.budget import (
    BudgetTracker,
    Preference,
    Tokens,
    dispersion_and_shift,
    layer_preference,
)
from lzero_kv.budget.attention import QueryAttention

from . import reference
from .methods import config_of


def attention_of(seed: int, lengths: torch.Tensor, heads: int, queries: int, columns: int) -> torch.Tensor:
    """Causal probabilities ``[B, heads, queries, columns]``; NaN wherever a row has padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), heads, columns, columns)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    column = torch.arange(columns)
    real = column >= columns - lengths[:, None]
    logits = logits.masked_fill(~(real[:, None, None] & (column <= column[:, None])), -torch.inf)
    probabilities = logits.softmax(-1)
    padding = ~(real[:, None, None] & real[:, None, :, None])
    return probabilities.masked_fill(padding, torch.nan)[:, :, -queries:]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    window=st.integers(1, 6),
    sinks=st.integers(0, 3),
)
def test_dispersion_and_shift_agree_with_the_reference(seed, lengths, window, sinks):
    attention = attention_of(seed, torch.tensor(lengths), 5, 7, 17)
    got = layer_preference(attention, torch.tensor(lengths), window=window, sinks=sinks)
    measured = []
    for row, length in enumerate(lengths):
        keys = reference.may_go(range(length), window, sinks)
        heads = [head[-window:, 17 - length :].tolist() for head in attention[row]]
        if keys:
            measured.append((reference.dispersion(heads, keys), reference.shift(heads, keys)))
    expected = [sum(column) / len(measured) for column in zip(*measured, strict=True)] or [0.0, 0.0]
    assert got == pytest.approx(tuple(expected), rel=1e-12, abs=1e-15)


def test_known_values():
    attention = torch.zeros(1, 2, 3, 9)
    attention[..., 2:6] = 0.25
    evictable = torch.ones(1, 1, 9, dtype=torch.bool)
    # 2 heads and 3 queries, each ln 4
    dispersion, shift = dispersion_and_shift(attention, evictable)
    assert dispersion.tolist() == pytest.approx([6 * math.log(4)])
    assert shift == 0
    attention[0, 1, 0, 2] = 0.85
    # values .85 .25 .25: mean .45, squares .16 + .04 + .04, divided by 2
    assert dispersion_and_shift(attention, evictable)[1].tolist() == pytest.approx([0.12])
    evictable[0, 0, 2] = False
    assert dispersion_and_shift(attention, evictable)[1] == 0


def test_a_row_alone_and_in_a_padded_batch_is_the_same():
    lengths = torch.tensor([13, 8])
    both = attention_of(1, lengths, 5, 7, 13)
    alone = [
        layer_preference(both[row : row + 1, :, :, 13 - length :], lengths[row : row + 1], window=4)
        for row, length in enumerate(lengths.tolist())
    ]
    together = layer_preference(both, lengths, window=4)
    assert together == pytest.approx(tuple(sum(column) / 2 for column in zip(*alone, strict=True)))


def test_half_precision_is_added_up_in_float32():
    attention = attention_of(2, torch.tensor([17]), 5, 7, 17)
    exact = layer_preference(attention, torch.tensor([17]), window=4)
    half = layer_preference(attention.bfloat16(), torch.tensor([17]), window=4)
    # 8 bits of mantissa in each probability, errors of both signs
    assert half == pytest.approx(exact, rel=2**-8)


def test_columns_of_a_prompt():
    tokens = Tokens.of_prompt(torch.tensor([[7], [3]]), 7, window=2, sinks=1)
    assert tokens.positions[:, 0].tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1, 2]]
    assert tokens.real[:, 0].tolist() == [[True] * 7, [False] * 4 + [True] * 3]
    assert tokens.evictable[:, 0].nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]


def test_columns_in_steps():
    positions = torch.tensor([[[4, 5, 8, 9, 12, 13, 14]]])
    tokens = Tokens(positions, torch.tensor([[6]]), window=4, sinks=2, step=2)
    assert tokens.step_numbers[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    # column 0 is padding; the step of 14 is not complete and counts as one of the window's two
    assert tokens.evictable[0, 0].tolist() == [False, False, True, True, False, False, False]


# --- between searches ---

FAR = [Preference(9.0, 1.0), Preference(2.0, 1.0), Preference(1.0, 1.0)]


def tracker_of(**changes: Any) -> BudgetTracker:
    moving = {name: changes.pop(name, value) for name, value in dict(smoothing=0.5, hysteresis=0.1).items()}
    config = config_of(dict(allocation='attention_based'), tokens=20, window=4, sinks=2, **changes)
    return BudgetTracker(config, 3, 41, **moving)


def test_budgets_change_only_between_searches():
    tracker = tracker_of()
    assert tracker.slots == (20, 20, 20)
    assert not tracker.advance()
    tracker.observe(FAR)
    assert tracker.slots == (20, 20, 20)
    assert tracker.advance()
    # 42 evictable slots by 9 : 2 : 1, at most 35 in a layer
    assert tracker.slots == (6 + 31, 6 + 7, 6 + 4)
    assert not tracker.advance()
    assert tracker.slots == (37, 13, 10)


def test_small_moves_leave_budgets_alone_until_they_add_up():
    tracker = tracker_of(smoothing=0.0)
    shares = [6.0, 3.0, 3.0]
    tracker.observe([Preference(share, 1.0) for share in (4.0, 4.0, 4.0)])
    assert not tracker.advance()
    moved = []
    for part in range(1, 9):
        # from 4 : 4 : 4 of 12 towards 6 : 3 : 3; the weights move by 1/48 each time
        tracker.observe([Preference(4 + (share - 4) * part / 8, 1.0) for share in shares])
        moved.append(tracker.advance())
    # more than a tenth of the weights has moved after five forty-eighths
    assert moved == [False] * 4 + [True] + [False] * 3


def test_averages_are_exponential_and_what_the_weights_are_taken_from():
    tracker = tracker_of(smoothing=0.75)
    assert tracker.preferences == ()
    tracker.observe([Preference(4.0, 1.0)] * 3)
    assert tracker.preferences == ((4.0, 1.0),) * 3
    tracker.observe([Preference(8.0, 1.0), Preference(0.0, 1.0), Preference(4.0, 5.0)])
    assert tracker.preferences == ((5.0, 1.0), (3.0, 1.0), (4.0, 2.0))
    with pytest.raises(ValueError, match='a preference for each of 3 layers, got 2'):
        tracker.observe([Preference(1.0, 1.0)] * 2)
    assert tracker.preferences == ((5.0, 1.0), (3.0, 1.0), (4.0, 2.0))
    tracker.advance()
    # 42 by 5 : 3 : 8
    assert tracker.slots == (6 + 13, 6 + 8, 6 + 21)


@pytest.mark.parametrize('allocation', ['uniform', 'adaptive', 'pyramid'])
def test_fixed_weights_never_move(allocation):
    config = config_of(dict(allocation=allocation), tokens=20, window=4, sinks=2)
    tracker = BudgetTracker(config, 3, 41, smoothing=0.0, hysteresis=0.0)
    before = tracker.slots
    assert sum(before) == 60
    assert not tracker.needs_preference
    tracker.observe(FAR)
    assert not tracker.advance()
    assert tracker.slots == before


def test_a_mix_with_uniform_is_allowed_where_all_layers_are_known():
    tracker = tracker_of(alpha=0.25, hysteresis=0.0)
    tracker.observe(FAR)
    assert tracker.advance()
    # 42 by .4375, .2917, .2708: 18.4, 12.3 and 11.4; the missing slot goes where 1/2 is nearest in proportion
    assert tracker.slots == (6 + 19, 6 + 12, 6 + 11)


@pytest.mark.parametrize('inference', [False, True])
def test_the_gradient_of_the_values_is_the_accumulated_attention(inference):
    """What a GPU's kernel sums up, on a CPU: 70 queries of 6 heads, 3 key-value heads, several pieces."""
    generator = torch.Generator().manual_seed(2)
    with torch.inference_mode(inference):
        queries, keys = (
            torch.randn(2, heads, 70, 5, generator=generator, dtype=torch.float64) for heads in (6, 3)
        )
        reading = QueryAttention(queries, keys, None, None, None, 0, scale=0.7)
        for decay in (1.0, 0.97):
            expected = reading.accumulated(3, decay, None)
            for found in (
                reading.summed(decay),
                reading.accumulated(3, decay, None, reading.newest(13)),
                reading.accumulated(3, decay, None, reading.newest(99)),
            ):
                assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    probabilities = reading.newest(70).view(2, 3, 2, 70, 70)
    weights = 0.97 ** torch.arange(69, -1, -1, dtype=torch.float64)
    assert torch.allclose((weights[:, None] * probabilities).sum(3).mean(2), expected, rtol=0, atol=1e-12)
