"""A cache under a budget: against the slow one, against a full cache with masks, and its invariants."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lzero_kv.budget import BudgetConfig, BudgetedCache, attend

from .driving import Case, Driver, FlatCache, alone, compare, kept_by, reference_of, with_blocks
from .methods import ALLOCATION_VARIANTS, SELECTION_VARIANTS, config_of, label
from .small_model import FullCacheWithMasks, SmallModel

SIZES: dict[str, Any] = dict(tokens=9, window=4, sinks=2)
PART: dict[str, Any] = dict(ratio=0.7, window=4, sinks=2)
LIMITS = (None, 7, 12, None)
SINGLE = (1,) * 9
every_allocation = pytest.mark.parametrize('allocation', ALLOCATION_VARIANTS, ids=label)
every_selection = pytest.mark.parametrize('selection', SELECTION_VARIANTS, ids=label)


def by_turns(*axes: list[Any]) -> list[Any]:
    """Combinations of variants with further values in which each meets half of the others; the other half are
    slow tests."""
    return [
        pytest.param(*values, id='-'.join(label(v) if isinstance(v, dict) else str(v) for v in values),
                     marks=[pytest.mark.slow] * (sum(places) % 2))
        for places, values in zip(
            itertools.product(*(range(len(axis)) for axis in axes)), itertools.product(*axes), strict=True
        )
    ]  # fmt: skip


def pairs(cascading: bool = False) -> list[Any]:
    """Each allocation with one of the selections and each selection with one of the allocations."""
    allocations = [item for item in ALLOCATION_VARIANTS if not cascading or item.get('alpha', 1) == 1]
    count = max(len(allocations), len(SELECTION_VARIANTS))
    both = [
        (allocations[number % len(allocations)], SELECTION_VARIANTS[number % len(SELECTION_VARIANTS)])
        for number in range(count)
    ]
    return [pytest.param(*pair, id=f'{label(pair[0])}-{label(pair[1])}') for pair in both]


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


@pytest.mark.parametrize(('selection', 'dynamic'), by_turns(SELECTION_VARIANTS, [True, False]))
def test_single_tokens_agree_with_the_slow_cache(selection, dynamic):
    config = config_of(dict(allocation='attention_based'), selection, **PART)
    blocks = (*SINGLE, 5, 1, 1, 1, 1)
    compare(with_blocks(Case(config, lengths=(17, 10), interval=3, dynamic=dynamic), blocks), blocks)


@pytest.mark.parametrize(('selection', 'dynamic'), by_turns(SELECTION_VARIANTS, [False, True]))
def test_sliding_layers_agree_with_the_slow_cache(selection, dynamic):
    config = config_of(dict(allocation='attention_based'), selection, **PART)
    case = Case(config, lengths=(15, 6), limits=LIMITS, interval=3, dynamic=dynamic)
    blocks = (1, 1, 1, 1, 1, 6, 1, 1, 1, 1)
    compare(with_blocks(case, blocks), blocks)


def test_limits_below_the_interval_agree_with_the_slow_cache():
    """All tokens that were scored have left before the next choice."""
    config = config_of(dict(allocation='attention_based', selection='hace', rho=0.8), **PART)
    blocks = (*SINGLE, 3, 1, 1)
    case = Case(config, lengths=(12, 5), limits=(None, 1, 2, 5), interval=6)
    compare(with_blocks(case, blocks), blocks)


@pytest.mark.parametrize(('allocation', 'interval'), by_turns(ALLOCATION_VARIANTS, [1, 2, 4, 8]))
def test_every_interval_agrees_with_the_slow_cache(allocation, interval):
    config = config_of(allocation, dict(selection='cake', kernel=3), **PART, per_head=interval > 2)
    compare(with_blocks(Case(config, lengths=(29, 19), layers=3, interval=interval), SINGLE), SINGLE)


@settings(max_examples=60, deadline=None, phases=(Phase.generate,), derandomize=True)
@given(data=st.data())
def test_random_cases_agree_with_the_slow_cache(data):
    case, blocks = drawn_case(data.draw)
    compare(with_blocks(case, [item for item in blocks if isinstance(item, int)]), blocks)


def drawn_case(draw: Callable[[Any], Any]) -> tuple[Case, list[Any]]:
    """A case and its blocks."""
    step = draw(st.sampled_from([1, 1, 2, 3]))
    window, sinks = max(step * draw(st.integers(1, 3)), 2 * step), step * draw(st.integers(0, 2))
    sizes = draw(st.sampled_from(['tokens', 'ratio']))
    much = window + sinks + draw(st.integers(3, 9)) if sizes == 'tokens' else draw(st.floats(0.1, 0.95))
    config = config_of(
        draw(st.sampled_from(ALLOCATION_VARIANTS)),
        draw(st.sampled_from(SELECTION_VARIANTS)),
        window=window,
        sinks=sinks,
        step=step,
        minimum=draw(st.integers(0, 2)),
        per_head=draw(st.booleans()),
        **{sizes: much},
    )
    case = Case(
        config,
        layers=3,
        lengths=(draw(st.integers(5, 29)), draw(st.integers(1, 29))),
        limits=draw(st.none() | st.tuples(*[st.none() | st.integers(1, 25)] * 3)),
        dynamic=draw(st.booleans()),
        interval=draw(st.integers(1, 6)),
        scale=draw(st.sampled_from([None, 0.9])),
        seed=draw(st.integers(0, 99)),
    )
    block = st.integers(1, 9) | st.just(1) | st.just(1) | st.lists(st.integers(0, 1), min_size=2, max_size=2)
    return case, draw(st.lists(block, max_size=8))


@pytest.mark.parametrize('allocation', ['attention_based', 'adaptive'])
def test_windows_that_follow_each_rows_length_agree_with_the_slow_cache(allocation):
    """With the ratios of H2O rows of a batch have windows of 8 and 3 queries."""
    config = config_of(
        dict(allocation=allocation, selection='h2o', rho=0.8), heavy_ratio=0.15, recent_ratio=0.35, sinks=1
    )
    blocks = (5, 1, 1, 1, 1, 1)
    case = with_blocks(Case(config, lengths=(24, 9), interval=2), blocks)
    compare(case, blocks)
    check_alone(case, blocks)


def test_a_row_without_tokens_joins_later():
    config = config_of(dict(selection='hace'), **PART)
    blocks = ((6, (6, 0)), (1, (1, 1)), (7, (7, 7)), (1, (1, 1)), (1, (1, 1)))
    compare(Case(config, lengths=(11, 0), decoded=20, interval=3), blocks)
    blocks = ((6, (6, 3)), *blocks[1:])
    compare(Case(config, lengths=(11, 0), decoded=20, interval=3, limits=LIMITS), blocks)


@pytest.mark.parametrize(('allocation', 'limits'), by_turns(ALLOCATION_VARIANTS, [None, LIMITS]))
def test_a_row_that_begins_in_a_later_block_is_the_row_alone(allocation, limits):
    """A prompt in chunks, padded in front by more than the first one: the row's own first block cascades."""
    config = config_of(allocation, dict(selection='hace', kernel=3), **PART)
    blocks: tuple[Any, ...] = ((21, (21, 19)), 7, 1, 1, 1, 1)
    case = Case(config, lengths=(11, 0), decoded=40, interval=3, limits=limits)
    together = compare(case, blocks)
    later = Driver(case, names=[1])
    for size in (19, 7, 1, 1, 1, 1):
        later.block(size)
    assert later.cache.slots[0] == together.cache.slots[1]
    assert later.kept() == [[layer[1]] for layer in together.kept()]
    if config.allocation == 'attention_based' and config.alpha:
        assert len({len(row[1][0]) for row in together.kept()}) > 1


