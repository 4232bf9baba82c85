"""Where keys and values lie in a row, and the names and digests of histories."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lzero_kv.cache.keys import LatentKey, NodeKey, RootKey, digest_rows
from lzero_kv.cache.layout import KVLayout

from .comparing import RAGGED, UNIFORM


def test_sizes_of_a_uniform_layout():
    assert (UNIFORM.layer_tokens, UNIFORM.tokens) == ((7, 7, 7), (7, 7, 7))
    assert UNIFORM.uniform
    assert (UNIFORM.embed_dim, UNIFORM.row_elements, UNIFORM.row_bytes) == (10, 420, 1680)
    assert UNIFORM.batch_shape(11) == (11, 6, 7, 10)
    assert UNIFORM.batch_shape(11, newest=4) == (11, 6, 4, 10)


def test_sizes_of_an_uneven_layout():
    assert not RAGGED.uniform
    assert (RAGGED.max_tokens, RAGGED.row_elements) == (9, 2 * 10 * (7 + 4 + 9))
    assert RAGGED.batch_shape(11) == (11, 400)
    with pytest.raises(ValueError, match='leave newest out'):
        RAGGED.batch_shape(11, newest=4)


@pytest.mark.parametrize('layout', [UNIFORM, RAGGED])
def test_a_row_is_keys_then_values_layer_after_layer_token_by_token(layout):
    rows = torch.arange(2 * layout.row_elements).view(2, layout.row_elements)
    position = 0
    for layer, tokens in enumerate(layout.layer_tokens):
        for block in (layout.keys(rows, layer), layout.values(rows, layer)):
            assert block.shape == (2, tokens, 2, 5)
            expected = torch.arange(position, position + tokens * 10)
            assert torch.equal(block[0].reshape(-1), expected)
            assert torch.equal(block[1].reshape(-1), expected + layout.row_elements)
            position += tokens * 10
    assert position == layout.row_elements


def test_both_forms_of_a_uniform_batch_give_the_same_views():
    rows = torch.randn(4, UNIFORM.row_elements)
    for layer in range(3):
        assert torch.equal(UNIFORM.keys(rows, layer), UNIFORM.keys(rows.view(4, 6, 7, 10), layer))
        assert torch.equal(UNIFORM.values(rows, layer), UNIFORM.values(rows.view(4, 6, 7, 10), layer))


def test_blocks_are_views():
    rows = torch.zeros(1, RAGGED.row_elements)
    RAGGED.values(rows, 2)[0, -1, 1, 4] = 7.0
    assert rows[0, -1] == 7.0


def test_sizes_may_be_numpy_integers_and_devices_strings():
    layout = KVLayout(np.int64(3), 2, 5, [7, 4, 9], device='cpu')  # type: ignore[arg-type]
    assert layout == RAGGED
    assert hash(layout) == hash(RAGGED)
    assert dataclasses.replace(layout, dtype=torch.bfloat16).row_bytes == 800


@pytest.mark.parametrize(
    ('change', 'error', 'text'),
    [
        ({'layers': 0}, ValueError, 'layers must be at least 1, got 0'),
        ({'heads': 2.5}, TypeError, 'heads must be an integer, got 2.5'),
        ({'head_dim': True}, TypeError, 'head_dim must be an integer, got True'),
        ({'tokens': (7, 4)}, ValueError, 'one for each of the 3 layers'),
        ({'tokens': (7, 4, 0)}, ValueError, r'tokens\[2\] must be at least 1'),
        ({'dtype': torch.int64}, TypeError, 'floating point'),
    ],
)
def test_impossible_layouts_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        dataclasses.replace(UNIFORM, **change)


def test_rows_of_another_shape_and_unknown_layers_are_refused():
    with pytest.raises(ValueError, match=r'rows must be \[B, 420\]'):
        UNIFORM.keys(torch.zeros(4, 421), 0)
    with pytest.raises(ValueError, match=r'layer must be in \[0, 3\), got 3'):
        UNIFORM.keys(torch.zeros(4, 420), 3)


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


def test_names_of_nodes_of_both_kinds_differ():
    assert NodeKey(1, 2) != LatentKey(1, 2)
    assert len({NodeKey(1, 2), LatentKey(1, 2), RootKey(1, 3), RootKey(3, 1)}) == 4
