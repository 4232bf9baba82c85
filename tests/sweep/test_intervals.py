"""Intervals over documents against numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from lzero_kv.sweep.intervals import Bootstrap, Estimate


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(5).normal(3, 2, size=400)
    estimate = Bootstrap(resamples=4000).mean(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)
    narrow = Bootstrap(resamples=4000, level=0.5).mean(values)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.674 * half / 1.96, abs=0.03)


def test_a_relative_score_is_the_quotient_of_the_means():
    estimate = Bootstrap().relative_score([0.5, 0.0, 1.0], [1.0, 0.25, 1.0])
    assert estimate.value == pytest.approx(100 * 1.5 / 2.25)
    assert 0 <= estimate.low < estimate.value < estimate.high <= 100


def test_a_method_that_equals_the_control_has_no_interval():
    scores = [0.2, 0.9, 0.4, 0.0]
    assert Bootstrap().relative_score(scores, scores) == Estimate(100.0, 100.0, 100.0)


def test_documents_are_drawn_together():
    # the documents differ by 5, the methods by .1 on each: only a paired interval tells them apart
    first, second = [0.1, 5.1, 10.1], [0.0, 5.0, 10.0]
    difference = Bootstrap().difference(first, second)
    assert difference.value == pytest.approx(0.1)
    assert difference.high - difference.low < 1e-12


def test_a_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(6).uniform(size=23)
    assert Bootstrap(seed=4).mean(values) == Bootstrap(seed=4).mean(values)
    assert Bootstrap(seed=4).mean(values) != Bootstrap(seed=5).mean(values)


def test_what_cannot_be_estimated_is_refused():
    bootstrap = Bootstrap()
    with pytest.raises(ValueError, match='the full cache scores 0'):
        bootstrap.relative_score([0.0, 0.5], [0.0, 0.0])
    with pytest.raises(ValueError, match=r'one value for each document, at least one, got \[0\]'):
        bootstrap.mean([])
    with pytest.raises(ValueError, match=r'got \[2, 3\] values'):
        bootstrap.difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r'finite values, got \[nan\]'):
        bootstrap.mean([0.5, float('nan')])