def test_a_block_is_shared_out_by_preferences_of_one_block():
    """A prompt that is too short to be measured, and a long block behind it: the first layer must not take
    everything because it is measured before the others."""
    config = config_of(dict(allocation='attention_based'), tokens=11, window=4, sinks=2)
    driver = compare(Case(config, lengths=(3,), decoded=40), (24,))
    assert driver.cache.slots == [(11, 11, 11, 11)]
    driver.block()
    assert len(set(driver.cache.slots[0])) > 1


def test_selected_rows_agree_with_the_slow_cache():
    """Beams: rows go on as copies of others, between choices too."""
    config = config_of(dict(selection='hace', kernel=3), **PART)
    case = Case(config, lengths=(16, 9), interval=3, limits=LIMITS, decoded=14)
    driver = compare(case, (1, [1, 1], 1, 1, [0, 1, 1], 1, 4, [2, 0], 1, 1))
    assert driver.cache.held_tokens == sum(driver.cache[layer].columns for layer in range(4))


def test_selected_rows_may_be_more_and_fewer():
    config = config_of(dict(selection='cake'), **PART)
    driver = Driver(Case(config, lengths=(16, 9, 13), interval=3))
    slow = reference_of(driver)
    driver.prompt()
    slow.block(16, (16, 9, 13))
    for rows in ([2, 2, 0, 1, 1], [4], [0, 0]):
        driver.select_rows(rows)
        slow.select_rows(rows)
        driver.block()
        slow.block(1, [1] * len(rows))
        assert driver.kept() == kept_by(slow)
        assert driver.cache.seen == slow.seen and driver.cache.slots == slow.slots
        assert len(driver.cache.preferences) == len(rows)


