"""How many tokens each layer keeps: against the plain reference, and every invariant on random problems."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lzero_kv.budget import ALLOCATIONS, BudgetTracker, Preference, allocate, apportion

from . import reference
from .methods import ALLOCATION_VARIANTS, config_of, label

measured = st.one_of(
    st.floats(1e-9, 1e6), st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 1e-30, 1e30])
)


@dataclass(frozen=True)
class Problem:
    """What an allocation is asked."""

    preferences: tuple[Preference, ...]
    total: int
    context: int
    window: int
    sinks: int
    minimum: int

    @property
    def layers(self) -> int:
        return len(self.preferences)

    @property
    def reserved(self) -> int:
        return min(self.context, self.window + self.sinks)

    @property
    def cap(self) -> int:
        return self.context - self.reserved

    @property
    def evictable(self) -> int:
        return max(0, self.total - self.layers * self.reserved)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    preferences = draw(st.lists(st.tuples(measured, measured), min_size=1, max_size=7))
    context, window, sinks = draw(st.integers(1, 60)), draw(st.integers(2, 9)), draw(st.integers(0, 4))
    layers = len(preferences)
    total = draw(st.integers(layers * min(context, window + sinks), layers * context + 5))
    minimum = draw(st.integers(0, 3))
    return Problem(tuple(Preference(*pair) for pair in preferences), total, context, window, sinks, minimum)


def weights_of(variant: dict[str, Any], problem: Problem, seen: int | None = None) -> list[Fraction]:
    """Weights of the first ``seen`` layers, as a cascade knows them."""
    seen = problem.layers if seen is None else seen
    allocation = config_of(variant, ratio=1.0).allocator()
    return allocation.weights(problem.layers, problem.preferences[:seen])[:seen]


def slots_of(variant: dict[str, Any], problem: Problem, seen: int | None = None) -> tuple[int, ...]:
    weights = weights_of(variant, problem, seen)
    return allocate(
        weights,
        problem.total,
        [problem.context] * len(weights),
        window=problem.window,
        sinks=problem.sinks,
        minimum=problem.minimum,
        reserved=(problem.layers - len(weights)) * problem.reserved,
    )


every_allocation = pytest.mark.parametrize('variant', ALLOCATION_VARIANTS, ids=label)
every_cascade = pytest.mark.parametrize(
    'variant',
    [item for item in ALLOCATION_VARIANTS if config_of(item, ratio=1.0).allocator().cascades],
    ids=label,
)


def test_every_allocation_is_tested():
    assert {variant['allocation'] for variant in ALLOCATION_VARIANTS} == set(ALLOCATIONS)


# --- the plain reference ---


@every_allocation
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_weights_agree_with_the_reference(variant, problem):
    parameters = {'mode' if name == 'preference' else name: value for name, value in variant.items()}
    expected = reference.weights(layers=problem.layers, preferences=problem.preferences, **parameters)
    got = weights_of(variant, problem)
    assert [weight / sum(got) for weight in got] == [weight / sum(expected) for weight in expected]


@every_allocation
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_slots_agree_with_the_reference(variant, problem):
    expected = reference.apportion(
        weights_of(variant, problem), problem.evictable, [problem.cap] * problem.layers, problem.minimum
    )
    assert slots_of(variant, problem) == tuple(problem.reserved + count for count in expected)


fractions = st.one_of(
    st.integers(1, 12).map(Fraction),
    st.fractions(Fraction(1, 1000), 1000),
    st.floats(1e-300, 1e300).map(Fraction),
)


@settings(max_examples=120, deadline=None)
@given(
    layers=st.lists(st.tuples(fractions, st.integers(0, 23)), min_size=1, max_size=6),
    total=st.integers(0, 120),
    minimum=st.integers(0, 5),
)
def test_rounding_agrees_with_the_reference_for_uneven_caps(layers, total, minimum):
    weights, caps = zip(*layers, strict=True)
    got = apportion(weights, total, caps, minimum)
    assert list(got) == reference.apportion(weights, total, caps, minimum)
    assert sum(got) == min(total, sum(caps))


def test_a_large_model_agrees_with_the_reference():
    weights = [Fraction(1 + 7 * layer % 11, 3) for layer in range(37)]
    caps = [101 + 13 * layer % 17 for layer in range(37)]
    for total in (0, 5, 36, 37, 1013, 3500, 9999):
        assert list(apportion(weights, total, caps, 2)) == reference.apportion(weights, total, caps, 2)


# --- invariants ---


@every_allocation
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_the_total_is_spent_and_bounds_hold(variant, problem):
    budgets = [slots - problem.reserved for slots in slots_of(variant, problem)]
    assert sum(budgets) == min(problem.evictable, problem.cap * problem.layers)
    assert all(0 <= budget <= problem.cap for budget in budgets)
    if problem.evictable >= problem.layers * min(problem.minimum, problem.cap):
        assert all(budget >= min(problem.minimum, problem.cap) for budget in budgets)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.tuples(fractions, st.integers(0, 40)), min_size=1, max_size=6),
    window=st.integers(0, 13), sinks=st.integers(0, 5), minimum=st.integers(0, 3), spare=st.integers(0, 90),
)  # fmt: skip
def test_the_total_is_spent_where_layers_saw_less_than_the_window(layers, window, sinks, minimum, spare):
    weights, contexts = zip(*layers, strict=True)
    total = sum(min(context, window + sinks) for context in contexts) + spare
    slots = allocate(weights, total, contexts, window=window, sinks=sinks, minimum=minimum)
    assert sum(slots) == min(total, sum(contexts))
    assert all(least <= held for least, held in zip(
        (min(context, window + sinks) for context in contexts), slots, strict=True))  # fmt: skip


@every_allocation
@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_more_weight_is_never_less_budget_and_the_result_is_always_the_same(variant, problem):
    weights, slots = weights_of(variant, problem), slots_of(variant, problem)
    assert slots == slots_of(variant, problem)
    for one, other in itertools.permutations(range(problem.layers), 2):
        if weights[one] > weights[other]:
            assert slots[one] >= slots[other]


@every_allocation
@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_one_slot_more_takes_nothing_from_any_layer(variant, problem):
    more = slots_of(variant, replace(problem, total=problem.total + 1))
    assert all(after >= before for before, after in zip(slots_of(variant, problem), more, strict=True))


@every_cascade
@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_a_further_layer_raises_no_older_budget(variant, problem):
    for seen in range(1, problem.layers):
        before, after = slots_of(variant, problem, seen), slots_of(variant, problem, seen + 1)
        assert all(new <= old for old, new in zip(before, after, strict=False))


@every_cascade
@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_a_longer_context_raises_budgets_of_layers_that_hold_everything_alone(variant, problem):
    further = replace(problem, context=problem.context + 1)
    assume(further.total >= further.layers * further.reserved)
    longer = slots_of(variant, further)
    for before, after in zip(slots_of(variant, problem), longer, strict=True):
        assert after <= before or before == problem.context


@settings(max_examples=25, deadline=None)
@given(problem=problems())
def test_uniform_budgets_differ_by_one_at_most(problem):
    slots = slots_of(dict(allocation='uniform'), problem)
    assert max(slots) - min(slots) <= 1
    assert list(slots) == sorted(slots, reverse=True)


@pytest.mark.parametrize('variant', [item for item in ALLOCATION_VARIANTS if item['allocation'] in
                                     ('adaptive', 'pyramid')], ids=label)  # fmt: skip
@settings(max_examples=20, deadline=None)
@given(problem=problems())
def test_adaptive_budgets_never_increase(variant, problem):
    slots = slots_of(variant, problem)
    assert list(slots) == sorted(slots, reverse=True)


attention_based = pytest.mark.parametrize(
    'variant', [item for item in ALLOCATION_VARIANTS if item['allocation'] == 'attention_based'], ids=label
)


@attention_based
@settings(max_examples=25, deadline=None)
@given(problem=problems(), scale=st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)))
def test_a_common_factor_of_dispersion_or_shift_changes_nothing(variant, problem, scale):
    # 0 stands for the smallest number there is, which has no smaller multiple
    assume(all(value > 0 for preference in problem.preferences for value in preference))
    scaled = tuple(Preference(h * scale[0], v * scale[1]) for h, v in problem.preferences)
    assert slots_of(variant, problem) == slots_of(variant, replace(problem, preferences=scaled))


@attention_based
@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_equal_preferences_make_attention_based_uniform(variant, problem):
    equal = replace(problem, preferences=problem.preferences[:1] * problem.layers)
    assert slots_of(variant, equal) == slots_of(dict(allocation='uniform'), equal)


@attention_based
def test_preferences_at_the_ends_of_the_number_range_give_finite_weights(variant):
    extremes = [Preference(0.0, 0.0), Preference(1e300, 1e-300), Preference(5e-324, 1e308)]
    weights = config_of(variant, ratio=1.0).allocator().weights(3, extremes)
    assert all(weight > 0 for weight in weights)
    assert sum(apportion(weights, 29, [17, 19, 23])) == 29


# --- figures by hand ---


def test_webster_by_hand():
    # claims 6/.5 6/1.5 6/2.5 6/3.5 6/4.5 .. and 2/.5 2/1.5: 12, 4 (tie: lower layer first), 4, 2.4, ...
    assert [apportion([6, 2], total, [9, 9]) for total in range(5)] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, 1),
        (3, 1),
    ]


def test_minimum_comes_first_and_in_rounds():
    assert apportion([100, 1, 1], 4, [9, 9, 9], minimum=2) == (2, 1, 1)
    assert apportion([100, 1, 1], 7, [9, 9, 1], minimum=2) == (4, 2, 1)


def test_pyramid_is_twenty_to_one():
    first, *_, last = config_of(dict(allocation='pyramid'), ratio=1.0).allocator().weights(5, ())
    assert first / last == 20


def test_whole_steps_are_handed_out():
    slots = allocate([3, 2, 1], 40, [29, 29, 29], window=4, sinks=2, minimum=1, step=2)
    # 22 evictable slots are 11 pairs; 5.5 : 3.7 : 1.8
    assert slots == (6 + 10, 6 + 8, 6 + 4)
    assert allocate([3, 2, 1], 87, [29, 29, 29], window=4, sinks=2, step=2) == (29, 29, 29)


def test_a_mix_with_uniform_does_not_cascade():
    # a large deep preference moves the mean, and with it the small layer's share, by more than its own cap
    preferences = [Preference(1.0, 1.0), Preference(9.0, 1.0), Preference(900.0, 1.0)]
    allocation = config_of(dict(allocation='attention_based', alpha=0.75), ratio=1.0).allocator()
    assert not allocation.cascades
    before = apportion(allocation.weights(3, preferences[:2]), 40, [30, 30])
    after = apportion(allocation.weights(3, preferences), 40, [30, 30, 5])
    assert after[0] > before[0]


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        (([], 5, []), 'one cap for each weight, got 0 weights and 0 caps'),
        (([1, 2], 5, [3]), 'one cap for each weight, got 2 weights and 1 caps'),
        (([1, 0], 5, [3, 3]), r'weights must be finite numbers greater than 0, got \[1, 0\]'),
        (([1, float('nan')], 5, [3, 3]), 'weights must be finite'),
        (([1, float('inf')], 5, [3, 3]), 'weights must be finite'),
        (([1, 2], -1, [3, 3]), 'must not be negative, got -1, 0 and'),
        (([1, 2], 5, [3, -3]), 'must not be negative'),
        (([1, 2], 5, [3, 3], -2), 'must not be negative'),
    ],
)
def test_impossible_questions_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        apportion(*arguments)


# --- refused sizes ---


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (dict(total=1), 'expected a total of at least 12, got 1; raise the total or lower window or sinks'),
        (dict(total=11), 'at least 12, got 11'),
        (dict(total=-5), r'must not be negative and step must be at least 1, got total=-5'),
        (dict(window=-1, sinks=-2), r'got window=-1, sinks=-2'),
        (dict(contexts=[9, -9]), r'got contexts=-9'),
        (dict(step=0), 'got step=0'),
    ],
)
def test_impossible_sizes_are_refused(change, text):
    sizes = dict(weights=[3, 2], total=12, contexts=[9, 9], window=4, sinks=2)
    with pytest.raises(ValueError, match=text):
        allocate(**sizes | change)
    assert allocate(**sizes) == (6, 6)


@attention_based
@pytest.mark.parametrize('number', [float('nan'), float('inf'), float('-inf')])
def test_preferences_that_are_not_finite_are_refused(variant, number):
    config = config_of(variant, ratio=0.5, window=2)
    measured = [Preference(1.0, 2.0), Preference(3.0, number), Preference(number, 1.0)]
    with pytest.raises(ValueError, match=r'expected finite preferences, got NaN or inf for layers \[1, 2\]'):
        config.allocator().weights(3, measured)
    tracker = BudgetTracker(config, 3, 20, smoothing=0.5, hysteresis=0.0)
    tracker.observe([Preference(1.0, 2.0)] * 3)
    with pytest.raises(ValueError, match=r'layers \[1, 2\]'):
        tracker.observe(measured)
    assert tracker.preferences == (Preference(1.0, 2.0),) * 3
