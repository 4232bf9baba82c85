"""The search's own transform of logits to scalars against the host's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from lzero.policy import InverseScalarTransform

from lzero_kv.lightzero.inference.heads import expected_scalars

RTOL = {torch.float32: 2e-4, torch.float64: 1e-11}
"""The inverse subtracts 1 from a square root near 1 and divides by 0.002: it enlarges rounding."""


def logits(rows: int, support: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    value, reward = (5 * torch.randn(rows, 1, support, generator=generator, dtype=dtype) for _ in range(2))
    return value, reward


@given(
    st.integers(1, 19),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 999),
)
def test_scalars_are_the_hosts(rows: int, scale: int, dtype: torch.dtype, seed: int) -> None:
    transform = InverseScalarTransform(scale, 'cpu', True)
    parts = logits(rows, 2 * scale + 1, dtype, seed)
    kept = [part.clone() for part in parts]
    found = expected_scalars((transform, transform), parts)
    for part, before, scalars in zip(parts, kept, found, strict=True):
        expected = transform(part.squeeze(1).clone()).numpy().reshape(-1)
        assert scalars.shape == (rows,) and scalars.dtype == expected.dtype
        np.testing.assert_allclose(scalars, expected, rtol=RTOL[dtype], atol=RTOL[dtype])
        assert torch.equal(part, before), 'the caller keeps its logits'


def test_other_transforms_are_called_as_they_are() -> None:
    def largest(part: torch.Tensor) -> Any:
        return part.amax(dim=1, keepdim=True)

    def smallest(part: torch.Tensor) -> Any:
        return part.amin(dim=1, keepdim=True)

    parts = logits(7, 13, torch.float32, 0)
    for part, scalars in zip(parts, expected_scalars((largest, largest), parts), strict=True):
        assert np.array_equal(scalars, part.amax(dim=(1, 2)).numpy())
    assert np.array_equal(expected_scalars((largest, smallest), parts)[1], parts[1].amin(dim=(1, 2)).numpy())
