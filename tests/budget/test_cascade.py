"""A cache under a budget: against the slow one, against a full cache with masks, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lzero_kv.budget import BudgetConfig, BudgetedCache, attend

from .driving import Case, Driver, compare, driver_of
from .methods import ALLOCATION_VARIANTS, SELECTION_VARIANTS, config_of, label
from .small_model import FullCacheWithMasks, SmallModel

SIZES: dict[str, Any] = dict(tokens=9, window=4, sinks=2)
every_allocation = pytest.mark.parametrize('allocation', ALLOCATION_VARIANTS, ids=label)
every_selection = pytest.mark.parametrize('selection', SELECTION_VARIANTS, ids=label)


# --- the plain reference ---


@every_selection
@pytest.mark.parametrize('per_head', [True, False])
def test_every_selection_agrees_with_the_slow_cache(selection, per_head):
    config = config_of(dict(allocation='attention_based'), selection, **SIZES, per_head=per_head)
    compare(Case(config))


@every_selection
def test_every_selection_agrees_in_whole_steps(selection):
    config = config_of(dict(allocation='adaptive'), selection, **SIZES, step=2)
    compare(Case(config, lengths=(17, 16, 9)))


@every_allocation
def test_every_allocation_agrees_with_the_slow_cache(allocation):
    compare(Case(config_of(allocation, dict(selection='hace'), **SIZES)))


@settings(max_examples=25, deadline=None, phases=(Phase.generate,))
@given(data=st.data())
def test_random_cases_agree_with_the_slow_cache(data):
    step = data.draw(st.sampled_from([1, 1, 2, 3]))
    window, sinks = step * data.draw(st.integers(1, 3)), step * data.draw(st.integers(0, 2))
    config = config_of(
        data.draw(st.sampled_from(ALLOCATION_VARIANTS)),
        data.draw(st.sampled_from(SELECTION_VARIANTS)),
        window=max(window, 2 * step),
        sinks=sinks,
        step=step,
        minimum=data.draw(st.integers(0, 2)),
        tokens=max(window, 2 * step) + sinks + data.draw(st.integers(2, 9)),
        per_head=data.draw(st.booleans()),
    )
    lengths = (data.draw(st.integers(5, 29)), data.draw(st.integers(1, 29)))
    case = Case(config, layers=3, lengths=lengths, decoded=9, seed=data.draw(st.integers(0, 99)))
    compare(case, tuple(data.draw(st.lists(st.integers(1, 3), max_size=3))))


# --- a full cache with masks ---


@every_selection
@pytest.mark.parametrize('step', [1, 2])
def test_attention_over_ragged_layers_is_attention_with_masks_over_a_full_cache(selection, step):
    torch.manual_seed(3)
    model = SmallModel(layers=3, heads=4, kv_heads=2, head_dim=5).double()
    config = config_of(dict(allocation='attention_based'), selection, **SIZES, step=step)
    lengths = torch.tensor([19, 19, 13])
    tokens = torch.randn(3, 19 + 6, model.width, dtype=torch.float64)
    cache = BudgetedCache(config, model.layers, 19)
    full = FullCacheWithMasks(model)
    for start, end in ((0, 19), (19, 20), (20, 22), (22, 25)):
        block = tokens[:, start:end]
        got = model.forward(block, cache, lengths if start == 0 else None)
        expected = full.forward(block, lengths if start == 0 else None)
        torch.testing.assert_close(got[:2], expected[:2], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got[2, -1], expected[2, -1], rtol=1e-9, atol=1e-9)
        full.hide_what_is_gone(cache)
    assert max(cache[layer].columns for layer in range(3)) < 25


@every_selection
def test_a_budget_of_the_whole_context_changes_no_bit(selection):
    for allocation in ALLOCATION_VARIANTS:
        check_that_no_bit_changes(config_of(allocation, selection, ratio=1.0, window=4, sinks=2))


def check_that_no_bit_changes(config: BudgetConfig) -> None:
    torch.manual_seed(4)
    model = SmallModel(layers=3, heads=4, kv_heads=2, head_dim=5)
    lengths = torch.tensor([17, 11])
    tokens = torch.randn(2, 17, model.width)
    cache = BudgetedCache(config, model.layers, 17, cascade=config.allocator().cascades)
    full = FullCacheWithMasks(model)
    assert torch.equal(model.forward(tokens, cache, lengths), full.forward(tokens, lengths))
    for layer in range(3):
        assert torch.equal(cache[layer].keys, full.caches[layer].keys)
        assert torch.equal(cache[layer].lengths[:, 0], lengths)
    assert cache.slots == (17, 17, 17)


def test_attend_is_attention():
    torch.manual_seed(5)
    driver = Driver(Case(config_of(dict(selection='streaming', allocation='uniform'), **SIZES), layers=1))
    driver.cache.append(0, *(torch.randn(3, 2, 17, 3, dtype=torch.float64) for _ in range(2)))
    kv = driver.cache[0]
    queries = torch.randn(3, 6, 17, 3, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries, kv.keys.repeat_interleave(3, 1), kv.values.repeat_interleave(3, 1), is_causal=True
    )
    output, probabilities = attend(queries, kv)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 6, 17, dtype=torch.float64))


# --- invariants ---


def pairs(cascading: bool = False) -> list[Any]:
    """Each allocation with one of the selections and each selection with one of the allocations."""
    allocations = [item for item in ALLOCATION_VARIANTS if not cascading or item.get('alpha', 1) == 1]
    count = max(len(allocations), len(SELECTION_VARIANTS))
    both = [
        (allocations[number % len(allocations)], SELECTION_VARIANTS[number % len(SELECTION_VARIANTS)])
        for number in range(count)
    ]
    return [pytest.param(*pair, id=f'{label(pair[0])}-{label(pair[1])}') for pair in both]


@pytest.mark.parametrize(('allocation', 'selection'), pairs())
def test_window_and_sinks_stay_and_positions_increase(allocation, selection):
    case = Case(config_of(allocation, selection, **SIZES), layers=5, decoded=3)
    driver = driver_of(case)
    driver.prompt()
    for number in range(4):
        if number:
            driver.block()
        for layer in driver.kept():
            for row, length in zip(layer, case.lengths, strict=True):
                for positions in row:
                    seen = length + number
                    assert positions == sorted(set(positions))
                    assert positions[:2] == [0, 1]
                    assert positions[-4:] == list(range(seen - 4, seen))


@every_allocation
def test_no_more_is_held_than_the_total_and_one_full_layer(allocation):
    case = Case(config_of(allocation, dict(selection='cake'), **SIZES), layers=5)
    driver = driver_of(case)
    driver.prompt()
    total = 5 * SIZES['tokens']
    assert driver.cache.held_tokens == sum(driver.cache.slots) == total
    if driver.cache.cascade:
        assert total < driver.cache.peak_tokens <= total + case.columns
        for before, after in zip(driver.slots_seen, driver.slots_seen[1:], strict=False):
            assert all(new <= old for old, new in zip(before, after, strict=False))
    else:
        assert driver.cache.peak_tokens == 5 * case.columns
    for _ in range(case.decoded):
        driver.block()
        assert driver.cache.held_tokens <= total
    # 3 rows with 2 heads: keys and values of 3 numbers, a position, 4 queries of 3 query heads, 8 bytes each;
    # for each of 5 layers a length and a count of queries
    assert driver.cache.bytes == 8 * 3 * 2 * ((2 * 3 + 1 + 4 * 3) * driver.cache.held_tokens + 5 * 2)


@pytest.mark.parametrize(('allocation', 'selection'), pairs(cascading=True))
def test_the_cascade_keeps_what_shrinking_once_at_the_end_keeps(allocation, selection):
    case = Case(config_of(allocation, selection, **SIZES))
    cascade, flat = Driver(case, cascade=True), Driver(case, cascade=False)
    for driver in (cascade, flat):
        driver.prompt()
    assert cascade.kept() == flat.kept()
    assert cascade.cache.slots == flat.cache.slots
    assert cascade.cache.peak_tokens < flat.cache.peak_tokens == 4 * case.columns


def test_a_prompt_within_the_budget_grows_into_it():
    case = Case(config_of(dict(allocation='adaptive'), tokens=13, window=4), lengths=(7, 6, 5), decoded=20)
    driver = Driver(case)
    driver.prompt()
    for number in range(20):
        assert driver.cache.held_tokens == min(4 * (7 + number), 4 * 13)
        driver.block()
    # 36 evictable slots by 4 : 3 : 2 : 1
    assert driver.cache.slots == (4 + 14, 4 + 11, 4 + 7, 4 + 4)


def test_the_last_queries_of_a_prompt_suffice_where_nothing_is_accumulated():
    config = config_of(dict(selection='cake'), **SIZES)
    whole, window = Driver(Case(config)), Driver(Case(config))
    attention = window.attention
    window.attention = lambda layer, kv, block: attention(layer, kv, block)[:, :, -4:]
    for driver in (whole, window):
        driver.prompt()
        driver.block()
    assert whole.kept() == window.kept()
    accumulating = Driver(Case(config_of(dict(selection='h2o'), **SIZES)))
    full = accumulating.attention
    accumulating.attention = lambda layer, kv, block: full(layer, kv, block)[:, :, -4:]
    with pytest.raises(ValueError, match='at least the last 17 queries of the block of 17, got 4'):
        accumulating.prompt()


def test_nothing_leaks_into_the_next_cache():
    case = Case(config_of(dict(selection='hace'), **SIZES))
    first, second = Driver(case), Driver(case)
    first.prompt()
    first.block()
    second.prompt()
    again = Driver(case)
    again.prompt()
    assert second.kept() == again.kept()
    assert second.cache.slots == again.cache.slots


def test_attention_is_not_asked_for_where_nothing_reads_it():
    cheap = config_of(dict(allocation='pyramid', selection='streaming'), **SIZES)
    assert not BudgetedCache(cheap, 3, 29).reads_attention
    for variant in (dict(allocation='attention_based'), dict(allocation='uniform', selection='h2o')):
        config = config_of(dict(selection='streaming') | variant, **SIZES)
        assert BudgetedCache(config, 3, 29).reads_attention


# --- refused calls ---


def refused(driver: Driver, error: type[Exception], text: str, call: Any) -> None:
    """The call is refused, and the cache goes on as if nothing had been asked."""
    before = (driver.kept(), driver.cache.slots, driver.cache.peak_tokens, driver.cache.bytes)
    with pytest.raises(error, match=text):
        call()
    assert (driver.kept(), driver.cache.slots, driver.cache.peak_tokens, driver.cache.bytes) == before


def test_calls_out_of_order_and_wrong_shapes_are_refused():
    driver = Driver(Case(config_of(dict(selection='h2o'), **SIZES)))
    driver.prompt()
    cache, block = driver.cache, torch.zeros(3, 2, 1, 3, dtype=torch.float64)
    refused(
        driver, RuntimeError, r'expected append\(0\), got append\(1\)', lambda: cache.append(1, block, block)
    )
    refused(driver, RuntimeError, r'observe\(0\) must follow append\(0\)', lambda: cache.observe(0, block))
    refused(driver, ValueError, 'must both be', lambda: cache.append(0, block, block[:, :1]))
    refused(driver, ValueError, r'\[3, 2, 1, 3\] as in the first block, got \[3, 1, 1, 3\]',
            lambda: cache.append(0, block[:, :1], block[:, :1]))  # fmt: skip
    refused(driver, ValueError, 'leave lengths out',
            lambda: cache.append(0, block, block, torch.ones(3, dtype=torch.int64)))  # fmt: skip
    cache.append(0, block, block)
    columns = cache[0].columns
    refused(driver, RuntimeError, r'call observe\(0, ...\) first', lambda: cache.append(1, block, block))
    refused(driver, ValueError, 'got None; allocation=', lambda: cache.observe(0))
    refused(
        driver,
        ValueError,
        'at least the last 1 queries of the block of 1, got 2',
        lambda: cache.observe(0, torch.zeros(3, 6, 2, columns)),
    )
    refused(driver, ValueError, rf'attention must be \[3, a multiple of 2, Q, {columns}\]',
            lambda: cache.observe(0, torch.zeros(3, 6, 1, columns - 1)))  # fmt: skip
    cache.observe(0, driver.attention(0, cache[0], 1))


@pytest.mark.parametrize('lengths', [[17, 17], [0, 5, 7], [18, 5, 7]])
def test_impossible_lengths_are_refused(lengths):
    cache = Driver(Case(config_of(**SIZES))).cache
    block = torch.zeros(3, 2, 17, 3)
    with pytest.raises(ValueError, match=r'lengths must be 3 integers in \[1, 17\]'):
        cache.append(0, block, block, torch.tensor(lengths))
    cache.append(0, block, block, torch.tensor([17, 1, 7]))


def test_a_mix_with_uniform_refuses_to_cascade():
    config = config_of(dict(alpha=0.5), **SIZES)
    with pytest.raises(ValueError, match=r'write alpha=1.0, or cascade=False'):
        BudgetedCache(config, 3, 29)
    assert BudgetedCache(config, 3, 29, cascade=False).slots == ()


def test_a_budget_that_does_not_hold_the_window_is_refused():
    with pytest.raises(
        ValueError, match=r'need 99 slots, the budget for 61 tokens has 46; write ratio=0.541'
    ):
        BudgetedCache(config_of(ratio=0.25), 3, 61)
