"""Where the time of an environment step goes: model, cache, search tree and the rest, for each cache.

    python benchmarks/step_profile.py --plot docs/images/step_profile.png
    python benchmarks/step_profile.py --shapes cartpole --trace step.json --traced rebuild

Eight environments with full windows, one thread, processor time, contestants in turn: medians of ``--steps``
steps. A trace is one step under torch's profiler, for chrome://tracing or ui.perfetto.dev; where the model is
on a GPU, its kernels and copies are in it. The last line is one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'configs'), str(ROOT / 'benchmarks')]

import numpy as np
import torch
import tyro
from measuring.contestants import SHAPES, Floor, Shape, caches_on, contestant, quiet, silence_host
from measuring.players import FloorPlayer, Player
from measuring.plots import profile_plot
from measuring.rounds import FLOOR
from measuring.tables import PARTS
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile


def measure(
    shape: Shape, steps: int, history: int, device: str
) -> tuple[dict[str, dict[str, float]], dict[str, Player]]:
    """Milliseconds of a step by part for every contestant, and the players."""
    family, caches = SHAPES[shape], caches_on(device, compiled=False)
    players = {cache: Player(contestant(family, cache, device), family.simulations) for cache in caches}
    warm_up = history if family.context > 16 else family.context // 2 + 1
    for player in players.values():
        player.warm_up(warm_up)
    floor = FloorPlayer(Floor(family, min(2 * warm_up + 1, family.context - 3), device))
    rounds: dict[str, list[list[float]]] = {name: [] for name in (*players, FLOOR)}
    for _ in range(steps):
        for name, player in players.items():
            seconds = player.split(steps=1)
            rounds[name].append([1000 * seconds.get(part, 0.0) for part in PARTS])
        rounds[FLOOR].append([floor.step()[0], *[0.0] * (len(PARTS) - 1)])
    medians = {name: np.median(parts, axis=0).round(3).tolist() for name, parts in rounds.items()}
    return {name: dict(zip(PARTS, of, strict=True)) for name, of in medians.items()}, players


def write_trace(player: Player, file: Path) -> None:
    """One step of a player under torch's profiler."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_initialized():
        activities.append(ProfilerActivity.CUDA)
    with quiet(), profile(activities=activities, profile_memory=True) as profiled:
        player.step()
    profiled.export_chrome_trace(str(file))


def main(
    shapes: tuple[Shape, ...] = ('cartpole', 'memory'),
    steps: int = 5,
    history: int = 60,
    plot: Path | None = None,
    trace: Path | None = None,
    traced: Literal['stock', 'rebuild', 'shift', 'rebuild graph', 'shift graph'] = 'rebuild',
    device: Literal['cpu', 'cuda'] = 'cpu',
) -> None:
    """Measure, print a table, and one JSON document as the last line.

    Args:
        shapes: shapes of LightZero's configs.
        steps: environment steps that are measured, for each contestant.
        history: steps of the episodes before the memory shape is measured.
        plot: image file with one bar for each contestant.
        trace: file for torch's trace of one step, at the first shape.
        traced: whose step is traced; graphs are captured on a GPU alone.
        device: where planning computes.
    """
    if traced not in caches_on(device, compiled=False):
        sys.exit(f'--traced: {traced!r} plays on a GPU alone; write --device cuda, or another cache')
    found: dict[str, dict[str, dict[str, float]]] = {}
    for shape in shapes:
        found[shape], players = measure(shape, steps, history, device)
        if trace is not None and shape == shapes[0]:
            write_trace(players[traced], trace)
    table = Table('shape', 'cache', *(f'{part} ms' for part in PARTS), 'together')
    for shape, contestants in found.items():
        for name, parts in contestants.items():
            table.add_row(
                shape, name, *(f'{parts[part]:.1f}' for part in PARTS), f'{sum(parts.values()):.1f}'
            )
        table.add_section()
    Console(width=110).print(table)
    if plot is not None:
        profile_plot(found, plot)
    print(json.dumps({'steps': steps, 'milliseconds': found}))


if __name__ == '__main__':
    silence_host()
    tyro.cli(main)
