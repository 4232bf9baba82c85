"""Time, operators and memory of planning with each cache, against LightZero's own and the model alone.

    python benchmarks/benchmark_kv_cache.py --shapes atari cartpole --steps 12

One environment step of eight environments: root inference and a search. All contestants have the same
weights, see the same observations and search with the same tie-break, and take turns in one process. Windows
are full before anything is timed (the memory shape: ``--history`` steps long). Times are medians, with
quartiles in the JSON document that is the last line. With one thread (OMP_NUM_THREADS=1, the default here)
they are processor time, else wall-clock time. CPU only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
import torch
import tyro
from measuring.contestants import CACHES, SHAPES, Contestant, Floor, contestant, quiet
from measuring.instruments import CLOCK, THREADS, Operators, Split
from measuring.reanalysis import SHAPES as REANALYSED
from measuring.reanalysis import BatchReanalysis
from rich.console import Console
from rich.table import Table

from tests.host.models import world_model_of
from tests.host.recorder import replaced

Shape = Literal['atari', 'memory', 'lunarlander', 'cartpole']
Numbers = dict[str, Any]


def timed(action: Callable[[], object]) -> float:
    """Milliseconds that an action takes."""
    begun = CLOCK()
    action()
    return (CLOCK() - begun) * 1000


def summary(values: list[float]) -> Numbers:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {'median': round(float(median), 3), 'quartiles': [round(float(low), 3), round(float(high), 3)]}


def measure_shape(shape: Shape, steps: int, history: int) -> dict[str, Numbers]:
    """Every contestant of one shape."""
    simulations = SHAPES[shape].simulations
    players = [contestant(shape, cache, simulations) for cache in CACHES]
    warm_up = history if SHAPES[shape].context > 16 else SHAPES[shape].context // 2 + 1
    with quiet():
        for player in players:
            player.simulations(1)
            for _ in range(warm_up):
                player.episodes.step()
            player.simulations(simulations)
            player.episodes.step()
    floor = Floor(shape, min(2 * warm_up + 1, SHAPES[shape].context - 3), simulations)
    floor.step()
    rounds: dict[str, list[float]] = {name: [] for name in [*CACHES, 'floor']}
    roots: dict[str, list[float]] = {name: [] for name in CACHES}
    with quiet():
        for _ in range(steps):
            for player in players:
                rounds[player.name].append(step_with_root(player, roots[player.name]))
            rounds['floor'].append(timed(floor.step))
        found = {player.name: look_closer(player) for player in players}
    stock, bare = np.median(rounds['stock']), np.median(rounds['floor'])
    for name, values in rounds.items():
        numbers = found.setdefault(name, {})
        numbers['step_ms'] = summary(values)
        numbers['times_as_fast'] = round(float(stock / np.median(values)), 2)
        numbers['over_floor'] = round(float(np.median(values) / bare), 2)
        if name in roots:
            numbers['root_inference_ms'] = summary(roots[name])
            both = np.median(roots['stock']), np.median(roots[name])
            numbers['root_times_as_fast'] = round(float(both[0] / both[1]), 2)
            numbers['simulation_ms'] = round(float(np.median(values) - both[1]) / simulations, 3)
    return found


def step_with_root(player: Contestant, roots: list[float]) -> float:
    """Milliseconds of one environment step; those of its root inference are appended to ``roots``."""
    infer = player.model.initial_inference

    def initial_inference(*args: Any, **kwargs: Any) -> Any:
        begun = CLOCK()
        answer = infer(*args, **kwargs)
        roots.append((CLOCK() - begun) * 1000)
        return answer

    with replaced(player.model, 'initial_inference', initial_inference):
        return timed(player.episodes.step)


def look_closer(player: Contestant) -> Numbers:
    """What one more step is made of; slower than a timed one."""
    full = player.policy._mcts_collect._cfg.num_simulations
    counted = []
    for simulations in (full // 2, full):
        player.simulations(simulations)
        with Operators() as operators:
            player.episodes.step()
        counted.append(operators)
    more = full - full // 2
    split = Split()
    with split.watching(world_model_of(player.policy)):
        for _ in range(3):
            player.episodes.step()
    total = sum(split.seconds.values())
    numbers: Numbers = {
        'share_of_time': {part: round(seconds / total, 3) for part, seconds in split.seconds.items()},
        'operators_per_simulation': round((counted[1].count - counted[0].count) / more, 1),
        'mib_moved_per_simulation': round(
            (counted[1].bytes_moved - counted[0].bytes_moved) / more / 2**20, 3
        ),
        'cache_mib': round(player.cache_bytes() / 2**20, 1),
    }
    world_model = world_model_of(player.policy)
    if hasattr(world_model, 'kv_cache_manager'):
        stats = world_model.kv_cache_manager.stats_snapshot()
        numbers |= {f'{kind}_hit_rate': round(of.hit_rate, 4) for kind, of in stats.items()}
        numbers['window_tokens_per_node_query'] = round(
            stats['nodes'].window_tokens / stats['nodes'].queries, 3
        )
    return numbers


def measure_reanalysis(shape: str, segments: int, simulations: int) -> Numbers:
    """One batch each; the caches take turns, twice for all but stock, which takes minutes."""
    found: Numbers = {'roots': 11 * segments, 'simulations': simulations}
    for cache in CACHES:
        batch = BatchReanalysis(shape, cache, segments, simulations)
        if cache != 'stock':
            batch.seconds()
        found[f'{cache}_s'] = round(batch.seconds(), 3)
    for cache in CACHES:
        found[f'{cache}_times_as_fast'] = round(found['stock_s'] / found[f'{cache}_s'], 1)
    return found


def table_of(shapes: dict[str, dict[str, Numbers]]) -> Table:
    """One row for each shape and contestant."""
    heads = ['shape', 'cache', 'step ms', 'x stock', 'x floor', 'root ms', 'x stock', 'simulation ms']
    heads += ['model/cache/tree/rest %', 'operators', 'MiB moved', 'cache MiB', 'hits']
    table = Table(*heads, title='eight environments; operators and MiB moved are per simulation')
    for shape, contestants in shapes.items():
        for name, n in contestants.items():
            row = [
                shape,
                name,
                f'{n["step_ms"]["median"]:.1f}',
                str(n['times_as_fast']),
                str(n['over_floor']),
            ]
            if name != 'floor':
                parts = n['share_of_time']
                row += [f'{n["root_inference_ms"]["median"]:.1f}', str(n['root_times_as_fast'])]
                row += [f'{n["simulation_ms"]:.2f}']
                row += [
                    '/'.join(f'{parts.get(part, 0):.0%}'[:-1] for part in ('model', 'cache', 'tree', 'rest'))
                ]
                row += [
                    str(n[key])
                    for key in ('operators_per_simulation', 'mib_moved_per_simulation', 'cache_mib')
                ]
                row += [str(n.get('nodes_hit_rate', ''))]
            table.add_row(*row)
        table.add_section()
    return table


def main(
    shapes: tuple[Shape, ...] = ('atari', 'memory', 'lunarlander', 'cartpole'),
    steps: int = 12,
    history: int = 60,
    segments: int = 64,
    reanalysis_simulations: int = 3,
    reanalysis: bool = True,
) -> None:
    """Measure, print a table, and one JSON document as the last line.

    Args:
        shapes: shapes of LightZero's configs.
        steps: environment steps that are timed, for each contestant.
        history: steps of the episodes before the memory shape is timed.
        segments: game segments of a reanalysed batch, of eleven roots each.
        reanalysis_simulations: simulations of a reanalysed root; few, because stock takes them one by one.
        reanalysis: whether to measure it.
    """
    found = {shape: measure_shape(shape, steps, history) for shape in shapes}
    Console(width=170).print(table_of(found))
    document: Numbers = {'threads': THREADS, 'torch': torch.__version__, 'steps': steps, 'shapes': found}
    if reanalysis:
        document['reanalysis'] = {
            shape: measure_reanalysis(shape, segments, reanalysis_simulations) for shape in REANALYSED
        }
        table = Table('reanalysis', 'roots', 'simulations', *(f'{cache} s' for cache in CACHES), 'x stock')
        for shape, n in document['reanalysis'].items():
            row = [shape, n['roots'], n['simulations'], *(n[f'{cache}_s'] for cache in CACHES)]
            table.add_row(*map(str, row), str(n['rebuild_times_as_fast']))
        Console(width=170).print(table)
    document['gpu'] = 'not measured'
    print(json.dumps(document))


if __name__ == '__main__':
    import lzero.model.unizero_model  # noqa: F401  (the import sets the root logger to DEBUG)

    logging.getLogger().setLevel(logging.WARNING)
    tyro.cli(main)
