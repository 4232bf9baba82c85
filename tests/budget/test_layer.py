"""One layer's tokens against lists of tokens, and what imports and refusals leave behind."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from lzero_kv.budget import AttentionRecord, LayerCache

from .layer_driving import KV_HEADS, Pair, check_layer
from .methods import label

UNWANTED = (
    'lzero_kv.cache', 'lzero_kv.config', 'lzero_kv.lightzero', 'xxhash', 'lzero', 'ding', 'gymnasium',
    'transformers',
)  # fmt: skip
SELECTIONS = [
    dict(selection='h2o', rho=0.8),
    dict(selection='cake', gamma=7.0, kernel=3),
    dict(selection='streaming'),
]


@pytest.mark.parametrize('selection', SELECTIONS, ids=label)
@pytest.mark.parametrize(('groups', 'step'), [(KV_HEADS, 1), (1, 2)])
def test_a_layer_is_its_list_of_tokens(selection, groups, step):
    check_layer(selection, groups, step)


def test_the_newest_columns_stay_where_nothing_is_chosen():
    pair = Pair([3, 1], [4, 6], selection=SELECTIONS[0], groups=1, step=1)
    pair.fast.pad(11)
    pair.check()
    pair.fast.keep(pair.fast.newest(7))
    assert pair.fast.columns == 7
    pair.check()


def test_rows_are_put_where_the_memory_is():
    """A slice of a pool's row ``[B, 2, H, s, D]`` as a layer, and back."""
    rows = torch.randn(3, 2, KV_HEADS, 11, 5)
    positions, lengths = torch.arange(7).repeat(3, 1, 1), torch.full((3, 1), 7)
    part = rows[:, :, :, 4:]
    layer = LayerCache(part[:, 0], part[:, 1], positions, lengths, AttentionRecord(1, 4, 1.0, ()))
    before, other = rows.clone(), LayerCache(
        *torch.randn(2, 1, KV_HEADS, 7, 5), positions[:1] + 3, lengths[:1] - 2, AttentionRecord(1, 4, 1.0, ())
    )  # fmt: skip
    layer.put_rows(torch.tensor([1]), other)
    assert torch.equal(rows[1, :, :, 4:], torch.stack([other.keys[0], other.values[0]]))
    before[1, :, :, 4:] = rows[1, :, :, 4:]
    assert torch.equal(rows, before)
    assert layer.lengths.tolist() == [[7], [5], [7]]
    assert layer.bytes == 3 * (2 * KV_HEADS * 7 * 5 * 4 + 7 * 8 + 8)


def test_bytes_count_the_record():
    pair = Pair([3, 1, 4], [5, 7, 2], selection=SELECTIONS[0], groups=1, step=1)
    # keys and values, positions, accumulated attention and 4 queries of 6 heads; lengths and queries
    assert pair.fast.bytes == 8 * 3 * (7 * (2 * 2 * 5 + 1 + 1 + 4 * 6) + 2)


def test_rows_that_do_not_fit_are_refused():
    pair, other = (Pair([3, 1], [4, 6], selection=SELECTIONS[0], groups=1, step=1) for _ in range(2))
    rows = torch.tensor([0, 1])
    other.append(1)
    with pytest.raises(ValueError, match=r'keys must be \[2, 2, 6, 5\] of torch.float64, got \[2, 2, 7, 5\]'):
        pair.fast.put_rows(rows, other.fast)
    other.shrink(6)
    other.fast.record = AttentionRecord(1, 4, 1.0, ())
    with pytest.raises(ValueError, match=r'accumulated must be \[2, 1, 6\] of torch.float64, got None'):
        pair.fast.put_rows(rows, other.fast)
    pair.check()


def test_tokens_whose_attention_is_awaited_are_not_dropped():
    pair = Pair([3, 1], [4, 6], selection=SELECTIONS[1], groups=1, step=1)
    tokens = torch.zeros(2, KV_HEADS, 2, 5, dtype=torch.float64)
    pair.fast.append(tokens, tokens)
    with pytest.raises(RuntimeError, match='attention of the newest 2 tokens is awaited; call observe'):
        pair.fast.keep(pair.fast.newest(7))
    assert (pair.fast.columns, pair.fast.positions.shape[2], pair.fast.record.columns) == (8, 8, 6)


def test_a_budget_loads_nothing_that_a_language_model_has_not():
    code = f'import sys, lzero_kv.budget\nprint(*[name for name in {UNWANTED!r} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_single_tokens_are_appended_in_place_and_change_no_earlier_view() -> None:
    """Room behind the tokens is used up, then made anew; a copy of the layer goes its own way."""
    layer = LayerCache.of_prompt(
        *torch.randn(2, 3, 2, 7, 5), torch.full((3,), 7), AttentionRecord(1, 4, 1.0, ())
    )
    expected, places, views = [layer.keys, layer.values], set(), []
    for _ in range(40):
        new = torch.randn(2, 3, 2, 1, 5)
        expected = [torch.cat(pair, dim=2) for pair in zip(expected, new, strict=True)]
        layer.append(*new)
        other = copy.deepcopy(layer)
        other.append(*torch.randn(2, 3, 2, 1, 5))
        assert torch.equal(layer.keys, expected[0]) and torch.equal(layer.values, expected[1])
        assert torch.equal(other.keys[:, :, :-1], expected[0])
        places.add(layer.keys.data_ptr())
        views.append((layer.keys, expected[0]))
    assert len(places) == 3, 'memory is taken for 17 tokens at a time'
    assert all(torch.equal(*pair) for pair in views)
