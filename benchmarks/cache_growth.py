"""How time, operators, bytes and memory of a simulation grow with the sizes of a search, for each cache.

    python benchmarks/cache_growth.py --plot docs/images/cache_growth.png

One size is changed at a time, from a small model's (2 layers, 64 wide, 8 tokens, 8 environments, 25
simulations). Contestants are those of benchmark_kv_cache.py that compile nothing. They take turns; times are
medians of ``--steps`` steps on one thread, processor time. The last line is one JSON document. The pool's
size is that of the manager's nodes: stock's is fixed, and the floor has none.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'configs'), str(ROOT / 'benchmarks')]

import numpy as np
import tyro
from measuring.contestants import CACHES, EAGER, Floor, contestant, silence_host
from measuring.players import FloorPlayer, Numbers, Player
from measuring.plots import growth_plot
from measuring.rounds import FLOOR, require_equal_values, take_turns
from rich.console import Console
from rich.table import Table

from testing.families import Family

Size = Literal['layers', 'environments', 'simulations', 'context', 'pool']

BASE = Family('growth', 2, 4, 64, 8, 8, 4, 4, 25, timesteps=False)
SIZES: dict[Size, tuple[int, ...]] = {
    'layers': (2, 4, 8),
    'environments': (2, 8, 16, 32),
    'simulations': (10, 25, 50, 100),
    'context': (8, 16, 32, 64, 128),
    'pool': (24, 48, 96, 208),
}
"""Values of each size; 208 nodes are all that a search of the base has, so that none is ever evicted."""
COUNTED = ('operators_per_simulation', 'allocations_per_simulation', 'mib_moved_per_simulation')
SHOWN = ('simulation_ms', *COUNTED, 'step_peak_mib', 'cache_mib')


def family_of(size: Size, value: int) -> Family:
    """The base with one size changed."""
    field = {'environments': 'collectors'}.get(size, size)
    return BASE if size == 'pool' else replace(BASE, **{field: value})


def measure(size: Size, value: int, steps: int) -> dict[str, Numbers]:
    """Every contestant at one value of one size: numbers by name.

    The pool's size is the manager's alone; there only its modes play.
    """
    family = family_of(size, value)
    pool: dict[str, Any] = dict(window_slots=value) if size == 'pool' else {}
    names = [name for name in EAGER if not pool or CACHES[name] is not None]
    players = [Player(contestant(family, name, **pool), family.simulations) for name in names]
    if not pool:
        require_equal_values({player.name: player.begin() for player in players})
    filled = family.context // 2 + 1
    for player in players:
        player.warm_up(filled)
    everyone = [*players, FloorPlayer(Floor(family, family.context - 3))]
    rounds = take_turns(everyone, steps, threads=1)
    found: dict[str, Numbers] = {player.name: player.counts() for player in players}
    for name, times in rounds.items():
        step, root = np.median(times, axis=0)
        searched = step if name == FLOOR else step - root
        found.setdefault(name, {})['simulation_ms'] = round(float(searched) / family.simulations, 3)
    return found


def growth_table(found: dict[str, dict[int, dict[str, Numbers]]]) -> Table:
    """One row for each size, value and contestant."""
    table = Table('size', 'value', 'cache', *SHOWN, 'hits', title='growth of one simulation')
    for size, values in found.items():
        for value, contestants in values.items():
            for name, numbers in contestants.items():
                shown = [f'{numbers[key]:.4g}' if key in numbers else '' for key in SHOWN]
                table.add_row(size, str(value), name, *shown, str(numbers.get('nodes_hit_rate', '')))
        table.add_section()
    return table


def main(
    sizes: tuple[Size, ...] = ('layers', 'environments', 'simulations', 'context', 'pool'),
    steps: int = 3,
    plot: Path | None = None,
) -> None:
    """Measure, print a table, and one JSON document as the last line.

    Args:
        sizes: which sizes are changed.
        steps: environment steps that are timed, for each contestant and value.
        plot: image file for time by size, one panel for each size.
    """
    found: dict[str, dict[int, dict[str, Numbers]]] = {
        size: {value: measure(size, value, steps) for value in SIZES[size]} for size in sizes
    }
    Console(width=150).print(growth_table(found))
    if plot is not None:
        growth_plot(found, plot)
    print(json.dumps({'steps': steps, 'growth': found}))


if __name__ == '__main__':
    silence_host()
    tyro.cli(main)
