"""Time of one environment step (root inference and search): stock against the manager, same weights and
observations.

    python benchmarks/search_time.py --shape atari --steps 12

The contestants take turns in one process; the table gives medians, the spread between quartiles, and the
ratio to stock. The last line is one JSON document. CPU only, one thread unless OMP_NUM_THREADS says
otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from tests.host.episodes import Episodes
from tests.host.families import Family
from tests.host.models import make_policy

SHAPES = {
    'atari': Family('atari', 2, 8, 768, 8, 8, (3, 64, 64), 6, 50),
    'memory': Family('memory', 4, 4, 256, 8, 162, (3, 5, 5), 4, 50, timesteps=False),
    'lunarlander': Family('lunarlander', 4, 4, 256, 8, 8, 8, 4, 50, timesteps=False),
    'cartpole': Family('cartpole', 2, 2, 64, 8, 8, 4, 2, 25, rotary=True),
}
CONTESTANTS = {'stock': None, 'shift': dict(window='shift'), 'rebuild': dict(window='rebuild')}
WARM_UP = 4
"""Steps until the windows of the short shapes are full."""


def main(shape: Literal['atari', 'memory', 'lunarlander', 'cartpole'] = 'atari', steps: int = 12) -> None:
    """Measure one shape of LightZero's configs with eight environments.

    Args:
        shape: which.
        steps: environment steps that are timed.
    """
    family = SHAPES[shape]
    with Path(os.devnull).open('w') as quiet, redirect_stdout(quiet):
        players = {
            name: Episodes(
                make_policy(family, kv=options is not None, kv_cache=options, collector_env_num=8),
                range(8),
                record=False,
                timesteps=family.timesteps,
            )
            for name, options in CONTESTANTS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in players}
        for _ in range(WARM_UP + steps):
            for name, episodes in players.items():
                begun = time.perf_counter()
                episodes.step()
                seconds[name].append(time.perf_counter() - begun)
    timed = {name: np.array(values[WARM_UP:]) * 1000 for name, values in seconds.items()}
    table = Table(
        'cache', 'median ms', 'quartiles', 'times as fast as stock', title=f'{shape}, {steps} steps'
    )
    results = {}
    for name, values in timed.items():
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        ratio = float(np.median(timed['stock']) / median)
        results[name] = {'median_ms': round(float(median), 3), 'ratio': round(ratio, 3)}
        table.add_row(name, f'{median:.1f}', f'{low:.1f} to {high:.1f}', f'{ratio:.2f}')
    Console().print(table)
    print(
        json.dumps(
            {'shape': shape, 'steps': steps, 'threads': os.environ['OMP_NUM_THREADS'], 'caches': results}
        )
    )


if __name__ == '__main__':
    import lzero.model.unizero_model  # noqa: F401  (the import sets the root logger to DEBUG)

    logging.getLogger().setLevel(logging.WARNING)
    tyro.cli(main)
