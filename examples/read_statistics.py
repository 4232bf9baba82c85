"""Statistics of a training, read from its log: as numbers, not as a page.

python examples/read_statistics.py data_lz
"""

from __future__ import annotations

import sys
from pathlib import Path

from lzero_kv.telemetry.read import find_runs, runs_in


def main(folder: Path) -> list[dict[str, dict[str, float]]]:
    """Show the hit rate and the rebuilt tokens of each run below ``folder``."""
    totals = []
    for run in (run for found in find_runs(folder) for run in runs_in(found)):
        whole = run.totals()  # {} where the training had no cache of lzero_kv
        totals.append(whole)
        for pool, numbers in whole.items():
            rate = numbers.get('hit_rate')  # None where nothing was looked up
            hits = 'nothing asked for' if rate is None else f'{rate:.1%} hits'
            print(f'{run.folder}  {pool}: {hits}, {numbers["rebuilt_tokens"]:.0f} tokens rebuilt')
        series = run.series('nodes', 'hit_rate')
        if series is not None:
            points = zip(series.steps.tolist(), series.values.tolist(), strict=True)
            print('  of nodes, by environment step:', *(f'{step}: {rate:.1%}' for step, rate in points))
    return totals


if __name__ == '__main__':
    main(Path(sys.argv[1]))
