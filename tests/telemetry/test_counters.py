"""Counts add up and split at any moment."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lzero_kv.telemetry.counters import KINDS, Cause, Counters, Fault, Movement, ValidationCounters

from ..validation.drawn import AMOUNTS, counts, several_counters, validation_counters


@settings(max_examples=40)
@given(st.lists(AMOUNTS, max_size=9))
def test_movement_is_the_mean_and_the_largest(amounts: list[float]) -> None:
    movement = Movement()
    for amount in amounts:
        movement.add(amount)
    assert movement.count == len(amounts)
    assert movement.largest == max(amounts, default=0.0)
    assert movement.mean == pytest.approx(sum(amounts) / len(amounts) if amounts else 0.0)


@settings(max_examples=40)
@given(several_counters())
def test_every_row_has_one_verdict(counters: Counters) -> None:
    assert (
        counters.compared == counters.equal + counters.different + counters.unexplained + counters.cache_wrong
    )
    assert counters.failures == counters.unexplained + counters.cache_wrong
    assert sum(counters.faults.values()) == counters.cache_wrong
    assert sum(counters.causes.values()) >= counters.different


@settings(max_examples=40)
@given(several_counters(), several_counters())
def test_a_sum_counts_both(left: Counters, right: Counters) -> None:
    total = left + right
    for name in ('compared', 'equal', 'different', 'unexplained', 'cache_wrong'):
        assert getattr(total, name) == getattr(left, name) + getattr(right, name)
    assert all(total.causes[cause] == left.causes[cause] + right.causes[cause] for cause in Cause)
    assert all(total.faults[fault] == left.faults[fault] + right.faults[fault] for fault in Fault)
    assert total.largest_stock == max(left.largest_stock, right.largest_stock)
    assert total.policy.count == left.policy.count + right.policy.count


# the first draw imports what it draws from, which a busy machine does slowly
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(validation_counters(), validation_counters())
def test_what_came_since_a_snapshot_is_what_was_added(
    earlier: ValidationCounters, added: ValidationCounters
) -> None:
    since = (earlier + added).since(earlier.snapshot())
    assert (since.searches, since.validated) == (added.searches, added.validated)
    for kind in KINDS:
        found, expected = getattr(since, kind), getattr(added, kind)
        assert counts(found) == counts(expected)
        assert found.value.count == expected.value.count
        assert found.value.total == pytest.approx(expected.value.total, abs=1e-6)
        assert found.largest_cache == max(getattr(earlier, kind).largest_cache, expected.largest_cache)


@settings(max_examples=40)
@given(validation_counters())
def test_a_snapshot_stays(counters: ValidationCounters) -> None:
    snapshot = counters.snapshot()
    before = counters.snapshot()
    counters.nodes.count_different([Cause.CRASHED])
    counters.roots.policy.add(1.0)
    assert snapshot == before != counters


@settings(max_examples=40)
@given(validation_counters())
def test_the_total_is_that_of_all_kinds(counters: ValidationCounters) -> None:
    assert counters.total.compared == sum(getattr(counters, kind).compared for kind in KINDS)


def test_every_cause_and_fault_has_a_sentence_of_its_own() -> None:
    for names in (Cause, Fault):
        sentences = [name.sentence for name in names]
        assert all(sentences)
        assert len(set(sentences)) == len(names)
