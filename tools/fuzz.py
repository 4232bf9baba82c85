"""Pool and manager against the slow references, for many random operations of every policy.

The comparison is that of the tests (tests/core). The operations are drawn by a seeded generator, so that long
runs are cheap and a difference can be repeated: it is printed with its seed and the operations before it.
"""

from __future__ import annotations

import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

from core.comparing import BROKEN, Difference  # noqa: E402  # pyright: ignore[reportMissingImports]
from core.twins import ManagerTwins, PoolTwins  # noqa: E402  # pyright: ignore[reportMissingImports]

from lzero_kv.cache.eviction import EvictionStrategy  # noqa: E402
from lzero_kv.cache.keys import NodeKey, RootKey  # noqa: E402

EPISODE = 400
"""Operations after which a run begins again with an empty pool."""
SHOWN = 12
"""Operations shown before a difference."""

Operation = tuple[str, tuple[Any, ...]]


@dataclass
class Options:
    """What to run."""

    operations: int = 100_000
    """Operations for each policy, of the pool and again of the manager."""
    seed: int = 0
    """Seed of the operations and of the numbers stored."""


class Draw:
    """Random arguments."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """An integer in ``[low, high]``."""
        return self.random.randint(low, high)

    def pool_keys(self, most: int, fewest: int = 0) -> list[int]:
        """Different keys of a pool."""
        return self.random.sample(range(9), self.number(fewest, most))

    def manager_key(self) -> RootKey | NodeKey:
        """A key of a manager; now and then of an environment that does not exist."""
        kind = self.random.random()
        if kind < 0.4:
            return RootKey(self.number(0, ManagerTwins.ENVIRONMENTS - (kind > 0.005)), self.number(0, 3))
        return self.node_key()

    def node_key(self) -> NodeKey:
        """A node of a search."""
        return NodeKey(self.number(0, 2), self.number(0, 4))

    def manager_keys(self, most: int) -> list[RootKey | NodeKey]:
        """Different keys of a manager."""
        return list(dict.fromkeys(self.manager_key() for _ in range(self.number(0, most))))

    def known_key(self) -> RootKey | NodeKey:
        """A key of a manager that names no unknown environment."""
        while True:
            key = self.manager_key()
            if not isinstance(key, RootKey) or key.env_id < ManagerTwins.ENVIRONMENTS:
                return key

    def lengths(self, count: int) -> list[int]:
        """Tokens of ``count`` histories."""
        return [self.number(0, 7) for _ in range(count)]


def pool_operation(draw: Draw) -> Operation:
    """One operation of :class:`PoolTwins` with its arguments."""
    keys = draw.pool_keys(6)
    priorities = [float(draw.number(-3, 3)) for _ in keys]
    choices: list[tuple[int, Operation]] = [
        (20, ('lookup', (keys,))),
        (28, ('store', (keys, draw.lengths(len(keys)), draw.number(0, 2)))),
        (1, ('store', ([3, 3], [1, 2]))),
        (6, ('load', (keys[:3],))),
        (8, ('get', (draw.number(0, 8),))),
        (8, ('set', (draw.number(0, 8), draw.number(0, 7)))),
        (4, ('both', ('discard', keys[:2]))),
        (8, ('both', ('set_priorities', keys[:1], priorities[:1]))),
        (4, ('rejected_store', (draw.pool_keys(4, 1), draw.random.choice(sorted(BROKEN))))),
        (1, ('both', ('clear',))),
        (1, ('both', ('resize', draw.number(1, 6)))),
    ]
    return _pick(draw, choices)


def manager_operation(draw: Draw) -> Operation:
    """One operation of :class:`ManagerTwins` with its arguments."""
    keys = draw.manager_keys(7)
    known = [draw.known_key() for _ in range(draw.number(0, 3))]
    nodes = list(dict.fromkeys(draw.node_key() for _ in range(draw.number(0, 6))))
    priority = float(draw.number(-3, 3))
    choices: list[tuple[int, Operation]] = [
        (20, ('lookup', (keys,))),
        (30, ('store', (keys, draw.lengths(len(keys)), draw.number(0, 2)))),
        (12, ('load', ([draw.known_key() for _ in range(6)], draw.number(0, 3), draw.random.random() < 0.5))),
        (8, ('get', (draw.number(0, ManagerTwins.ENVIRONMENTS - 1), draw.known_key()))),
        (8, ('set', (draw.known_key(), draw.number(0, 7)))),
        (10, ('reserve', (nodes, draw.lengths(len(nodes))))),
        (3, ('begin_search', (draw.number(0, 10), draw.number(0, 5), draw.random.random() < 0.3))),
        (4, ('pool_operation', ('discard', known))),
        (6, ('pool_operation', ('set_priorities', known[:1], [priority]))),
        (1, ('clear', (draw.random.choice(['all', 'roots', 'nodes']),))),
        (1, ('count_rebuilt', (draw.number(0, 9), draw.random.random() < 0.5))),
    ]
    return _pick(draw, choices)


MACHINES: dict[str, tuple[Callable[..., Any], Callable[[Draw], Operation]]] = {
    'pool': (PoolTwins, pool_operation),
    'manager': (ManagerTwins, manager_operation),
}
"""What is compared, and where its operations come from."""


def _pick(draw: Draw, choices: list[tuple[int, Operation]]) -> Operation:
    weights, operations = zip(*choices, strict=True)
    return draw.random.choices(operations, weights)[0]


def run(
    twins_of: Callable[..., Any],
    operation_of: Callable[[Draw], Operation],
    policy: str,
    operations: int,
    seed: int,
    advance: Callable[[], None],
) -> tuple[int, int, str]:
    """Run ``operations`` operations of one policy.

    Returns:
        The operations done, the evictions among them, and a description of the first difference ('' for
        none).
    """
    draw, evictions, twins = Draw(seed), 0, None
    latest: deque[Operation] = deque(maxlen=SHOWN)
    for done in range(operations):
        if twins is None or done % EPISODE == 0:
            evictions += 0 if twins is None else evictions_of(twins)
            latest.clear()
            twins = twins_of(policy, seed=seed + done)
        name, arguments = operation_of(draw)
        latest.append((name, arguments))
        try:
            getattr(twins, name)(*arguments)
            twins.compare()
        except Difference as difference:
            before = '\n'.join(f'  {done_name}{done_arguments}' for done_name, done_arguments in latest)
            return done + 1, evictions, f'{policy}, seed {seed}, operation {done + 1}: {difference}\n{before}'
        advance()
    return operations, evictions + (0 if twins is None else evictions_of(twins)), ''


def evictions_of(twins: PoolTwins | ManagerTwins) -> int:
    """Evictions that the references counted."""
    if isinstance(twins, PoolTwins):
        return twins.reference.stats.evictions
    return sum(pool.stats.evictions for pool in [*twins.reference.roots, twins.reference.nodes])


def main() -> None:
    """Run every policy, print the table, and exit with 1 when there was a difference."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    console = Console()
    table = Table('machine', 'policy', 'operations', 'evictions', 'seconds', 'differences')
    differences: list[str] = []
    policies = [strategy.value for strategy in EvictionStrategy]
    with Progress(console=console) as progress:
        task = progress.add_task('comparing', total=options.operations * len(MACHINES) * len(policies))
        for kind, (twins_of, operation_of) in MACHINES.items():
            for policy in policies:
                begun = time.perf_counter()
                done, evictions, difference = run(
                    twins_of,
                    operation_of,
                    policy,
                    options.operations,
                    options.seed,
                    lambda: progress.advance(task),
                )
                seconds = f'{time.perf_counter() - begun:.0f}'
                table.add_row(
                    kind, policy, f'{done:,}', f'{evictions:,}', seconds, '1' if difference else '0'
                )
                differences += [f'{kind}, {difference}'] if difference else []
    console.print(table)
    for difference in differences:
        console.print(difference, markup=False, highlight=False)
    sys.exit(1 if differences else 0)


if __name__ == '__main__':
    main()
