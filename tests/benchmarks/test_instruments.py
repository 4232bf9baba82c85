"""What the benchmarks count is counted right, and alike every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_growth import BASE
from measuring.contestants import EAGER, Floor, contestant
from measuring.instruments import HostReads, Memory, Operators
from measuring.players import FloorPlayer, Player
from measuring.tables import PARTS
from step_profile import write_trace

SMALL = replace(BASE, collectors=3, simulations=5, heads=3, embed=24)


def test_memory_tells_what_is_kept_from_what_was_used() -> None:
    kept = []
    with Memory() as memory:
        kept.append(torch.empty(3000))  # 12,000 bytes
        torch.empty(5000)  # 20,000, given back at once
        torch.empty(1000)
    assert memory.allocations == 3
    assert memory.allocated == pytest.approx(36_000, abs=3 * 64)  # the allocator aligns to 64 bytes
    assert memory.peak == pytest.approx(32_000, abs=2 * 64)
    assert memory.kept == pytest.approx(12_000, abs=64)


def test_host_reads_are_the_calls_that_wait_for_a_gpu() -> None:
    tensor = torch.ones(3)
    with HostReads() as reads:
        tensor.cpu()
        tensor.tolist()
        tensor[0].item()
        bool(tensor[0])
        float(tensor[1])
    with HostReads() as computing:
        tensor + 1
        tensor.numpy()
    assert (reads.count, computing.count) == (5, 0)


def test_operators_are_counted_while_something_is_compiled() -> None:
    compiled = torch.compile(lambda x: x + 1, backend='eager', fullgraph=True)
    with Operators() as operators:
        assert compiled(torch.zeros(3)).tolist() == [1, 1, 1]
    assert operators.count > 0


@pytest.mark.parametrize('cache', EAGER)
def test_counts_repeat_exactly(cache: str) -> None:
    """Bytes at the peak and at the end excepted: on a busy machine they differ by a few KiB now and then."""
    counted, steps = [], ('step_peak_mib', 'step_kept_mib')
    for _ in range(2):
        player = Player(contestant(SMALL, cache), SMALL.simulations)
        player.warm_up(SMALL.context // 2 + 1)
        counted.append(player.counts())
    for name in steps:
        assert counted[0].pop(name) == pytest.approx(counted[1].pop(name), abs=16 / 1024)
    assert counted[0] == counted[1]
    assert counted[0]['allocations_per_simulation'] > 10
    assert counted[0]['operators_per_simulation'] > 10
    assert counted[0]['host_reads_per_simulation'] >= 1
    assert counted[0]['cache_mib'] > 0


@pytest.mark.parametrize('cache', EAGER)
def test_a_step_divides_into_the_parts(cache: str) -> None:
    player = Player(contestant(SMALL, cache), SMALL.simulations)
    player.begin()
    seconds = player.split(steps=2)
    assert set(seconds) == set(PARTS)
    assert all(of > 0 for of in seconds.values())


def test_a_step_gives_its_root_inference() -> None:
    player = Player(contestant(SMALL, 'shift'), SMALL.simulations)
    player.begin()
    whole, root = player.step()
    assert 0 < root < whole


def test_the_floor_walks_no_tree() -> None:
    with Memory() as memory:
        FloorPlayer(Floor(SMALL, SMALL.context - 3)).step()
    assert memory.allocations > 0


def test_a_trace_is_a_file_for_a_viewer(tmp_path: Path) -> None:
    player = Player(contestant(SMALL, 'shift'), SMALL.simulations)
    player.begin()
    write_trace(player, tmp_path / 'step.json')
    events = json.loads((tmp_path / 'step.json').read_text(encoding='utf-8'))['traceEvents']
    assert any(event.get('name') == 'aten::addmm' for event in events)
