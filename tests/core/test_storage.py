"""The tensor behind the pools: what goes in comes out, bounds hold, and a rejected call changes nothing."""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest
import torch

from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.storage import KVStorage

from .comparing import LAYOUT


def filled(slots: int = 11, layout: KVLayout = LAYOUT) -> tuple[KVStorage, torch.Tensor]:
    """A storage and what is in its slots."""
    storage = KVStorage(layout, slots)
    rows = torch.randn(layout.batch_shape(slots), dtype=layout.dtype)
    storage.store(range(slots), rows)
    return storage, rows


def test_memory_is_allocated_at_the_first_use():
    storage = KVStorage(LAYOUT, 11)
    assert storage.bytes == 0
    storage.allocate()
    assert storage.bytes == 11 * 1680


def test_rows_come_out_as_they_went_in():
    storage, rows = filled()
    order = [9, 0, 4, 9]
    assert torch.equal(storage.load(order), rows[order])
    assert torch.equal(storage.load(np.array(order)), rows[order])
    assert storage.load([]).shape == (0, *rows.shape[1:])


@pytest.mark.parametrize('newest', [0, 1, 4, 7])
def test_the_newest_columns_are_the_last_ones(newest):
    storage, rows = filled()
    assert torch.equal(storage.load([3, 8], newest=newest), rows[[3, 8], :, :, 7 - newest :])


def test_a_store_of_few_columns_leaves_the_columns_in_front():
    storage, rows = filled()
    newest = torch.randn(2, 6, 2, 3, 5)
    storage.store([3, 8], newest)
    assert torch.equal(storage.load([3, 8])[:, :, :, 4:], newest)
    assert torch.equal(storage.load([3, 8])[:, :, :, :4], rows[[3, 8], :, :, :4])
    others = [0, 1, 2, 4, 5, 6, 7, 9, 10]
    assert torch.equal(storage.load(others), rows[others])


