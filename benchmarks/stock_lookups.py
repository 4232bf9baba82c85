"""How many lookups the stock cache answers with another node's keys and values, through real searches.

    python benchmarks/stock_lookups.py

Eight environments of random observations, a small model with random weights, two searches each. A lookup is
wrong when the keys and values that are served differ from those that were stored for the node's parent.
Beside it: how many nodes of the same episodes the manager answers differently from a recomputation of the
    node's own history.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measuring.contestants import quiet, silence_host
from rich.console import Console
from rich.table import Table

from testing.episodes import Episodes
from testing.judging import judge_nodes
from testing.lookups import StockLookups
from testing.models import make_policy, world_model_of

ENVIRONMENTS = 8
STEPS = 2
SIMULATIONS = (50, 75, 100, 200)
FAMILIES = ('tiny', 'cartpole', 'lunarlander')


def stock(family: str, simulations: int) -> tuple[int, int]:
    """Wrong and all lookups of the stock cache."""
    policy = make_policy(family, kv=False, num_simulations=simulations, collector_env_num=ENVIRONMENTS)
    if not world_model_of(policy).config.rotary_emb:
        world_model_of(policy).precompute_pos_emb_diff_kv()
    lookups = StockLookups(policy)
    with lookups.counted():
        Episodes(policy, range(ENVIRONMENTS)).run(STEPS)
    return lookups.wrong, lookups.total


def managed(family: str, simulations: int) -> tuple[int, int]:
    """Nodes that the manager answers differently from their recomputation, of the last step's searches; and
    all."""
    policy = make_policy(
        family,
        kv=True,
        kv_cache=dict(window='rebuild'),
        num_simulations=simulations,
        collector_env_num=ENVIRONMENTS,
    )
    roots = Episodes(policy, range(ENVIRONMENTS)).run(STEPS)[-ENVIRONMENTS:]
    verdict = judge_nodes(policy, roots, 'rebuild')
    return verdict.wrong, verdict.total


def main() -> None:
    """Print one row for each family and number of simulations."""
    table = Table('model', 'simulations', 'stock: wrong lookups', '', 'manager: wrong nodes')
    for family in FAMILIES:
        for simulations in SIMULATIONS:
            with quiet():
                wrong, total = stock(family, simulations)
                off, nodes = managed(family, simulations)
            table.add_row(
                family, str(simulations), f'{wrong} of {total}', f'{wrong / total:.1%}', f'{off} of {nodes}'
            )
    Console().print(table)


if __name__ == '__main__':
    silence_host()
    main()
