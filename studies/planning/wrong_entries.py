"""What the wrong entries of LightZero's cache cost in return: the same weights plan with either cache.

    python studies/planning/wrong_entries.py train data_lz/cartpole
    python studies/planning/wrong_entries.py play data_lz/cartpole/ckpt/iteration_600.pth.tar

``train`` takes LightZero's own settings for CartPole, with this cache, and keeps a checkpoint every 100
updates. ``play`` plays episodes from the same starts with LightZero's cache and with this one, in turn, and
prints a line of JSON for each number of simulations: both returns, and the mean of their differences with a
bootstrap interval of 95 % over the starts.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import tyro

from lzero_kv.sweep.intervals import Bootstrap
from studies.planning import cartpole

SIZES = dict(env_manager='base', eval_freq=100)
"""What differs from LightZero's settings."""
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
    checkpoint: tyro.conf.Positional[Path],
    simulations: tuple[int, ...] = (25, 100, 200),
    episodes: int = 32,
) -> None:
    """Print the returns of both caches for each number of simulations.

    Args:
        checkpoint: of a training by ``train``.
        simulations: of a search.
        episodes: for each cache; a multiple of eight.
    """
    for number in simulations:
        sizes = SIZES | dict(num_simulations=number, evaluator_env_num=ROWS)
        policies = [
            cartpole.policy_of(cartpole.configs_of(sizes, kv_cache), checkpoint) for kv_cache in (None, {})
        ]
        returns: list[list[int]] = [[], []]
        for first in range(0, episodes, ROWS):
            for own, policy in zip(returns, policies, strict=True):
                own += cartpole.play(policy, range(first, first + ROWS))[1]
        difference = Bootstrap().difference(returns[1], returns[0])
        line = dict(
            checkpoint=checkpoint.name,
            simulations=number,
            stock=float(np.mean(returns[0])),
            lzero_kv=float(np.mean(returns[1])),
            difference=difference.value,
            interval=[difference.low, difference.high],
            returns=dict(stock=returns[0], lzero_kv=returns[1]),
        )
        print(json.dumps(line), flush=True)


if __name__ == '__main__':
    warnings.simplefilter('ignore')
    logging.getLogger().setLevel(logging.WARNING)
    tyro.extras.subcommand_cli_from_dict({'train': train, 'play': play})
