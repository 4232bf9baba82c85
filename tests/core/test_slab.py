"""The tensor behind the pools: what goes in comes out, bounds hold, and a rejected call changes nothing."""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import pytest
import torch

from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.storage import KVSlab

from .comparing import RAGGED, UNIFORM


def filled(
    slots: int = 11, layout: KVLayout = UNIFORM, max_bytes: int | None = None
) -> tuple[KVSlab, torch.Tensor]:
    """A slab and what is in its slots."""
    slab = KVSlab(layout, slots, max_bytes)
    rows = torch.randn(layout.batch_shape(slots), dtype=layout.dtype)
    slab.store(range(slots), rows)
    return slab, rows


def test_memory_is_allocated_at_the_first_use():
    slab = KVSlab(UNIFORM, 11)
    assert slab.bytes == 0
    slab.allocate()
    assert slab.bytes == 11 * 1680


@pytest.mark.parametrize('layout', [UNIFORM, RAGGED], ids=['uniform', 'ragged'])
def test_rows_come_out_as_they_went_in(layout):
    slab, rows = filled(layout=layout)
    order = [9, 0, 4, 9]
    assert torch.equal(slab.load(order), rows[order])
    assert torch.equal(slab.load(np.array(order)), rows[order])
    assert slab.load([]).shape == (0, *rows.shape[1:])


@pytest.mark.parametrize('newest', [0, 1, 4, 7])
def test_the_newest_columns_are_the_last_ones(newest):
    slab, rows = filled()
    assert torch.equal(slab.load([3, 8], newest=newest), rows[[3, 8], :, 7 - newest :])


def test_a_store_of_few_columns_leaves_the_columns_in_front():
    slab, rows = filled()
    newest = torch.randn(2, 6, 3, 10)
    slab.store([3, 8], newest, newest=3)
    assert torch.equal(slab.load([3, 8])[:, :, 4:], newest)
    assert torch.equal(slab.load([3, 8])[:, :, :4], rows[[3, 8], :, :4])
    others = [0, 1, 2, 4, 5, 6, 7, 9, 10]
    assert torch.equal(slab.load(others), rows[others])