# --- a row alone ---


def check_alone(case: Case, blocks: tuple[int, ...]) -> None:
    together = Driver(case)
    together.prompt()
    for size in blocks:
        together.block(size)
    for row in range(len(case.lengths)):
        one = alone(case, row, blocks)
        assert one.cache.slots[0] == together.cache.slots[row]
        assert one.kept() == [[layer[row]] for layer in together.kept()]
        for pair in zip(one.cache.preferences[0], together.cache.preferences[row], strict=True):
            assert tuple(pair[0]) == pytest.approx(tuple(pair[1]), rel=1e-9)


@pytest.mark.parametrize(('selection', 'limits'), by_turns(SELECTION_VARIANTS, [None, LIMITS]))
def test_a_row_alone_is_the_row_in_a_batch(selection, limits):
    config = config_of(dict(allocation='attention_based'), selection, **PART)
    blocks = (1, 1, 1, 1, 1, 5, 3, 1, 1)
    case = Case(config, lengths=(21, 5, 13), interval=3, limits=limits)
    check_alone(with_blocks(case, blocks), blocks)


# --- a full cache with masks ---


@every_selection
@pytest.mark.parametrize('step', [1, 2])
def test_attention_over_ragged_layers_is_attention_with_masks_over_a_full_cache(selection, step):
    torch.manual_seed(3)
    model = SmallModel(layers=3, heads=4, kv_heads=2, head_dim=5).double()
    config = config_of(dict(allocation='attention_based'), selection, **SIZES, step=step)
    lengths = torch.tensor([19, 19, 13])
    tokens = torch.randn(3, 19 + 6, model.width, dtype=torch.float64)
    cache = BudgetedCache(config, model.layers)
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
    tokens = torch.randn(2, 20, model.width)
    cache = BudgetedCache(config, model.layers, interval=2)
    full = FullCacheWithMasks(model)
    assert not cache.reads_attention
    for start, end in ((0, 17), (17, 19), (19, 20)):
        given = lengths if start == 0 else None
        block = tokens[:, start:end]
        assert torch.equal(model.forward(block, cache, given), full.forward(block, given))
    for layer in range(3):
        held = cache[layer]
        assert torch.equal(held.keys, full.caches[layer].keys)
        assert torch.equal(held.lengths[:, 0], lengths + 3)
        assert cache.whole(layer)
        assert held.queries is held.scores is held.record.accumulated is held.record.recent is None
    assert cache.held_tokens == cache.peak_tokens == 3 * 20


@every_selection
def test_a_budget_that_covers_the_sequence_drops_nothing(selection):
    config = config_of(dict(allocation='attention_based'), selection, tokens=40, window=4, sinks=2)
    driver = Driver(Case(config, lengths=(17, 9), interval=3, decoded=8))
    driver.prompt()
    for size in (1, 1, 3, 1, 1, 1):
        driver.block(size)
    assert driver.kept() == [[[[*range(25)]] * 2, [[*range(17)]] * 2]] * 4
    assert all(driver.cache.whole(layer) for layer in range(4))


def test_attend_is_attention():
    torch.manual_seed(5)
    driver = Driver(Case(config_of(dict(selection='streaming', allocation='uniform'), **SIZES), layers=1))
    driver.cache.join(0, *(torch.randn(3, 2, 17, 3, dtype=torch.float64) for _ in range(2)))
    held = driver.cache.append(0)
    queries = torch.randn(3, 6, 17, 3, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries, held.keys.repeat_interleave(3, 1), held.values.repeat_interleave(3, 1), is_causal=True
    )
    output, probabilities = attend(queries, held)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 6, 17, dtype=torch.float64))


# --- invariants ---


