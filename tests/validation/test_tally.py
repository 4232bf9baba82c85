"""Counts add up, split at any moment, and survive JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lzero_kv.validation.causes import Cause, Fault
from lzero_kv.validation.tally import KINDS, Movement, Tally, ValidationTally

from .drawn import AMOUNTS, counters, tallies, validation_tallies


@given(st.lists(AMOUNTS, max_size=9))
def test_movement_is_the_mean_and_the_largest(amounts: list[float]) -> None:
    movement = Movement()
    for amount in amounts:
        movement.add(amount)
    assert movement.count == len(amounts)
    assert movement.largest == max(amounts, default=0.0)
    assert movement.mean == pytest.approx(sum(amounts) / len(amounts) if amounts else 0.0)


@given(tallies())
def test_every_row_has_one_verdict(tally: Tally) -> None:
    assert tally.compared == tally.equal + tally.different + tally.unexplained + tally.manager_off
    assert tally.failures == tally.unexplained + tally.manager_off
    assert sum(tally.faults.values()) == tally.manager_off
    assert sum(tally.causes.values()) >= tally.different


@given(tallies(), tallies())
def test_a_sum_counts_both(left: Tally, right: Tally) -> None:
    total = left + right
    for name in ('compared', 'equal', 'different', 'unexplained', 'manager_off'):
        assert getattr(total, name) == getattr(left, name) + getattr(right, name)
    assert all(total.causes[cause] == left.causes[cause] + right.causes[cause] for cause in Cause)
    assert all(total.faults[fault] == left.faults[fault] + right.faults[fault] for fault in Fault)
    assert total.largest_host == max(left.largest_host, right.largest_host)
    assert total.policy.count == left.policy.count + right.policy.count


@given(validation_tallies(), validation_tallies())
def test_what_came_since_a_snapshot_is_what_was_added(
    earlier: ValidationTally, added: ValidationTally
) -> None:
    since = (earlier + added).since(earlier.snapshot())
    assert (since.searches, since.validated) == (added.searches, added.validated)
    for kind in KINDS:
        found, expected = getattr(since, kind), getattr(added, kind)
        assert counters(found) == counters(expected)
        assert found.value.count == expected.value.count
        assert found.value.total == pytest.approx(expected.value.total, abs=1e-6)
        assert found.largest_manager == max(getattr(earlier, kind).largest_manager, expected.largest_manager)


@given(validation_tallies())
def test_json_gives_the_same_tally(tally: ValidationTally) -> None:
    assert ValidationTally.from_dict(json.loads(json.dumps(tally.as_dict()))) == tally


@given(validation_tallies())
def test_a_snapshot_stays(tally: ValidationTally) -> None:
    snapshot = tally.snapshot()
    before = snapshot.as_dict()
    tally.nodes.count_different([Cause.CRASHED])
    tally.roots.policy.add(1.0)
    assert snapshot.as_dict() == before != tally.as_dict()


@given(validation_tallies())
def test_the_total_is_that_of_all_kinds(tally: ValidationTally) -> None:
    assert tally.total.compared == sum(getattr(tally, kind).compared for kind in KINDS)


def test_every_cause_and_fault_has_a_sentence_of_its_own() -> None:
    for names in (Cause, Fault):
        sentences = [name.sentence for name in names]
        assert all(sentences)
        assert len(set(sentences)) == len(names)
