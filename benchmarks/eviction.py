"""What each eviction policy costs when derived windows have less room than a search needs.

    python benchmarks/eviction.py --shapes atari lunarlander

Windows are full, eight environments. The room that a search needs is counted first, without a bound; then
every policy searches with a part of it (``window_slots``). A window that was evicted and is expanded again is
computed again: tokens that were rebuilt, in percent of those that had to be computed once. Counts repeat
exactly on one machine; no time is measured.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'configs'), str(ROOT / 'benchmarks')]

import tyro
from measuring.contestants import SHAPES, Shape, contestant, silence_host
from rich.console import Console
from rich.table import Table

from testing.models import world_model_of

POLICIES = 'lru', 'fifo', 'lfu', 'priority'


def searched(shape: Shape, steps: int, **kv_cache: Any) -> dict[str, float]:
    """Counters of nodes over ``steps`` environment steps with full windows."""
    family = SHAPES[shape]
    one = contestant(family, 'rebuild', **kv_cache)
    one.episodes.run(family.context // 2 + 1)
    manager = world_model_of(one.policy).kv_cache_manager
    manager.reset_stats()
    most = 0
    for _ in range(steps):
        one.episodes.step()
        most = max(most, len(manager.recur_pool))
    return {**manager.get_stats_summary()['nodes'], 'most': most}


def main(
    shapes: tuple[Shape, ...] = ('atari', 'lunarlander', 'cartpole'),
    percent: tuple[int, ...] = (25, 50, 75),
    steps: int = 4,
) -> None:
    """Print a table, and one JSON document as the last line.

    Args:
        shapes: shapes of LightZero's configs, with short windows.
        percent: parts of the room that a search needs.
        steps: environment steps that are counted.
    """
    document: dict[str, Any] = {}
    table = Table('shape', 'windows of a search', 'room', *POLICIES, title='tokens rebuilt, %')
    for shape in shapes:
        whole = searched(shape, steps)
        room, needed = int(whole['most']), whole['window_tokens']
        document[shape] = {'windows': room, 'hit_rate': whole['hit_rate'], 'rebuilt': {}}
        for part in percent:
            slots = max(SHAPES[shape].collectors, room * part // 100)
            rebuilt = {}
            for policy in POLICIES:
                found = searched(shape, steps, policy=policy, window_slots=slots)
                rebuilt[policy] = 100 * found['rebuilt_tokens'] / needed
            document[shape]['rebuilt'][part] = rebuilt
            table.add_row(shape, str(room), f'{part} %', *(f'{value:.1f}' for value in rebuilt.values()))
    Console(width=120).print(table)
    print(json.dumps(document))


if __name__ == '__main__':
    silence_host()
    tyro.cli(main)