@pytest.mark.parametrize(('allocation', 'selection'), pairs())
def test_window_and_sinks_stay_and_positions_increase(allocation, selection):
    case = Case(config_of(allocation, selection, **SIZES), layers=5, decoded=6, interval=2)
    driver = Driver(case)
    driver.prompt()
    for number in range(6):
        if number:
            driver.block()
        for layer in driver.kept():
            for row, length in zip(layer, case.lengths, strict=True):
                for positions in row:
                    seen = length + number
                    assert positions == sorted(set(positions))
                    assert positions[:2] == [0, 1]
                    assert positions[-4:] == list(range(seen - 4, seen))


@every_selection
def test_window_and_sinks_of_sliding_layers_stay_until_they_expire(selection):
    config = config_of(dict(allocation='attention_based'), selection, **SIZES, step=2)
    case = Case(config, lengths=(9, 6), limits=(7, 8, None, 9), interval=2, decoded=6)
    driver = Driver(case)
    driver.prompt()
    for number in range(6):
        if number:
            driver.block()
        for limit, layer in zip((7, 8, 99, 9), driver.kept(), strict=True):
            for seen, row in zip(driver.cache.seen, layer, strict=True):
                for positions in row:
                    oldest = max(0, seen - limit)
                    always = {position for position in (0, 1) if position >= oldest}
                    newest = range(seen - seen % 2 - 2, seen)
                    assert {*positions} >= always | {*newest}
                    assert positions == sorted(set(positions)) and positions[0] >= oldest


@pytest.mark.parametrize(
    ('limits', 'named', 'dynamic'),
    by_turns([None, (None, 5, 3, 12, None)], ['tokens', 'ratio', 'small ratio'], [True, False]),
)
def test_no_more_is_held_than_the_total_of_the_tokens_seen(limits, named, dynamic):
    """From prompts shorter than what is always kept on."""
    sizes = {'tokens': SIZES, 'ratio': PART, 'small ratio': dict(ratio=0.2, window=6)}[named]
    for length in (3, 23):
        config = config_of(dict(allocation='attention_based', selection='cake'), **sizes)
        case = Case(
            config, layers=5, lengths=(length,), limits=limits, interval=4, dynamic=dynamic, decoded=40
        )
        driver = Driver(case)
        slow = reference_of(driver)
        driver.prompt()
        for number in range(40):
            total = slow.total(length + number)
            assert driver.cache.held_tokens <= total
            if not number:
                most = sum(min(length, limit or 99) for limit in limits or [None] * 5)
                assert driver.cache.peak_tokens <= min(total + length, max(most, 5 * length))
            driver.block()
        assert driver.cache.held_tokens < sum(min(length + 40, limit or 99) for limit in limits or [99] * 5)


@pytest.mark.parametrize(
    ('sizes', 'interval', 'layers'),
    [(dict(ratio=0.5, window=9, step=3), 8, 3), (dict(tokens=6, window=4, step=4), 2, 2)],
    ids=str,
)
def test_no_more_is_held_than_the_slots_in_whole_steps(sizes, interval, layers):
    """Each layer has room for whole steps between two choices, at the smallest budget too."""
    config = config_of(dict(allocation='adaptive', selection='streaming'), **sizes)
    driver = Driver(Case(config, layers=layers, lengths=(22,), interval=interval, decoded=20))
    driver.prompt()
    for _ in range(20):
        assert driver.cache.held_tokens <= sum(driver.cache.slots[0])
        driver.block()


@pytest.mark.parametrize(
    ('limits', 'dynamic'), by_turns([None, (None, 5, 3, 12, None), (None, 2, 2, 2, 2)], [True, False])
)
@pytest.mark.parametrize('length', [1, 5, 7, 8, 11, 23])
def test_no_layer_holds_more_than_its_slots(limits, dynamic, length):
    """A sequence that is too short for its ratio keeps window, sinks and ``interval`` others."""
    config = config_of(dict(selection='cake'), ratio=0.3, window=6, sinks=1)
    case = Case(config, layers=5, lengths=(length,), limits=limits, interval=4, dynamic=dynamic, decoded=30)
    driver = Driver(case)
    driver.prompt()
    for number in range(30):
        held = [len(layer[0][0]) for layer in driver.kept()]
        assert all(count <= slots for count, slots in zip(held, driver.cache.slots[0], strict=True))
        room = [min(length + number, 6 + 1 + 4, limit or 99) for limit in limits or [99] * 5]
        assert all(slots >= least for slots, least in zip(driver.cache.slots[0], room, strict=True))
        driver.block()


