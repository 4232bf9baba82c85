"""The measure agrees with torch.allclose, and with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lzero_kv.validation.tolerance import MISMATCH, Deviation, Tolerance

NUMBERS = st.floats(-8, 8, width=32) | st.just(0.0)
PAIRS = st.lists(st.tuples(NUMBERS, st.sampled_from([0.0, 1e-6, -1e-3, 0.5])), min_size=1, max_size=7)


@given(PAIRS, st.sampled_from([0.0, 1e-6, 2e-3]), st.sampled_from([0.0, 1e-5, 0.1]))
def test_within_is_allclose(pairs: list[tuple[float, float]], atol: float, rtol: float) -> None:
    b = torch.tensor([number for number, _ in pairs], dtype=torch.float64)
    a = b + torch.tensor([shift for _, shift in pairs], dtype=torch.float64)
    assert Tolerance(atol, rtol).close(a, b) == torch.allclose(a, b, atol=atol, rtol=rtol)


def test_largest_mean_layer_and_excess() -> None:
    b = torch.zeros(6, 2, 5)  # three layers
    a = b.clone()
    a[1, 0, 3], a[5, 1, 2] = 0.25, -0.75  # values of layer 0 and of layer 2
    deviation = Tolerance(atol=0.5).deviation(a, b, kv=True)
    assert deviation == Deviation(0.75, 1.0 / 60, 2, 1.5)
    assert not deviation.within
    assert Tolerance(atol=0.75).deviation(a, b).within


def test_equality_is_the_default() -> None:
    a = torch.tensor([1.0, 2.0])
    assert Tolerance().close(a, a.clone())
    assert not Tolerance().close(a, torch.nextafter(a, torch.tensor(9.0)))


@pytest.mark.parametrize(
    ('a', 'b'),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (None, torch.zeros(2)),
        (torch.zeros(2), None),
        (torch.tensor([0.0, float('nan')]), torch.zeros(2)),
        (torch.tensor([0.0, float('inf')]), torch.tensor([0.0, float('inf')])),
    ],
)
def test_what_cannot_be_compared_is_no_match(a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    assert Tolerance(9.0, 9.0).deviation(a, b) == MISMATCH
    assert not MISMATCH.within


def test_nothing_on_both_sides_is_equal() -> None:
    assert Tolerance().close(None, None)
    assert Tolerance().close(torch.zeros(0, 3), torch.zeros(0, 3))
