"""Which tokens stay: against the plain reference, and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lzero_kv.budget import SELECTIONS, AttentionRecord, Kept, Tokens, select
from lzero_kv.budget.selection import H2O, HACE, Cake, SnapKV, Streaming, indicator

from . import reference
from .methods import SELECTION_VARIANTS, config_of, label

# few different scores, so that ties are common
numbers = st.integers(0, 3).map(float)


def tokens_of(positions: list[list[int]], window: int, sinks: int = 0, step: int = 1) -> Tokens:
    """Right-aligned rows of one group."""
    columns = max(len(row) for row in positions)
    padded = [[0] * (columns - len(row)) + row for row in positions]
    lengths = torch.tensor([[len(row)] for row in positions])
    return Tokens(torch.tensor(padded)[:, None], lengths, window, sinks, step)


def kept_positions(kept: Kept, tokens: Tokens) -> list[list[int]]:
    rows = tokens.positions.gather(2, kept.indices)[:, 0]
    return [row[-length:].tolist() for row, (length,) in zip(rows, kept.lengths.tolist(), strict=True)]


def test_every_selection_is_tested():
    assert {variant['selection'] for variant in SELECTION_VARIANTS} == set(SELECTIONS)


# --- the choice among given scores ---


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_choice_agrees_with_the_reference(data):
    step = data.draw(st.sampled_from([1, 2, 3]))
    window, sinks = step * data.draw(st.integers(1, 3)), step * data.draw(st.integers(0, 2))
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        # whole steps, some of them gone, and a newest one that need not be complete
        steps = sorted(data.draw(st.sets(st.integers(0, 14), max_size=9)))
        newest = [15 * step + number for number in range(data.draw(st.integers(1, step)))]
        rows.append([number * step + place for number in steps for place in range(step)] + newest)
    tokens = tokens_of(rows, window, sinks, step)
    columns = tokens.positions.shape[2]
    scores = torch.tensor([data.draw(st.lists(numbers, min_size=columns, max_size=columns)) for _ in rows])
    slots = data.draw(st.integers(min(window + sinks, columns), columns + 2))
    kept = select(scores[:, None], tokens, slots)
    assert kept.indices.shape == (len(rows), 1, min(slots, columns))
    expected = []
    for row, positions in enumerate(rows):
        own = scores[row, columns - len(positions) :].tolist()
        scored = {place: own[place] for place in reference.may_go(positions, window, sinks, step)}
        places = reference.keep(scored, positions, slots, step)
        expected.append([positions[place] for place in places])
    assert kept_positions(kept, tokens) == expected


def test_of_equal_scores_the_later_stays():
    tokens = tokens_of([list(range(9))], window=2, sinks=1)
    kept = select(torch.tensor([[[0.0, 1, 5, 1, 1, 1, 0, 0, 0]]]), tokens, slots=6)
    assert kept_positions(kept, tokens) == [[0, 2, 4, 5, 7, 8]]


def test_a_smaller_choice_is_part_of_a_larger_one_and_of_itself_again():
    torch.manual_seed(2)
    tokens = tokens_of([list(range(23)), list(range(17))], window=3, sinks=2)
    scores = torch.randint(0, 5, (2, 1, 23)).double()
    large = select(scores, tokens, 15)
    rest = Tokens(tokens.positions.gather(2, large.indices), large.lengths, 3, 2)
    again = select(scores.gather(2, large.indices), rest, 9)
    assert kept_positions(again, rest) == kept_positions(select(scores, tokens, 9), tokens)


broken = st.sampled_from([float('nan'), float('inf'), float('-inf'), -7.0, 65504.0, -65504.0, 2.0])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_score_outranks_window_and_sinks(dtype, data):
    step = data.draw(st.sampled_from([1, 2]))
    window, sinks = 2 * step, step
    lengths = data.draw(st.lists(st.integers(1, 13), min_size=2, max_size=3))
    tokens = tokens_of([list(range(length)) for length in lengths], window, sinks, step)
    columns = max(lengths)
    scores = torch.tensor([data.draw(st.lists(broken, min_size=columns, max_size=columns)) for _ in lengths])
    slots = data.draw(st.integers(window + sinks, 11))
    for kept, length in zip(
        kept_positions(select(scores[:, None].to(dtype), tokens, slots), tokens), lengths, strict=True
    ):
        newest = range(max(0, (length - 1) // step * step - window + step), length)
        assert {*range(min(sinks, length)), *newest} <= set(kept)
        assert len(kept) <= slots and kept == sorted(set(kept))


def test_steps_are_kept_whole():
    # pairs (0 1) (2 3) (4 5) (6 7) and the open (8 .)
    tokens = tokens_of([list(range(9))], window=2, step=2)
    scores = torch.tensor([[[0.0, 9, 5, 5, 3, 3, 8, 0, 0]]])
    assert kept_positions(select(scores, tokens, 3), tokens) == [[2, 3, 8]]
    # 9 and 8 lie with a 0: (2 3) has 10, (0 1) has 9, (6 7) has 8
    assert kept_positions(select(scores, tokens, 5), tokens) == [[0, 1, 2, 3, 8]]
    # one slot stays empty instead of half a step
    assert kept_positions(select(scores, tokens, 6), tokens) == [[0, 1, 2, 3, 8]]


def test_window_and_sinks_do_not_fit():
    tokens = tokens_of([list(range(9))], window=3, sinks=2)
    with pytest.raises(
        ValueError, match='expected at least 5 slots, got 4; raise the budget or lower window=3'
    ):
        select(torch.zeros(1, 1, 9), tokens, 4)
    assert kept_positions(select(torch.zeros(1, 1, 9), tokens, 5), tokens) == [[0, 1, 6, 7, 8]]


# --- scores ---


def record_of(
    attention: torch.Tensor, lengths: torch.Tensor, window: int, groups: int = 1, decay: float = 1.0
):
    record = AttentionRecord(groups, window, decay, {'accumulated', 'recent'})
    record.observe(attention, lengths)
    return record


@pytest.mark.parametrize('variant', SELECTION_VARIANTS, ids=label)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(1, 19))
def test_scores_agree_with_the_reference(variant, seed, length):
    selector = config_of(variant, ratio=1.0).selector()
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, 6, 19, 19, generator=generator, dtype=torch.float64).tril()
    lengths = torch.tensor([[19, 19], [length, length]])
    tokens = Tokens.of_prompt(lengths, 19, window=4, sinks=2)
    record = record_of(attention, lengths, 4, groups=2, decay=selector.decay)
    scores = selector.scores(record, tokens)
    parameters = {name: value for name, value in variant.items() if name in ('gamma', 'kernel', 'theta')}
    if isinstance(selector, HACE):
        parameters['mix'] = selector.accumulated_share
    for row, own in enumerate(lengths[:, 0].tolist()):
        for group in range(2):
            heads = attention[row, 3 * group : 3 * group + 3, 19 - own :, 19 - own :]
            places = reference.may_go(range(own), 4, 2)
            expected = reference.scores(
                variant['selection'],
                places,
                range(own),
                reference.accumulated(heads.tolist(), selector.decay),
                heads[:, -4:].tolist(),
                **parameters,
            )
            got = scores[row, group, 19 - own :]
            assert [float(got[place]) for place in places] == pytest.approx(
                list(expected.values()), rel=1e-11, abs=1e-15
            )


def test_accumulation_decays_at_every_query():
    record = AttentionRecord(groups=1, window=2, decay=0.5, reads={'accumulated'})
    record.observe(torch.tensor([[[[4.0, 0.0], [2.0, 2.0]]]]), torch.tensor([[2]]))
    record.observe(torch.tensor([[[[1.0, 1.0, 1.0]]]]), torch.tensor([[3]]))
    assert H2O(rho=0.5).scores(record, None).tolist() == [[[3.0, 2.0, 1.0]]]
    assert record.recent is None


def test_heads_of_a_group_are_averaged():
    attention = torch.zeros(1, 6, 1, 5)
    attention[0, :, 0, 1] = torch.tensor([3.0, 6.0, 9.0, 0.0, 0.0, 6.0])
    record = record_of(attention, torch.tensor([[5, 5]]), window=2, groups=2)
    assert record.accumulated[0, :, 1].tolist() == [6.0, 2.0]
    mean, variance = record.moments()
    assert mean[0, :, 1].tolist() == [6.0, 2.0]
    assert variance.abs().max() == 0


def test_pooling_is_over_neighbours_in_position_with_zeros_beyond():
    attention = torch.tensor([[[[9.0, 0.0, 5.0, 0.0, 0.0, 10.0, 7.0, 7.0]]]])
    tokens = tokens_of([[0, 1, 2, 3, 4, 5, 6, 7]], window=2, sinks=1)
    record = record_of(attention, tokens.lengths, window=2)
    # sink (9) and window (7, 7) are no neighbours
    pooled = indicator(record, tokens, 0.0, 5)[0, 0, 1:6]
    assert pooled.tolist() == [1.0, 1.0, 3.0, 3.0, 2.0]
    assert torch.equal(SnapKV(kernel=5).scores(record, tokens), indicator(record, tokens, 0.0, 5))


def test_cake_adds_the_variance():
    attention = torch.zeros(1, 1, 3, 7)
    attention[0, 0, :, 2] = torch.tensor([0.0, 0.3, 0.6])
    tokens = tokens_of([list(range(7))], window=3)
    record = record_of(attention, tokens.lengths, window=3)
    # mean .3, variance (.09 + .09) / 2
    assert Cake(gamma=200.0, kernel=1).scores(record, tokens)[0, 0, 2] == pytest.approx(0.3 + 200 * 0.09)


def test_small_scores_go_oldest_first():
    accumulated = torch.tensor([[[[10.0, 2.0, 1.0, 9.0, 0.5, 0.0]]]])
    tokens = tokens_of([list(range(6))], window=1)
    record = record_of(accumulated, tokens.lengths, window=1)
    plain = HACE('attention', None, None, 200.0, 5, theta=0.0).scores(record, tokens)
    threshold = HACE('attention', None, None, 200.0, 5, theta=0.3).scores(record, tokens)
    assert kept_positions(select(plain, tokens, 4), tokens) == [[0, 1, 3, 5]]
    assert kept_positions(select(threshold, tokens, 4), tokens) == [[0, 3, 4, 5]]


def test_streaming_keeps_the_newest():
    tokens = tokens_of([[0, 1, 4, 6, 7, 9]], window=1, sinks=2)
    kept = select(Streaming().scores(AttentionRecord(1, 1, 1.0, ()), tokens), tokens, 4)
    assert kept_positions(kept, tokens) == [[0, 1, 7, 9]]


def test_scores_without_an_observation_are_refused():
    record, tokens = AttentionRecord(1, 2, 1.0, {'recent'}), tokens_of([[0, 1, 2]], window=1)
    for selection in (H2O(None), SnapKV(3), Cake(1.0, 3), HACE('hybrid', None, None, 1.0, 3, 0.0)):
        with pytest.raises(RuntimeError, match='call observe before'):
            selection.scores(record, tokens)


@pytest.mark.parametrize('number', [float('nan'), float('inf'), float('-inf'), -0.25])
@pytest.mark.parametrize('reads', ['accumulated', 'recent'])
def test_attention_that_is_no_probability_is_refused(number, reads):
    record = AttentionRecord(1, 3, 0.5, {reads})
    attention, lengths = torch.rand(3, 2, 4, 6), torch.tensor([[6], [5], [2]])
    record.observe(attention, lengths)
    before = {name: getattr(record, name) for name in ('accumulated', 'recent', 'queries')}
    wrong = torch.rand(3, 2, 1, 6)
    wrong[1, 1, 0, 4] = number
    with pytest.raises(ValueError, match=r'finite numbers of at least 0, got others in rows \[1\]'):
        record.observe(wrong, lengths)
    assert all(getattr(record, name) is tensor for name, tensor in before.items())
    wrong[1, 1, 0, 4] = 0.5
    wrong[2, :, :, :4] = number  # padding is not read
    record.observe(wrong, lengths)


@pytest.mark.parametrize('reads', ['accumulated', 'recent'])
def test_no_tokens_no_decay(reads):
    record = AttentionRecord(1, 3, 0.5, {reads})
    lengths = torch.tensor([[6], [5]])
    record.observe(torch.rand(2, 2, 4, 6), lengths)
    before = getattr(record, reads).clone()
    record.observe(torch.rand(2, 2, 0, 6), lengths)
    assert torch.equal(getattr(record, reads), before)


def test_nothing_is_remembered_that_nobody_reads():
    record = AttentionRecord(1, 2, 1.0, Streaming().reads)
    record.observe(torch.rand(1, 3, 4, 4), torch.tensor([[4]]))
    assert record.accumulated is None
    assert record.recent is None
    assert HACE('attention', None, None, 200.0, 5, 0.0).reads == {'accumulated'}
    assert HACE('hybrid', 0.0, None, 200.0, 5, 0.0).reads == {'recent'}
    assert HACE('hybrid', None, None, 200.0, 5, 0.0).reads == {'accumulated', 'recent'}