def test_sliding_layers_smaller_than_the_window_leave_their_slots_to_the_others():
    config = config_of(dict(allocation='uniform', selection='cake'), ratio=0.8, window=9, sinks=2)
    driver = Driver(Case(config, layers=3, lengths=(30,), limits=(None, 6, 4)))
    driver.prompt()
    assert driver.cache.slots == [(22, 6, 4)] and sum(driver.cache.slots[0]) == 0.8 * (30 + 6 + 4)
    assert len(driver.kept()[0][0][0]) == 22


@every_allocation
def test_no_more_is_held_than_the_total_and_one_full_layer(allocation):
    case = Case(config_of(allocation, dict(selection='cake'), **SIZES), layers=5, lengths=(17, 17, 17))
    driver = Driver(case)
    driver.prompt()
    total, cache = 5 * SIZES['tokens'], driver.cache
    assert [sum(slots) for slots in cache.slots] == [total] * 3
    of_rows = [sum(len(layer[row][0]) for layer in driver.kept()) for row in range(3)]
    assert of_rows == [total] * 3
    if cache.cascade:
        assert cache.peak_tokens < 5 * case.columns
        for before, after in zip(driver.slots_seen, driver.slots_seen[1:], strict=False):
            for old, new in zip(before, after, strict=True):
                assert all(now <= past for past, now in zip(old, new, strict=False))
    else:
        assert cache.peak_tokens == 5 * case.columns
    for _ in range(case.decoded):
        driver.block()
        assert all(sum(len(layer[row][0]) for layer in driver.kept()) <= total for row in range(3))


@every_selection
def test_bytes_are_what_the_tensors_are(selection):
    config = config_of(dict(allocation='attention_based'), selection, **SIZES)
    driver = Driver(Case(config, layers=5, interval=3))
    driver.prompt()
    remembered = len({'accumulated', 'scores'} & set(names_of(selection)))
    for waiting in (0, 0, 1, 2, 0):
        columns = driver.cache.held_tokens
        # 3 rows with 2 heads: keys and values of 3 numbers, a position, a score and a sum for each token that
        # was read; queries of 6 heads with 3 numbers for those that were not; 8 bytes each. Keys and values
        # have room for at most 16 tokens to come, once one was appended
        read, spare = columns - 5 * waiting, [_spare(driver.cache[layer].keys) for layer in range(5)]
        assert all(0 <= more <= 16 for more in spare) and (any(spare) or not waiting)
        expected = 3 * 2 * ((2 * 3 + 1) * columns + 2 * 3 * sum(spare) + remembered * read + 5)
        expected += 3 * 6 * 3 * 5 * waiting
        assert driver.cache.bytes == 8 * expected
        driver.block()


def test_sliding_layers_hold_the_memory_of_their_tokens():
    """Behind a prompt and behind single tokens, and most tokens copy none that is held."""
    config = config_of(dict(allocation='uniform', selection='streaming'), ratio=1.0, window=4)
    driver = Driver(Case(config, layers=3, lengths=(90,) * 2, limits=(5, 7, 3), interval=4, decoded=40))
    driver.prompt()
    moved = 0
    for _ in range(40):
        layers = [driver.cache[layer] for layer in range(3)]
        for held in layers:
            spare = _spare(held.keys)
            assert 0 <= spare <= 2 * 16
            assert held.bytes >= held.keys.untyped_storage().nbytes() + held.values.untyped_storage().nbytes()
            assert held.positions.untyped_storage().nbytes() <= 8 * 2 * 2 * (held.columns + 2 * 16)
        before = [held.keys.untyped_storage().data_ptr() for held in layers]
        driver.block()
        moved += sum(
            driver.cache[layer].keys.untyped_storage().data_ptr() != before[layer] for layer in range(3)
        )
    assert moved <= 3 * 6


def _spare(keys: torch.Tensor) -> int:
    return keys.untyped_storage().nbytes() // 8 // keys[:, :, 0].numel() - keys.shape[2]


def names_of(selection: dict[str, Any]) -> list[str]:
    """What a layer remembers of its tokens."""
    reads = config_of(selection, ratio=0.5).selector().reads
    return [*(['scores'] if reads else []), *(['accumulated'] if 'accumulated' in reads else [])]


