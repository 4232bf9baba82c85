"""The emulated device refuses what CUDA refuses, and captures as CUDA captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lzero_kv.cache.transfer import refill, to_device
from testing.emulated_cuda import Device, emulated_cuda

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason='this torch asks a real device')


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated_cuda() as device:
        yield device


def test_tensors_of_two_devices_do_not_meet(device: Device) -> None:
    here, there = torch.ones(3, device='cuda'), torch.ones(3)
    with pytest.raises(RuntimeError, match='at least two devices'):
        here + there
    with pytest.raises(RuntimeError, match='what they index is on the CPU'):
        there[torch.tensor([0, 2], device='cuda')]
    with pytest.raises(TypeError, match=r'Tensor\.cpu\(\)'):
        here.numpy()
    assert (here + there.sum()).tolist() == [4, 4, 4], 'single numbers may'
    assert here[torch.tensor([0, 2])].tolist() == [1, 1], 'indices may, and are copied'


@pytest.mark.parametrize(
    ('action', 'moved', 'waits'),
    [
        (lambda there, here: there.to('cuda'), (1, 0), 1),
        (lambda there, here: to_device(there.numpy(), here.device), (1, 0), 0),
        (lambda there, here: refill(here, there.numpy()), (1, 0), 0),
        (lambda there, here: here.cpu(), (0, 1), 1),
        (lambda there, here: here[1].item(), (0, 1), 1),
        (lambda there, here: here[here > 0], (0, 1), 1),
        (lambda there, here: here[torch.tensor([1])], (1, 0), 1),
        (lambda there, here: here * 2 + here[1:].sum(), (0, 0), 0),
    ],
)
def test_copies_and_waits_are_counted(
    device: Device, action: Callable[..., Any], moved: tuple[int, int], waits: int
) -> None:
    there, here = torch.arange(3), torch.arange(3, device='cuda')
    before = asdict(device.counts)
    action(there, here)
    found = {name: number - before[name] for name, number in asdict(device.counts).items()}
    assert (found['to_device'], found['to_host']) == moved
    assert found['waits'] == waits


def test_a_capture_computes_nothing_and_a_replay_everything(device: Device) -> None:
    number, sums = torch.ones(3, device='cuda'), torch.zeros(2, 3, device='cuda')
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = (number * 2).view(3, 1)
        sums[1] += doubled[:, 0]
    assert sums.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert torch.isnan(doubled).all()
    number.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):
        graph.replay()
    assert doubled.tolist() == [[2], [4], [6]]
    assert sums.tolist() == [[0, 0, 0], [4, 8, 12]]
    number = torch.zeros(3, device='cuda')  # not the memory that was captured
    graph.replay()
    assert sums.tolist() == [[0, 0, 0], [6, 12, 18]]


@pytest.mark.parametrize(
    'action',
    [
        lambda here: here[1].item(),
        lambda here: here.cpu(),
        lambda here: here[here > 0],
        lambda here: here + torch.tensor([1, 2, 3], device='cuda'),
    ],
)
def test_a_capture_refuses_what_waits(device: Device, action: Callable[..., Any]) -> None:
    here = torch.arange(3, device='cuda')
    with pytest.raises(RuntimeError, match='captur'), torch.cuda.graph(torch.cuda.CUDAGraph()):
        action(here)
    assert (here + 1).tolist() == [1, 2, 3], 'it is over'


def test_on_a_cpu_nothing_is_copied() -> None:
    array = torch.arange(3).numpy()
    sent = to_device(array, torch.device('cpu'))
    array[1] = 7
    assert sent.tolist() == [0, 7, 2]


def test_attention_is_one_operator(device: Device) -> None:
    parts = [torch.randn(2, 3, tokens, 8) for tokens in (4, 5, 5)]
    mask = torch.randn(2, 1, 4, 5)
    wanted = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    there, over = [part.to('cuda') for part in parts], mask.to('cuda')
    before = device.counts.launches
    found = F.scaled_dot_product_attention(*there, attn_mask=over)
    assert device.counts.launches == before + 1
    torch.testing.assert_close(found.cpu(), wanted)
