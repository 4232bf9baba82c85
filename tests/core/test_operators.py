"""How many operators the cache dispatches: the same few for any number of layers and rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lzero_kv.cache.keys import NodeKey, RootKey
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.config import KVCacheConfig

from .comparing import Histories


class Operators(TorchDispatchMode):
    """Notes the names of the operators dispatched that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:
            self.views += 1
        else:
            self.names.append(str(func).removeprefix('aten.'))
        return func(*args, **(kwargs or {}))


def operators(action: Callable[[], object], most_views: int = 2) -> list[str]:
    """Operators other than views that an action dispatches, in order."""
    with Operators() as noted:
        action()
    assert noted.views <= most_views
    return noted.names


def keys_of(rows: int) -> list[RootKey | NodeKey]:
    """Roots and nodes in turn."""
    return [RootKey(row, 3) if row % 2 else NodeKey(row, 5) for row in range(rows)]


def manager_of(layers: int, rows: int) -> KVCacheManager:
    """A manager whose first store is done: memory is allocated once and for all."""
    layout = KVLayout(layers, heads=3, head_dim=5, tokens=7)
    made = KVCacheManager({}, rows, layout=layout, cache_config=KVCacheConfig(), num_simulations=11)
    made.begin_search(rows, rows, upfront=True)
    made.storage.allocate()
    return made


@pytest.mark.parametrize('rows', [1, 9, 34])
@pytest.mark.parametrize('layers', [2, 4, 8])
def test_a_batch_is_one_operator_in_and_one_out(layers, rows):
    made, keys = manager_of(layers, rows), keys_of(rows)
    lengths = [1 + row % 6 for row in range(rows)]
    kv = torch.randn(rows, 2 * layers, 3, 8, 5)[:, :, :, 1:7]
    buffer = torch.zeros(rows, 2 * layers, 3, 10, 5)
    assert operators(lambda: made.store(keys, kv, lengths, lengths)) == ['index_copy_.default']
    slots = made.lookup(keys)
    assert operators(lambda: made.lookup(keys), most_views=0) == []
    assert operators(lambda: made.load(slots)) == ['index_select.default']
    assert operators(lambda: made.load(slots, newest=6)) == ['index_select.default']
    into = buffer[:, :, :, 2:8]
    assert operators(lambda: made.load(slots, newest=6, out=into)) == ['index_select.out']
    assert torch.equal(into, kv)
    rest = operators(
        lambda: (made.lengths(slots), made.next_positions(slots), made.clear_all()), most_views=0
    )
    assert rest == []


@pytest.mark.parametrize('policy', ['fifo', 'lru', 'lfu', 'priority'])
def test_bookkeeping_dispatches_no_operator(policy):
    pool = KVCachePool(4, policy, layout=KVLayout(2, 3, 5, 7))

    def every_operation() -> None:
        for key in range(9):
            pool.reserve([key])
            pool.lookup([key, key - 1])
        pool.set_priorities([8], [3])
        pool.discard([7, 8])
        pool.clear()
        pool.resize(6)
        pool.describe()

    assert operators(every_operation, most_views=0) == []


def test_a_single_history_takes_the_same_operators_whatever_the_layers():
    counts = []
    for layers in (2, 4, 8):
        layout = KVLayout(layers, heads=3, head_dim=5, tokens=7)
        pool = KVCachePool(6, layout=layout)
        entry = Histories(layout, 0).entry(4)
        pool.set('a', entry)
        put = operators(lambda pool=pool, entry=entry: pool.set('a', entry), most_views=100)
        counts.append((put, operators(lambda pool=pool: pool.get('a'), most_views=100)))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0][1] == ['index_select.default', 'zeros.default', 'copy_.default']