@pytest.mark.parametrize(('allocation', 'selection'), pairs(cascading=True))
@pytest.mark.parametrize('limits', [None, LIMITS])
def test_the_cascade_keeps_what_shrinking_once_at_the_end_keeps(allocation, selection, limits):
    case = Case(config_of(allocation, selection, **SIZES), limits=limits)
    cascade, flat = Driver(case), Driver(case, of=FlatCache)
    for driver in (cascade, flat):
        driver.prompt()
    assert cascade.kept() == flat.kept()
    assert cascade.cache.slots == flat.cache.slots
    assert cascade.cache.peak_tokens < flat.cache.peak_tokens
    if limits is None:
        assert flat.cache.peak_tokens == 4 * case.columns


def test_a_prompt_within_the_budget_grows_into_it():
    config = config_of(dict(allocation='adaptive'), tokens=13, window=4)
    case = Case(config, lengths=(7, 6, 5), decoded=20)
    driver = Driver(case)
    driver.prompt()
    for number in range(20):
        # every row has its own total, and columns for the longest row of each layer
        for row, length in enumerate(case.lengths):
            held = sum(len(layer[row][0]) for layer in driver.kept())
            assert held == min(4 * (length + number), 4 * 13)
        driver.block()
    # 36 evictable slots by 4 : 3 : 2 : 1
    assert driver.cache.slots == [(4 + 14, 4 + 11, 4 + 7, 4 + 4)] * 3


def test_the_total_follows_the_tokens_seen():
    config = config_of(dict(allocation='uniform'), ratio=0.5, window=4)
    driver = Driver(Case(config, lengths=(24,), decoded=40, interval=4))
    driver.prompt()
    assert driver.cache.slots == [(12,) * 4]
    driver.block(16)
    assert driver.cache.slots == [(20,) * 4]
    for _ in range(20):
        driver.block()
    # chosen at 57 tokens: the layers held 23 and take 3 more before the next choice
    assert driver.cache.seen == [60]
    assert sum(driver.cache.slots[0]) <= 4 * 57 // 2
    assert min(driver.cache.slots[0]) > 20


def test_fixed_slots_stay_as_the_prompt_made_them():
    config = config_of(dict(allocation='attention_based'), ratio=0.5, window=4)
    driver = Driver(Case(config, lengths=(24, 13), decoded=40, interval=4, dynamic=False))
    driver.prompt()
    driver.block()
    before = list(driver.cache.slots)
    for _ in range(30):
        driver.block()
    assert driver.cache.slots == before
    driver.block(5)
    assert driver.cache.slots != before


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


def test_attention_is_not_read_where_nothing_needs_it():
    cheap = config_of(dict(allocation='pyramid', selection='streaming'), **SIZES)
    assert not BudgetedCache(cheap, 3).reads_attention
    for variant in (dict(allocation='attention_based'), dict(allocation='uniform', selection='h2o')):
        config = config_of(dict(selection='streaming') | variant, **SIZES)
        assert BudgetedCache(config, 3).reads_attention


def test_a_mix_with_uniform_does_not_cascade():
    assert not BudgetedCache(config_of(dict(alpha=0.5), **SIZES), 3).cascade
    assert BudgetedCache(config_of(**SIZES), 3).cascade


def test_the_interval_leaves_room_for_the_window():
    config = config_of(tokens=9, window=4, sinks=2)
    assert BudgetedCache(config, 3, interval=8).interval == 3
    assert BudgetedCache(config, 3, interval=2).interval == 2
    assert BudgetedCache(config_of(tokens=6, window=4, sinks=2, minimum=0), 3).interval == 1
    assert BudgetedCache(config_of(ratio=0.25), 3).interval == 8


# --- attention that is no number ---


