"""What the wrong entries of LightZero's cache cost in return: the same weights plan with either cache.

    python studies/planning/wrong_entries.py train data_lz/cartpole
    python studies/planning/wrong_entries.py play data_lz/cartpole/ckpt/iteration_600.pth.tar

``train`` takes LightZero's own settings for CartPole, with this cache, and keeps a checkpoint every 100
updates. ``play`` plays episodes from the same starts with each cache of :data:`CACHES`, in turn, and prints a
line of JSON for each checkpoint and number of simulations: the returns, and the means of their differences
from LightZero's with bootstrap intervals of 95 % over the starts.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import tyro

from lzero_kv.sweep.intervals import difference
from studies.planning import cartpole

SIZES = dict(env_manager='base', eval_freq=100)
"""What differs from LightZero's settings."""
CACHES = {'stock': None, 'shift': dict(window='shift'), 'default': {}}
"""LightZero's own; this one with LightZero's windows: wrong entries alone differ; with exact windows."""
ROWS = 8
"""Episodes that are searched at once."""


def train(folder: tyro.conf.Positional[Path], env_steps: int = 6000) -> None:
    """Train until the evaluation returns 200.

    Args:
        folder: of checkpoints and logs, relative.
        env_steps: the most environment steps.
    """
    configs = cartpole.configs_of(SIZES, {})
    configs[0].policy.learn = dict(learner=dict(hook=dict(save_ckpt_after_iter=100)))
    cartpole.train(configs, folder, env_steps)


def play(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]],
    simulations: tuple[int, ...] = (25, 100, 200),
    episodes: int = 32,
) -> None:
    """Print the returns of each cache for each checkpoint and number of simulations.

    Args:
        checkpoints: of trainings by ``train`` or ``lzero-kv compare``, in folders of their own.
        simulations: of a search.
        episodes: for each cache; a multiple of eight.
    """
    for checkpoint, number in itertools.product(checkpoints, simulations):
        sizes = SIZES | dict(num_simulations=number, evaluator_env_num=ROWS)
        configs = {name: cartpole.configs_of(sizes, options) for name, options in CACHES.items()}
        policies = {name: cartpole.policy_of(own, checkpoint) for name, own in configs.items()}
        returns: dict[str, list[int]] = {name: [] for name in CACHES}
        for first in range(0, episodes, ROWS):
            for name, policy in policies.items():
                returns[name] += cartpole.play(policy, range(first, first + ROWS))[1]
        others = [name for name in CACHES if name != 'stock']
        differences = {name: difference(returns[name], returns['stock']) for name in others}
        line = dict(
            checkpoint='/'.join(checkpoint.parts[-3:]),
            simulations=number,
            means={name: float(np.mean(own)) for name, own in returns.items()},
            differences=differences,
            returns=returns,
        )
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    logging.getLogger().setLevel(logging.WARNING)
    tyro.extras.subcommand_cli_from_dict({'train': train, 'play': play})