def test_strided_rows_are_stored_and_strided_buffers_filled():
    slab, _ = filled()
    buffer = torch.randn(2, 6, 9, 10)
    slab.store([5, 2], buffer[:, :, 1:6])
    target = torch.full((2, 6, 8, 10), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # torch warns when it replaces the memory of an out of another shape
        given = target[:, :, :5]
        returned = slab.load([2, 5], newest=5, out=given)
    assert returned.data_ptr() == target.data_ptr()
    assert torch.equal(target[:, :, :5], buffer[[1, 0], :, 1:6])
    assert bool((target[:, :, 5:] == 0.5).all())


@pytest.mark.parametrize('layout', [UNIFORM, RAGGED], ids=['uniform', 'ragged'])
def test_what_is_loaded_is_the_callers_own(layout):
    slab, rows = filled(layout=layout)
    slab.load([1, 2]).zero_()
    rows_given = torch.randn(layout.batch_shape(1))
    slab.store([1], rows_given)
    kept = rows_given.clone()
    rows_given.zero_()
    assert torch.equal(slab.load([1, 2]), torch.cat([kept, rows[2:3]]))


def test_no_gradient_flows_into_the_slab():
    slab = KVSlab(UNIFORM, 11)
    weight = torch.randn(2, 6, 7, 10, requires_grad=True)
    slab.store([3, 8], weight * 2)
    slab.store([4, 9], weight)
    assert not slab.load([3, 8]).requires_grad
    out = torch.zeros(2, 6, 7, 10)
    slab.load([3, 8], out=out)
    assert not out.requires_grad


def test_inference_mode_outside_and_inside():
    with torch.inference_mode():
        slab, rows = filled()
    other = torch.randn(1, 6, 7, 10)
    slab.store([4], other)
    with torch.inference_mode():
        slab.resize(12)
        slab.store([11], torch.zeros(1, 6, 7, 10))
    slab.store([11], other)
    assert torch.equal(slab.load([4, 11, 5]), torch.cat([other, other, rows[5:6]]))


def test_unused_columns_are_finite():
    slab = KVSlab(UNIFORM, 11)
    slab.store([3], torch.randn(1, 6, 2, 10))
    assert bool(torch.isfinite(slab.load(range(11))).all())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    slab, rows = filled(layout=KVLayout(3, 2, 5, 7, dtype=dtype))
    assert torch.equal(slab.load([3, 8], newest=4), rows[[3, 8], :, 3:])


REJECTED = {
    'slot too large': (ValueError, r'slots must be in \[0, 11\)', lambda s, x: s.store([3, 11], x)),
    'slot of a miss': (ValueError, 'a negative one means a miss', lambda s, x: s.store([3, -1], x)),
    'slots of a load': (ValueError, r'slots must be in \[0, 11\)', lambda s, x: s.load([-1])),
    'slots in a table': (ValueError, 'flat sequence', lambda s, x: s.load([[1, 2]])),
    'slots with fractions': (TypeError, 'slots must be integers', lambda s, x: s.load([1.5])),
    'fewer slots than rows': (
        ValueError,
        r'rows must have the shape \[3, 6, 7, 10\]',
        lambda s, x: s.store([1, 2, 3], x),
    ),
    'too many columns': (
        ValueError,
        'rows must have the shape',
        lambda s, x: s.store([1, 2], torch.cat([x, x], 2)),
    ),
    'another number of columns than said': (
        ValueError,
        r'\[2, 6, 4, 10\]',
        lambda s, x: s.store([1, 2], x, newest=4),
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
    slab, rows = filled()
    with pytest.raises(error, match=text):
        call(slab, torch.randn(2, 6, 7, 10))
    assert torch.equal(slab.load(range(11)), rows)


def test_resize_keeps_the_first_slots():
    slab, rows = filled()
    slab.lengths[:] = range(11)
    slab.next_positions[:] = range(20, 31)
    slab.resize(13)
    assert (slab.slots, slab.bytes) == (13, 13 * 1680)
    assert torch.equal(slab.load(range(11)), rows)
    assert slab.lengths.tolist() == [*range(11), 0, 0]
    assert slab.next_positions.tolist() == [*range(20, 31), 0, 0]
    slab.resize(5)
    assert torch.equal(slab.load(range(5)), rows[:5])
    assert slab.lengths.tolist() == [*range(5)]
    slab.resize(12, keep=2)
    assert torch.equal(slab.load([0, 1]), rows[:2])
    assert slab.lengths.tolist() == [0, 1, *[0] * 10]


def test_resize_before_the_first_use_allocates_nothing():
    slab = KVSlab(UNIFORM, 11)
    slab.resize(13)
    assert (slab.slots, slab.bytes) == (13, 0)


class CountingSlab(KVSlab):
    """A slab that knows how many bytes of its tensors lived at most at one time."""

    live = most = 0

    def _new(self, slots: int) -> torch.Tensor:
        tensor = super()._new(slots)
        size = tensor.untyped_storage().nbytes()
        CountingSlab.live += size
        CountingSlab.most = max(CountingSlab.most, CountingSlab.live)
        weakref.finalize(tensor, CountingSlab._freed, size)
        return tensor

    @staticmethod
    def _freed(size: int) -> None:
        CountingSlab.live -= size


@pytest.mark.parametrize('keep', [0, 2])
def test_the_old_tensor_is_freed_before_the_new_one_is_allocated(keep):
    CountingSlab.live = CountingSlab.most = 0
    slab = CountingSlab(UNIFORM, 11)
    rows = torch.randn(2, 6, 7, 10)
    slab.store([0, 1], rows)
    slab.resize(13, keep=keep)
    assert CountingSlab.most == 13 * 1680
    assert torch.equal(slab.load([0, 1]), rows if keep else torch.zeros_like(rows))


def test_the_bound_is_kept_also_while_resizing():
    with pytest.raises(ValueError, match='11 slots need 18,480 bytes'):
        KVSlab(UNIFORM, 11, max_bytes=11 * 1680 - 1)
    slab, rows = filled(max_bytes=13 * 1680)
    with pytest.raises(RuntimeError, match=r'raise kv_cache\.max_bytes'):
        slab.resize(14)
    with pytest.raises(RuntimeError, match='2 kept ones held twice'):
        slab.resize(12, keep=2)
    assert torch.equal(slab.load(range(11)), rows)
    slab.resize(12, keep=1)
    assert torch.equal(slab.load([0]), rows[:1])
    slab.resize(13, keep=0)
    assert slab.bytes == 13 * 1680


def test_missing_memory_is_reported_and_the_kept_slots_survive():
    slab, rows = filled()
    wanted = 2**50
    with pytest.raises(
        RuntimeError, match=f'{wanted * 1680:,} bytes wanted on cpu, [0-9,]+ bytes available; lower kv_cache'
    ):
        slab.resize(wanted, keep=3)
    assert (slab.slots, slab.bytes) == (11, 11 * 1680)
    assert torch.equal(slab.load([0, 1, 2]), rows[:3])
    with pytest.raises(RuntimeError, match='lower kv_cache'):
        KVSlab(KVLayout(3, 2, 5, 2**32), 11 * 2**20).allocate()


@pytest.mark.parametrize(('slots', 'keep'), [(0, None), (5, 6), (13, 12), (13, -1)])
def test_impossible_sizes_are_refused(slots, keep):
    slab, rows = filled()
    with pytest.raises(ValueError, match='must be'):
        slab.resize(slots, keep=keep)
    assert torch.equal(slab.load(range(11)), rows)


def test_the_scratch_row_is_behind_the_slots_and_no_slot():
    slab = KVSlab(UNIFORM, 11, scratch=True)
    rows = torch.randn(UNIFORM.batch_shape(11), dtype=UNIFORM.dtype)
    slab.store(range(11), rows)
    assert slab.tensor.shape == UNIFORM.batch_shape(12) and slab.bytes == 12 * 1680
    assert torch.equal(slab.tensor[:11], rows) and not slab.tensor[11].any()
    with pytest.raises(ValueError, match=r'slots must be in \[0, 11\), got \[11\]'):
        slab.load([11])
    slab.tensor[11] = 1.0
    slab.resize(14, keep=3)
    assert slab.tensor.shape == UNIFORM.batch_shape(15)
    assert torch.equal(slab.tensor[:3], rows[:3]) and not slab.tensor[3:].any()