@pytest.mark.parametrize('number', [float('nan'), float('inf'), float('-inf'), 1e30])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@every_selection
def test_numbers_that_are_not_finite_do_not_outrank_what_is_always_kept(number, dtype, selection):
    """In queries and keys, as an overflow of float16 makes them: the choice is a choice all the same."""
    torch.manual_seed(6)
    config = config_of(dict(allocation='attention_based'), selection, **SIZES)
    cache = BudgetedCache(config, 3, interval=2)
    for block, place in ((17, 8), (1, 0), (1, 0), (4, 2), (1, 0), (1, 0)):
        for layer in range(3):
            queries, keys, values = (torch.randn(2, heads, block, 5).to(dtype) for heads in (6, 2, 2))
            keys[0, :, place], queries[0, :, -1] = number, number
            cache.join(layer, keys, values)
            cache.append(layer)
            cache.observe(layer, queries)
    assert cache.seen == [25, 25]
    for slots in cache.slots:
        assert sum(slots) <= 27 and min(slots) >= 6
    for held in (cache[layer] for layer in range(3)):
        for row in range(2):
            for group in range(2):
                positions = held.positions[row, group, held.columns - held.lengths[row, group] :].tolist()
                assert positions == sorted(set(positions))
                assert positions[:2] == [0, 1]
                assert positions[-4:] == [21, 22, 23, 24]


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_row_with_broken_attention_leaves_the_other_rows_alone(number):
    config = config_of(dict(selection='hace'), **SIZES)
    sound, broken = Driver(Case(config)), Driver(Case(config))
    broken.queries[:, 1, :, -9:] = number
    for driver in (sound, broken):
        driver.prompt()
        for _ in range(3):
            driver.block()
    for row in (0, 2):
        assert [layer[row] for layer in broken.kept()] == [layer[row] for layer in sound.kept()]
        assert broken.cache.slots[row] == sound.cache.slots[row]


@pytest.mark.parametrize(('allocation', 'selection'), pairs())
def test_nothing_outranks_what_is_always_kept(allocation, selection):
    """Padding, a prompt, a block and single tokens, one row of many with queries and keys of any kind."""
    case = Case(config_of(allocation, selection, **SIZES), layers=2, lengths=(11, 13, 6))
    for row in range(3):
        sound, broken, draw = Driver(case), Driver(case), random.Random(row)
        for odd in (math.nan, math.inf, -math.inf, 1e30, -1e30):
            table = draw.choice([broken.queries, broken.keys])
            table[draw.randrange(2), row, :, draw.randrange(case.lengths[row] + 4)] = odd
        for driver in (sound, broken):
            driver.prompt()
            for size in (1, 2, 1):
                driver.block(size)
        others, end = [other for other in range(3) if other != row], case.lengths[row] + 4
        for layer, expected in zip(broken.kept(), sound.kept(), strict=True):
            assert [layer[other] for other in others] == [expected[other] for other in others]
            for positions in layer[row]:
                assert positions == sorted(set(positions))
                assert {0, 1, *range(end - 4, end)} <= set(positions)


def test_half_precision_does_not_overflow_before_it_is_scaled():
    """float16 products of 25,600: the window stays, the next token gets the next position."""
    queries = torch.full((1, 1, 8, 16), 40.0, dtype=torch.float16)
    keys = queries.clone()
    keys[:, :, :4] *= -1
    cache = BudgetedCache(BudgetConfig(tokens=6, window=2, selection='snapkv', allocation='uniform'), 1)
    cache.join(0, keys, keys)
    held = cache.append(0)
    output, probabilities = attend(queries * 40, held)
    assert output.isfinite().all() and probabilities.isfinite().all()
    torch.testing.assert_close(probabilities[0, 0, -1], torch.tensor([0.0] * 4 + [0.25] * 4))
    cache.observe(0, queries)
    assert held.positions.tolist() == [[[2, 3, 4, 5, 6, 7]]]
    cache.join(0, keys[:, :, :1], keys[:, :, :1])
    assert cache.append(0).positions[0, 0, -1] == 8


def test_an_empty_block_changes_no_score():
    keys = torch.randn(2, 1, 8, 3)
    config = BudgetConfig(ratio=0.5, window=2, selection='h2o', rho=0.5, allocation='uniform')
    cache, seen = BudgetedCache(config, 1), []
    for block in (8, 0):
        cache.join(0, keys[:, :, :block], keys[:, :, :block])
        cache.append(0)
        cache.observe(0, keys[:, :, :block])
        seen.append(cache[0].record.accumulated.clone())
    assert torch.equal(*seen)


# --- refused calls ---


def state(driver: Driver) -> Any:
    cache = driver.cache
    tensors = [
        (name, tensor.clone()) for layer in range(len(cache)) for _, name, tensor in cache[layer]._tensors()
    ]
    plain = (cache.seen, cache.slots, cache.preferences, cache.peak_tokens, cache.bytes, len(cache))
    return repr(plain), tensors


def refused(driver: Driver, error: type[Exception], text: str, call: Callable[[], Any]) -> None:
    """The call is refused, and the cache is as if nothing had been asked."""
    before = state(driver)
    with pytest.raises(error, match=text):
        call()
    after = state(driver)
    assert after[0] == before[0]
    for (name, tensor), (other, kept) in zip(after[1], before[1], strict=True):
        assert name == other and torch.equal(tensor, kept)


