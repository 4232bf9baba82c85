"""What validation costs: processor time of one environment step of all environments, mode by mode.

    python benchmarks/validation_cost.py

Small models with random weights, real searches, all modes interleaved step by step; medians, and their ratio
to the same step with validation off.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from testing.episodes import Episodes
from testing.models import make_policy

ENVIRONMENTS = 4
SIMULATIONS = 25
STEPS = 12
WARM_UP = 2
FAMILIES = ('tiny', 'atari', 'cartpole')
MODES: dict[str, tuple[str | bool, float]] = {
    'off': (False, 1.0),
    'store': ('store', 1.0),
    'model': ('model', 1.0),
    'roots only': ('model', 0.0),
}


def episodes(family: str, mode: str) -> Episodes:
    """The environments of one mode; all modes see the same observations."""
    chosen, rate = MODES[mode]
    policy = make_policy(
        family,
        kv=True,
        num_simulations=SIMULATIONS,
        collector_env_num=ENVIRONMENTS,
        kv_cache=dict(validation_rate=rate, validation_on_failure='log'),
        world_model=dict(cache_validation_mode=chosen),
    )
    return Episodes(policy, range(ENVIRONMENTS), record=False)


def seconds(family: str) -> dict[str, float]:
    """Median processor time of a step, by mode."""
    playing = {mode: episodes(family, mode) for mode in MODES}
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(STEPS):
        for mode, of_mode in playing.items():
            begun = time.process_time()
            of_mode.step()
            times[mode].append(time.process_time() - begun)
    return {mode: statistics.median(found[WARM_UP:]) for mode, found in times.items()}


def main() -> None:
    """Print the table."""
    logging.getLogger().setLevel(logging.ERROR)
    table = Table(title=f'{ENVIRONMENTS} environments, {SIMULATIONS} simulations: a step with validation')
    for name in ('model', *MODES):
        table.add_column(name, justify='right')
    for family in FAMILIES:
        found = seconds(family)
        ratios = (f'{1e3 * value:.0f} ms, {value / found["off"]:.1f}x' for value in found.values())
        table.add_row(family, *ratios)
    Console(width=110).print(table)


if __name__ == '__main__':
    main()
