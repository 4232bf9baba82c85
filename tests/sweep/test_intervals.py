"""Intervals over documents against numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from lzero_kv.sweep.intervals import difference, mean, quotient


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(5).normal(3, 2, size=400)
    estimate = mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)
    assert mean(values) == estimate


def test_a_quotient_is_that_of_the_means():
    estimate = quotient([0.5, 0.0, 1.0], [1.0, 0.25, 1.0])
    assert estimate.value == pytest.approx(1.5 / 2.25)
    assert 0 <= estimate.low < estimate.value < estimate.high <= 1


def test_a_method_that_equals_the_control_has_no_interval():
    scores = [0.2, 0.9, 0.4, 0.0]
    assert quotient(scores, scores) == (1.0, 1.0, 1.0)


def test_documents_are_drawn_together():
    # the documents differ by 5, the methods by .1 on each: only a paired interval tells them apart
    first, second = [0.1, 5.1, 10.1], [0.0, 5.0, 10.0]
    found = difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert found.high - found.low < 1e-12


def test_a_function_of_an_estimate_is_taken_of_its_ends_too():
    found = mean([1.0, 2.0, 6.0])
    assert found.map(lambda number: 2 * number) == (2 * found.value, 2 * found.low, 2 * found.high)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match='the control is 0 on all documents'):
        quotient([0.0, 0.5], [0.0, 0.0])
    with pytest.raises(ValueError, match=r'one value for each document, at least one, got \[0\]'):
        mean([])
    with pytest.raises(ValueError, match=r'got \[2, 3\] values'):
        difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r'finite values, got \[nan\]'):
        mean([0.5, float('nan')])