def test_calls_out_of_order_and_wrong_shapes_are_refused():
    driver, sound = (Driver(Case(config_of(dict(selection='hace'), **SIZES), decoded=7)) for _ in range(2))
    for each in (driver, sound):
        each.prompt()
    cache, block = driver.cache, torch.zeros(3, 2, 1, 3, dtype=torch.float64)
    queries = torch.zeros(3, 6, 1, 3, dtype=torch.float64)
    for error, text, call in (
        (RuntimeError, 'expected layer 0, got layer 1', lambda: cache.join(1, block, block)),
        (RuntimeError, r'observe\(0\) must follow append\(0\)', lambda: cache.observe(0, queries)),
        (RuntimeError, r'append\(0\) must follow join\(0, ...\)', lambda: cache.append(0)),
        (ValueError, 'must both be', lambda: cache.join(0, block, block[:, :1])),
        (ValueError, 'must both be', lambda: cache.join(0, block[0], block[0])),
        (ValueError, r'\[3, 2, 1, 3\] as in the first block, got \[3, 1, 1, 3\]',
         lambda: cache.join(0, block[:, :1], block[:, :1])),
        (ValueError, r'\[3, 2, 1, 3\] as in the first block, got \[2, 2, 1, 3\]',
         lambda: cache.join(0, block[:2], block[:2])),
    ):  # fmt: skip
        refused(driver, error, text, call)
    driver.block()
    sound.block()
    assert driver.kept() == sound.kept()


def test_calls_in_the_middle_of_a_block_are_refused():
    driver, sound = (Driver(Case(config_of(dict(selection='hace'), **SIZES), decoded=7)) for _ in range(2))
    for each in (driver, sound):
        each.prompt()
    cache, block = driver.cache, torch.zeros(3, 2, 1, 3, dtype=torch.float64)
    queries = torch.zeros(3, 6, 1, 3, dtype=torch.float64)
    rows = torch.tensor([1, 1, 1])
    keys = driver._at(driver.keys, 0, torch.tensor(cache.seen)[:, None])
    cache.join(0, keys, keys)
    refused(driver, RuntimeError, 'while a block waits for append', lambda: cache.join(0, block, block))
    refused(driver, RuntimeError, 'rows are selected between two blocks', lambda: cache.select_rows(rows))
    for added in ([1, 1], [1, 1, 0], [1, 1, 2], [1, 1, -1]):
        refused(driver, ValueError, r'added must be 3 integers in \[0, 1\]',
                lambda added=added: cache.append(0, added))  # fmt: skip
    cache.append(0)
    refused(driver, RuntimeError, r'call observe\(0, ...\) first', lambda: cache.join(1, block, block))
    refused(driver, RuntimeError, 'rows are selected between two blocks', lambda: cache.select_rows(rows))
    refused(driver, RuntimeError, r'observe\(1\) must follow append\(1\)', lambda: cache.observe(1, queries))
    for wrong in (queries[:, :5], queries[:2], queries[..., :2], queries[:, :, :0], queries[0],
                  torch.cat([queries] * 2, dim=2)):  # fmt: skip
        refused(driver, ValueError, r'queries must be \[3, a multiple of 2, 1, 3\]',
                lambda wrong=wrong: cache.observe(0, wrong))  # fmt: skip
    own = driver._at(driver.queries, 0, torch.tensor(sound.cache.seen)[:, None])
    cache.observe(0, own)
    refused(driver, RuntimeError, 'rows are selected between two blocks', lambda: cache.select_rows(rows))
    refused(driver, RuntimeError, 'expected layer 1, got layer 0', lambda: cache.join(0, block, block))
    sound.block()
    assert driver.kept()[0] == sound.kept()[0]


@pytest.mark.parametrize('added', [[17, 17], [-1, 5, 7], [18, 5, 7]])
def test_impossible_lengths_are_refused(added):
    driver = Driver(Case(config_of(**SIZES)))
    block = torch.zeros(3, 2, 17, 3, dtype=torch.float64)
    driver.cache.join(0, block, block)
    text = r'added must be 3 integers in \[0, 17\]'
    refused(driver, ValueError, text, lambda: driver.cache.append(0, added))
    driver.cache.append(0, [17, 0, 7])
    assert driver.cache.seen == [17, 0, 7]
