"""Single histories and the host's own KeysValues objects."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import numpy
import pytest
import torch

from lzero_kv.cache.entry import KVEntry, row_from_keys_values
from lzero_kv.cache.keys import NodeKey
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.pool import KVCachePool

from .comparing import LAYOUT, Histories, same, tensors_of

KeysValues = pytest.importorskip('lzero.model.unizero_world_models.kv_caching').KeysValues


def host_history(tokens: int, heads: int = 2, capacity: int = 7, layers: int = 3, rows: int = 1) -> Any:
    """A KeysValues of the host with random tokens and, behind them, the host's uninitialised memory (here
    NaN)."""
    history = KeysValues(rows, heads, capacity, heads * 5, layers, torch.device('cpu'))
    for layer in range(layers):
        for cache in (history[layer]._k_cache, history[layer]._v_cache):
            cache._cache.fill_(float('nan'))
        shape = (rows, heads, tokens, 5)
        history[layer].update(torch.randn(shape), torch.randn(shape))
    return history


def values_of(history: Any) -> list[torch.Tensor]:
    """The tokens of all layers' keys and values."""
    return [tensor for layer in range(len(history)) for tensor in history[layer].get()]


@pytest.mark.parametrize('tokens', [1, 4, 7])
@pytest.mark.parametrize('layout', [LAYOUT, None], ids=['layout given', 'layout of the first history'])
def test_a_history_of_the_host_goes_in_and_comes_out(tokens, layout):
    pool = KVCachePool(3, 'lru', layout=layout)
    history = host_history(tokens)
    assert pool.set(NodeKey(1, 2), history) == pool.peek(NodeKey(1, 2))
    entry = pool.get(NodeKey(1, 2))
    assert entry is not None
    assert (len(entry), entry.size, entry.next_position) == (3, tokens, tokens)
    assert same(values_of(entry), values_of(history))
    assert [entry[layer].shape for layer in range(3)] == [history[layer].shape for layer in range(3)]
    assert pool.storage.layout == LAYOUT


def test_one_sample_of_a_batch_is_stored_as_the_error_says():
    pool = KVCachePool(2, 'lru')
    batch = host_history(4, rows=3)
    with pytest.raises(ValueError, match='a history is one sample') as refused:
        pool.set('a', batch)
    names: dict[str, Any] = {'copy': copy, 'numpy': numpy, 'batch': batch, 'sample': 2}
    for statement in re.findall(r'one(?: =|\.).*?\)(?= and|,)', str(refused.value)):
        exec(statement, names)
    pool.set('a', names['one'])
    entry = pool.get('a')
    assert entry is not None
    assert same(values_of(entry), [tensor[2:] for tensor in values_of(batch)])


def test_an_entry_is_laid_out_as_the_host_does_with_zeros_behind():
    pool = KVCachePool(3, 'lru', layout=LAYOUT)
    pool.set('a', host_history(4))
    entry = pool.get('a')
    assert entry is not None
    for tensor in tensors_of(entry):
        assert tensor.shape == (1, 2, 7, 5)
        assert bool(tensor[:, :, :4].ne(0).all())
        assert bool(tensor[:, :, 4:].eq(0).all())
    assert entry[2]._k_cache._size == entry[2]._v_cache._size == 4


def test_the_host_can_copy_an_entry_into_its_own_object():
    pool = KVCachePool(3, 'lru', layout=LAYOUT)
    history = host_history(4)
    pool.set('a', history)
    entry = pool.get('a')
    assert entry is not None
    target = KeysValues(1, 2, 7, 10, 3, torch.device('cpu'))
    for layer in range(len(entry)):
        for name in ('_k_cache', '_v_cache'):
            source, destination = getattr(entry[layer], name), getattr(target[layer], name)
            destination._cache[:] = source._cache
            destination._size = source._size
    assert target.size == 4
    assert same(values_of(target), values_of(history))


