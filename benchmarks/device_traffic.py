"""What a search asks of a GPU: launches, copies, and how often the host waits, with LightZero's own cache and
with each engine of the manager.

    python benchmarks/device_traffic.py [--shapes cartpole]

Counts, no times, and no GPU: everything is computed on the CPU, and what was asked of the device is counted
(``tests/emulated_cuda``). Needs a build of torch without CUDA and a C++ compiler.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro
from measuring.contestants import (
    EAGER,
    GRAPHS,
    SHAPES,
    USUAL,
    Contestant,
    Shape,
    contestant,
    quiet,
    silence_host,
)
from rich.console import Console
from rich.table import Table

from tests.emulated_cuda import Device, emulated_cuda
from tests.host.recorder import replaced

Counted = dict[str, float]


def main(
    shapes: tuple[Shape, ...] = USUAL,
    history: int = 9,
) -> None:
    """Count, print a table, and one JSON document as the last line.

    Args:
        shapes: shapes of LightZero's configs.
        history: environment steps before the counted ones; short windows are full then.
    """
    found: dict[str, dict[str, dict[str, Counted]]] = {}
    for shape in shapes:
        print(f'counting {shape} ...', file=sys.stderr, flush=True)
        found[shape] = {}
        # the memory shape needs one slot for each node in a graph, and is eager by default
        for cache in [*EAGER, *([] if shape == 'memory' else GRAPHS)]:
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
    return {'root_inference': root, 'simulation': difference}


def _step(player: Contestant, device: Device) -> tuple[Counted, Counted]:
    """What one environment step asked for, and the root inference in it."""
    infer, roots, before = player.model.initial_inference, [], asdict(device.counts)

    def initial_inference(*args: Any, **kwargs: Any) -> Any:
        begun = asdict(device.counts)
        answer = infer(*args, **kwargs)
        roots.append(_since(begun, device))
        return answer

    with quiet(), replaced(player.model, 'initial_inference', initial_inference):
        player.episodes.step()
    return _since(before, device), roots[0]


def _since(before: Counted, device: Device) -> Counted:
    return {name: number - before[name] for name, number in asdict(device.counts).items()}


def table(found: dict[str, dict[str, dict[str, Counted]]]) -> Table:
    """One row for each shape and cache."""
    heads = ('operators', 'replays', 'copies to the device', 'reads', 'waits')
    columns = [*(f'simulation: {head}' for head in heads), *('root: operators', 'root: reads', 'root: waits')]
    made = Table('shape', 'cache', *columns, title='eight environments, an emulated CUDA device')
    for shape, caches in found.items():
        for cache, parts in caches.items():
            each, root = parts['simulation'], parts['root_inference']
            names = ('launches', 'replays', 'to_device', 'to_host', 'waits')
            made.add_row(
                shape,
                cache,
                *(f'{each[name]:.3g}' for name in names),
                *(f'{root[name]:.0f}' for name in ('launches', 'to_host', 'waits')),
            )
        made.add_section()
    return made


if __name__ == '__main__':
    silence_host()
    tyro.cli(main)
