"""Where keys and values lie in a row, and the names and digests of histories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lzero_kv.cache.keys import NodeKey, RootKey, digest_rows
from lzero_kv.cache.layout import KVLayout

from .comparing import LAYOUT


def test_sizes():
    assert (LAYOUT.embed_dim, LAYOUT.row_elements, LAYOUT.row_bytes) == (10, 420, 1680)
    assert LAYOUT.batch_shape(11) == (11, 6, 2, 7, 5)
    assert LAYOUT.batch_shape(11, newest=4) == (11, 6, 2, 4, 5)
    for newest in (-1, 8):
        with pytest.raises(ValueError, match=rf'newest must be in \[0, 7\], .* got {newest}'):
            LAYOUT.batch_shape(11, newest=newest)


def test_sizes_may_be_numpy_integers_and_devices_strings():
    layout = KVLayout(np.int64(3), 2, 5, np.int64(7), device='cpu')  # type: ignore[arg-type]
    assert layout == LAYOUT
    assert hash(layout) == hash(LAYOUT)
    assert dataclasses.replace(layout, dtype=torch.bfloat16).row_bytes == 840


@pytest.mark.parametrize(
    ('change', 'error', 'text'),
    [
        ({'layers': 0}, ValueError, 'layers must be at least 1, got 0'),
        ({'heads': 2.5}, TypeError, 'heads must be an integer, got 2.5'),
        ({'head_dim': True}, TypeError, 'head_dim must be an integer, got True'),
        ({'tokens': 0}, ValueError, 'tokens must be at least 1, got 0'),
        ({'tokens': (7, 4, 9)}, TypeError, r'tokens must be an integer, got \(7, 4, 9\)'),
        ({'dtype': torch.int64}, TypeError, 'floating point'),
    ],
)
def test_impossible_layouts_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        dataclasses.replace(LAYOUT, **change)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool])
def test_a_digest_does_not_depend_on_the_batch(dtype):
    rows = torch.randn(8, 3, 5).mul(9).to(dtype)
    digests = digest_rows(rows)
    assert all(type(digest) is int and 0 <= digest < 2**64 for digest in digests)
    assert digest_rows(rows[:7]) == digests[:7]
    assert [digest_rows(rows[row : row + 1])[0] for row in range(8)] == digests


def test_digests_of_tensors_and_arrays_are_the_same():
    rows = torch.randn(4, 3, 5)
    assert digest_rows(rows) == digest_rows(rows.numpy())
    transposed = rows.permute(0, 2, 1)
    assert digest_rows(transposed) == digest_rows(transposed.contiguous()) == digest_rows(transposed.numpy())
    assert digest_rows(rows.requires_grad_()) == digest_rows(rows.detach())


def test_different_rows_have_different_digests():
    rows = torch.zeros(3, 4)
    rows[1, 2], rows[2, 3] = 1e-30, 1e-30
    assert len(set(digest_rows(rows))) == 3
    assert digest_rows(rows[:0]) == []
    assert digest_rows(np.zeros(4)) == digest_rows(np.zeros((4, 1)))


def test_digests_need_a_batch():
    with pytest.raises(ValueError, match='batch dimension'):
        digest_rows(torch.tensor(1.0))
    with pytest.raises(TypeError, match='got list'):
        digest_rows([1.0])  # type: ignore[arg-type]


def test_keys_of_different_histories_differ():
    assert len({NodeKey(1, 2), NodeKey(2, 1), RootKey(1, 3), RootKey(3, 1)}) == 4