def test_what_is_handed_out_is_private():
    pool = KVCachePool(2, 'fifo', layout=LAYOUT)
    made = Histories(LAYOUT, 0)
    pool.set('a', made.entry(5))
    entry, again = pool.get('a'), pool.get('a')
    assert entry is not None
    assert again is not None
    clone = entry.clone()
    for key in 'bcd':
        pool.set(key, made.entry(6))
    assert same(tensors_of(entry), tensors_of(clone))
    for tensor in tensors_of(clone):
        tensor.fill_(7.0)
    assert same(tensors_of(entry), tensors_of(again))
    assert (clone.size, clone.next_position) == (5, 8)


def test_a_history_larger_than_it_is_long_fits():
    pool = KVCachePool(2, 'fifo', layout=LAYOUT)
    history = host_history(7, capacity=20)
    pool.set('a', history)
    entry = pool.get('a')
    assert entry is not None
    assert same(values_of(entry), values_of(history))


def test_copies_of_the_hosts_objects():
    history = host_history(4)
    entry = KVEntry.from_row(LAYOUT, *row_from_keys_values(history, LAYOUT))
    kept = entry.clone()
    history[1]._v_cache._cache.zero_()
    assert same(tensors_of(entry), tensors_of(kept))


def not_finite() -> Any:
    history = host_history(4)
    history[2]._v_cache._cache[0, 1, 3, 4] = float('inf')
    return history


def uneven() -> Any:
    history = host_history(4)
    history[1]._v_cache._size = 3
    return history


def sizes_beyond_the_tensor() -> Any:
    history = host_history(4)
    for layer in range(3):
        history[layer]._k_cache._size = history[layer]._v_cache._size = 8
    return history


def of_another_dtype() -> Any:
    history = host_history(4)
    history[0]._k_cache._cache = history[0]._k_cache._cache.double()
    return history


REJECTED = {
    'too many layers': (ValueError, 'of 3 layers, got 4', lambda: host_history(4, layers=4)),
    'other heads': (
        ValueError,
        r'layer 0 keys: expected \[1, 2, tokens, 5\]',
        lambda: host_history(4, heads=3),
    ),
    'a batch': (ValueError, 'a history is one sample: copy one of a batch', lambda: host_history(4, rows=2)),
    'too many tokens': (
        ValueError,
        '8 tokens do not fit into a slot of 7; drop',
        lambda: host_history(8, capacity=8),
    ),
    'layers of different size': (ValueError, 'layer 1 values: expected 4 tokens', uneven),
    'a size beyond the tensor': (ValueError, 'expected 8 tokens of at most 7', sizes_beyond_the_tensor),
    'infinity': (ValueError, 'finite', not_finite),
    'another dtype': (TypeError, 'layer 0 keys: expected torch.float32, got torch.float64', of_another_dtype),
    'a number': (TypeError, 'KeysValues-like object', lambda: 5),
    'nothing': (TypeError, 'got NoneType', lambda: None),
    'a list': (TypeError, 'got list', list),
    'no layers': (TypeError, 'got KeysValues', lambda: KeysValues(1, 2, 7, 10, 0, torch.device('cpu'))),
}


@pytest.mark.parametrize('name', REJECTED)
def test_a_rejected_history_changes_nothing(name):
    error, text, make = REJECTED[name]
    pool = KVCachePool(1, 'lru', layout=LAYOUT)
    history = host_history(4)
    pool.set('a', history)
    before = pool.stats.snapshot()
    with pytest.raises(error, match=text):
        pool.set('b', make())
    assert pool.stats == before
    assert pool.keys() == ['a']
    entry = pool.get('a')
    assert entry is not None
    assert same(values_of(entry), values_of(history))


def test_a_pool_without_layout_stays_so_after_a_rejected_history():
    pool = KVCachePool(2)
    with pytest.raises(ValueError, match='finite'):
        pool.set('a', not_finite())
    assert pool.storage.known_layout is None
    assert (len(pool), pool.bytes) == (0, 0)
    pool.set('a', host_history(4, capacity=11))
    assert pool.storage.layout == KVLayout(3, 2, 5, 11)


def test_dtypes_of_the_layout():
    layout = dataclasses.replace(LAYOUT, dtype=torch.float64)
    pool = KVCachePool(2, layout=layout)
    with pytest.raises(TypeError, match=r'expected torch\.float64'):
        pool.set('a', host_history(4))
