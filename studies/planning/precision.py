"""What planning in fewer bits decides with a trained model: CartPole at 384 features, wide enough for int8.

    python studies/planning/precision.py train data_lz/wide
    python studies/planning/precision.py compare data_lz/wide/ckpt/ckpt_best.pth.tar

``train`` takes LightZero's settings for CartPole with a wider model and a smaller batch, on one core, until
it plays to 200 (10 minutes). ``compare`` plays eight episodes in float32, and searches each of their roots
again, with the same history, in each precision. It prints a line of JSON for each, with the returns of eight
episodes that the precision plays itself.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import tyro

from lzero_kv.config import Precision
from lzero_kv.lightzero.inference.precision import REDUCED, lacking
from studies.planning import cartpole
from testing.episodes import Episodes, Root
from testing.recorder import replaced

EPISODES = 8
SIZES = dict(embed_dim=384, batch_size=64, env_manager='base', eval_freq=100)
"""What differs from LightZero's settings."""


def configs_of(precision: str) -> cartpole.Configs:
    """The two configs of the host for planning in this precision."""
    return cartpole.configs_of(SIZES | dict(evaluator_env_num=EPISODES), dict(precision=precision))


def train(folder: tyro.conf.Positional[Path], precision: Precision = 'float32') -> None:
    """Train until the evaluation returns 200, or for 6,000 environment steps.

    Args:
        folder: of checkpoints and logs, relative.
        precision: of planning, from the first step on.
    """
    cartpole.train(configs_of(precision), folder, env_steps=6000)


def compare(checkpoint: tyro.conf.Positional[Path], steps: int = 100) -> None:
    """Print what each precision decides.

    Args:
        checkpoint: of a training by ``train``.
        steps: roots of each episode, from its first on.
    """
    policy = cartpole.policy_of(configs_of('float32'), checkpoint)
    recorded, returns = cartpole.play(policy, range(EPISODES))
    expected = searched(policy, recorded, steps, [range(EPISODES)])
    report('float32', expected, expected, returns)
    halves = [range(3), range(3, EPISODES)]
    report('float32, other batches', expected, searched(policy, recorded, steps, halves), None)
    for precision in (name for name in REDUCED if not lacking(name, SIZES['embed_dim'])):
        policy = cartpole.policy_of(configs_of(precision), checkpoint)
        found = searched(policy, recorded, steps, [range(EPISODES)])
        report(precision, expected, found, cartpole.play(policy, range(EPISODES))[1])


class Replayed(Episodes):
    """Recorded episodes, searched anew: histories are those of the record, whatever the search would do."""

    def __init__(self, policy: Any, recorded: cartpole.Recorded, numbers: Sequence[int]) -> None:
        self.recorded = recorded
        super().__init__(policy, numbers, mode='eval', record=False)

    def _observe(self, env: int) -> None:
        observations = self.recorded[self.identities[env]][0]
        number = min(len(self.actions[env]), len(observations) - 1)
        self.observations[env].append(torch.tensor(observations[number], dtype=torch.float32))

    @contextmanager
    def _scripted(self, rows: Sequence[int]) -> Iterator[None]:
        actions = iter([self.recorded[self.identities[env]][1][len(self.actions[env])] for env in rows])
        module = importlib.import_module('lzero.policy.unizero')
        with replaced(module, 'select_action', lambda *_, **__: (next(actions), 0.0)):
            yield


def searched(
    policy: Any, recorded: cartpole.Recorded, steps: int, groups: Sequence[Sequence[int]]
) -> dict[tuple[int, int], Root]:
    """Roots by episode and step; the episodes of a group are searched together."""
    found = {}
    for numbers in groups:
        episodes = Replayed(policy, recorded, numbers)
        for step in range(steps):
            ready = [env for env, number in enumerate(numbers) if step < len(recorded[number][1])]
            for root in episodes.step(ready) if ready else []:
                found[numbers[root.env], step] = root
    return found


def report(
    name: str,
    expected: dict[tuple[int, int], Root],
    found: dict[tuple[int, int], Root],
    returns: list[int] | None,
) -> None:
    """Print one line of JSON."""
    pairs = [(expected[key], found[key]) for key in expected]
    same = np.array([np.argmax(one.visits) == np.argmax(other.visits) for one, other in pairs])
    clear = np.array([abs(one.visits[0] - one.visits[1]) > 2 for one, _ in pairs])
    values = np.array([(one.searched_value, other.searched_value) for one, other in pairs])
    numbers = dict(
        precision=name,
        roots=len(pairs),
        same_action=float(same.mean()),
        clear_roots=int(clear.sum()),
        same_action_where_clear=float(same[clear].mean()) if clear.any() else None,
        visits_nats=float(np.mean([divergence(one.visits, other.visits) for one, other in pairs])),
        value_error=float(np.abs(values[:, 0] - values[:, 1]).mean()),
        value_size=float(np.abs(values[:, 0]).mean()),
        returns=returns,
    )
    print(json.dumps(numbers), flush=True)


def divergence(counts: Sequence[int], other: Sequence[int]) -> float:
    """Divergence (Kullback-Leibler, nats) of visits from others, half a visit added to each."""
    p, q = ((np.array(of) + 0.5) / (np.array(of) + 0.5).sum() for of in (counts, other))
    return float((p * np.log(p / q)).sum())


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    logging.getLogger().setLevel(logging.WARNING)
    tyro.extras.subcommand_cli_from_dict({'train': train, 'compare': compare})