def test_strided_rows_are_stored_and_strided_buffers_filled():
    storage, _ = filled()
    buffer = torch.randn(2, 6, 2, 9, 5)
    storage.store([5, 2], buffer[:, :, :, 1:6])
    target = torch.full((2, 6, 2, 8, 5), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch warns when it replaces the memory of an out of another shape
        given = target[:, :, :, :5]
        returned = storage.load([2, 5], newest=5, out=given)
    assert returned.data_ptr() == target.data_ptr()
    assert torch.equal(target[:, :, :, :5], buffer[[1, 0], :, :, 1:6])
    assert bool((target[:, :, :, 5:] == 0.5).all())


def test_what_is_loaded_is_the_callers_own():
    storage, rows = filled()
    storage.load([1, 2]).zero_()
    rows_given = torch.randn(LAYOUT.batch_shape(1))
    storage.store([1], rows_given)
    kept = rows_given.clone()
    rows_given.zero_()
    assert torch.equal(storage.load([1, 2]), torch.cat([kept, rows[2:3]]))


def test_no_gradient_flows_into_the_slab():
    storage = KVStorage(LAYOUT, 11)
    weight = torch.randn(2, 6, 2, 7, 5, requires_grad=True)
    storage.store([3, 8], weight * 2)
    storage.store([4, 9], weight)
    assert not storage.load([3, 8]).requires_grad
    out = torch.zeros(2, 6, 2, 7, 5)
    storage.load([3, 8], out=out)
    assert not out.requires_grad


def test_inference_mode_outside_and_inside():
    with torch.inference_mode():
        storage, rows = filled()
    other = torch.randn(1, 6, 2, 7, 5)
    storage.store([4], other)
    with torch.inference_mode():
        storage.resize(12)
        storage.store([11], torch.zeros(1, 6, 2, 7, 5))
    storage.store([11], other)
    assert torch.equal(storage.load([4, 11, 5]), torch.cat([other, other, rows[5:6]]))


def test_unused_columns_are_finite():
    storage = KVStorage(LAYOUT, 11)
    storage.store([3], torch.randn(1, 6, 2, 2, 5))
    assert bool(torch.isfinite(storage.load(range(11))).all())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    storage, rows = filled(layout=KVLayout(3, 2, 5, 7, dtype=dtype))
    assert torch.equal(storage.load([3, 8], newest=4), rows[[3, 8], :, :, 3:])


REJECTED = {
    'slot too large': (ValueError, r'slots must be in \[0, 11\)', lambda s, x: s.store([3, 11], x)),
    'slot of a miss': (ValueError, 'a negative one means a miss', lambda s, x: s.store([3, -1], x)),
    'slots of a load': (ValueError, r'slots must be in \[0, 11\)', lambda s, x: s.load([-1])),
    'slots in a table': (ValueError, 'flat sequence', lambda s, x: s.load([[1, 2]])),
    'slots with fractions': (TypeError, 'slots must be integers', lambda s, x: s.load([1.5])),
    'fewer slots than rows': (
        ValueError,
        r'rows must have the shape \[3, 6, 2, 7, 5\]',
        lambda s, x: s.store([1, 2, 3], x),
    ),
    'too many columns': (
        ValueError,
        'rows must have the shape',
        lambda s, x: s.store([1, 2], torch.cat([x, x], 3)),
    ),
    'newest out of range': (ValueError, r'newest must be in \[0, 7\]', lambda s, x: s.load([1], newest=8)),
    'another dtype': (TypeError, 'write .to', lambda s, x: s.store([1, 2], x.double())),
    'another device': (ValueError, 'move it with', lambda s, x: s.store([1, 2], x.to('meta'))),
    'out of another shape': (ValueError, 'out must have', lambda s, x: s.load([1, 2], newest=4, out=x)),
    'out of another dtype': (TypeError, 'out must be', lambda s, x: s.load([1, 2], out=x.double())),
}


@pytest.mark.parametrize('name', REJECTED)
def test_a_rejected_call_changes_nothing(name):
    error, text, call = REJECTED[name]
    storage, rows = filled()
    with pytest.raises(error, match=text):
        call(storage, torch.randn(2, 6, 2, 7, 5))
    assert torch.equal(storage.load(range(11)), rows)


def test_resize_keeps_the_first_slots():
    storage, rows = filled()
    storage.lengths[:] = range(11)
    storage.next_positions[:] = range(20, 31)
    storage.resize(13)
    assert (storage.slots, storage.bytes) == (13, 13 * 1680)
    assert torch.equal(storage.load(range(11)), rows)
    assert storage.lengths.tolist() == [*range(11), 0, 0]
    assert storage.next_positions.tolist() == [*range(20, 31), 0, 0]
    storage.resize(5)
    assert torch.equal(storage.load(range(5)), rows[:5])
    assert storage.lengths.tolist() == [*range(5)]
    storage.resize(12, keep=2)
    assert torch.equal(storage.load([0, 1]), rows[:2])
    assert storage.lengths.tolist() == [0, 1, *[0] * 10]


def test_resize_before_the_first_use_allocates_nothing():
    storage = KVStorage(LAYOUT, 11)
    storage.resize(13)
    assert (storage.slots, storage.bytes) == (13, 0)


class CountingStorage(KVStorage):
    """A storage that knows how many bytes of its tensors lived at most at one time."""

    live = most = 0

    def _new(self, slots: int) -> torch.Tensor:
        tensor = super()._new(slots)
        size = tensor.untyped_storage().nbytes()
        CountingStorage.live += size
        CountingStorage.most = max(CountingStorage.most, CountingStorage.live)
        weakref.finalize(tensor, CountingStorage._freed, size)
        return tensor

    @staticmethod
    def _freed(size: int) -> None:
        CountingStorage.live -= size


@pytest.mark.parametrize('keep', [0, 2])
def test_the_old_tensor_is_freed_before_the_new_one_is_allocated(keep):
    CountingStorage.live = CountingStorage.most = 0
    storage = CountingStorage(LAYOUT, 11)
    rows = torch.randn(2, 6, 2, 7, 5)
    storage.store([0, 1], rows)
    storage.resize(13, keep=keep)
    assert CountingStorage.most == 13 * 1680
    assert torch.equal(storage.load([0, 1]), rows if keep else torch.zeros_like(rows))


def test_views_of_the_old_tensor_are_dropped_before_the_new_one_is_allocated():
    CountingStorage.live = CountingStorage.most = 0
    storage = CountingStorage(LAYOUT, 11)
    storage.views['the first two'] = storage.tensor[:2]
    storage.resize(11)
    assert list(storage.views) == ['the first two'], 'the tensor is the same'
    storage.resize(13, keep=2)
    assert (CountingStorage.most, storage.views) == (13 * 1680, {})


def test_missing_memory_is_reported_and_the_kept_slots_survive():
    storage, rows = filled()
    wanted = 2**50
    with pytest.raises(
        RuntimeError, match=f'{wanted * 1680:,} bytes wanted on cpu, [0-9,]+ bytes available; lower kv_cache'
    ):
        storage.resize(wanted, keep=3)
    assert (storage.slots, storage.bytes) == (11, 11 * 1680)
    assert torch.equal(storage.load([0, 1, 2]), rows[:3])


def test_more_than_there_is_memory_is_refused_before_any_is_taken():
    with pytest.raises(RuntimeError, match='lower kv_cache'):
        KVStorage(LAYOUT, 2**50)
    storage = KVStorage(LAYOUT, 11)
    with pytest.raises(RuntimeError, match='lower kv_cache'):
        storage.resize(2**50)
    assert (storage.slots, storage.bytes, len(storage.lengths)) == (11, 0, 11)


@pytest.mark.parametrize(('slots', 'keep'), [(0, None), (5, 6), (13, 12), (13, -1)])
def test_impossible_sizes_are_refused(slots, keep):
    storage, rows = filled()
    with pytest.raises(ValueError, match='must be'):
        storage.resize(slots, keep=keep)
    assert torch.equal(storage.load(range(11)), rows)


def test_the_scratch_row_is_behind_the_slots_and_no_slot():
    storage = KVStorage(LAYOUT, 11, scratch=True)
    rows = torch.randn(LAYOUT.batch_shape(11), dtype=LAYOUT.dtype)
    storage.store(range(11), rows)
    assert storage.tensor.shape == LAYOUT.batch_shape(12) and storage.bytes == 12 * 1680
    assert torch.equal(storage.tensor[:11], rows) and not storage.tensor[11].any()
    with pytest.raises(ValueError, match=r'slots must be in \[0, 11\), got \[11\]'):
        storage.load([11])
    storage.tensor[11] = 1.0
    storage.resize(14, keep=3)
    assert storage.tensor.shape == LAYOUT.batch_shape(15)
    assert torch.equal(storage.tensor[:3], rows[:3]) and not storage.tensor[3:].any()
