"""What a search asks of a GPU: launches, copies, and how often the host waits, with LightZero's own cache and
with each backend of the manager.

    python benchmarks/device_traffic.py [--shapes cartpole]

Counts, no times, and no GPU: everything is computed on the CPU, and what was asked of the device is counted
(``testing/emulated_cuda``). Needs a build of torch without CUDA and a C++ compiler.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'configs'), str(ROOT / 'benchmarks')]

import tyro
from measuring.contestants import (
    SHAPES,
    USUAL,
    Contestant,
    Shape,
    caches_on,
    contestant,
    quiet,
    silence_host,
)
from rich.console import Console
from rich.table import Table

from testing.emulated_cuda import Device, emulated_cuda

Counted = dict[str, float]

HEADS = {
    'launches': 'operators',
    'replays': 'replays',
    'to_device': 'copies to the device',
    'to_host': 'reads',
    'waits': 'waits',
}
"""What the counts of the device are called."""

SHOWN = {'simulation': tuple(HEADS), 'root inference': ('launches', 'to_host', 'waits')}
"""What of each part stands in the table."""


def main(shapes: tuple[Shape, ...] = USUAL, history: int = 9) -> None:
    """Count, print a table, and one JSON document as the last line.

    Args:
        shapes: shapes of LightZero's configs.
        history: environment steps before the counted ones; short windows are full then.
    """
    found: dict[str, dict[str, dict[str, Counted]]] = {}
    for shape in shapes:
        print(f'counting {shape} ...', file=sys.stderr, flush=True)
        found[shape] = {}
        for cache in caches_on('cuda', compiled=False):
            with emulated_cuda() as device:
                found[shape][cache] = counted(contestant(SHAPES[shape], cache, 'cuda'), device, history)
    Console(width=150).print(table(found))
    print(json.dumps(found))


def counted(player: Contestant, device: Device, history: int) -> dict[str, Counted]:
    """What is asked of the device in one root inference and, by the difference of two searches, in one
    simulation."""
    player.simulations(1)
    for _ in range(history):
        _step(player, device)
    fewer, more = 12, 24
    wholes = []
    for simulations in (more, fewer, more):  # the first captures what is captured
        player.simulations(simulations)
        whole, root = _step(player, device)
        wholes.append(whole)
    difference = {name: (wholes[2][name] - wholes[1][name]) / (more - fewer) for name in root}
    return {'root inference': root, 'simulation': difference}


def _step(player: Contestant, device: Device) -> tuple[Counted, Counted]:
    """What one environment step asked for, and the root inference in it."""

    def read() -> Counted:
        return asdict(device.counts)

    before = read()
    with quiet(), player.root_inferences(read) as roots:
        player.episodes.step()
    return _difference(before, read()), _difference(*roots[0])


def _difference(before: Counted, after: Counted) -> Counted:
    return {name: number - before[name] for name, number in after.items()}


def table(found: dict[str, dict[str, dict[str, Counted]]]) -> Table:
    """One row for each shape and cache."""
    columns = [f'{part}: {HEADS[name]}' for part, names in SHOWN.items() for name in names]
    made = Table('shape', 'cache', *columns, title='eight environments, an emulated CUDA device')
    for shape, caches in found.items():
        for cache, parts in caches.items():
            numbers = [f'{parts[part][name]:.3g}' for part, names in SHOWN.items() for name in names]
            made.add_row(shape, cache, *numbers)
        made.add_section()
    return made


if __name__ == '__main__':
    silence_host()
    tyro.cli(main)
