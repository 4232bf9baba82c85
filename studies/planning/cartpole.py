"""UniZero on LightZero's CartPole: trained, loaded again, and played from given starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lzero_kv.plugin  # noqa: F401
from lzero_kv.configs.cartpole_unizero_kv_config import FULL, make_config

Configs = tuple[Any, Any]
"""LightZero's main and create config."""
Recorded = list[tuple[list[np.ndarray], list[int]]]
"""For each episode its observations and actions."""


def configs_of(sizes: dict[str, Any], kv_cache: dict[str, Any] | None) -> Configs:
    """The two configs of the host, for a CPU.

    Args:
        sizes: what differs from LightZero's settings.
        kv_cache: options of the cache; None for LightZero's own.
    """
    configs = make_config('CartPole-v0', seed=0, kv=kv_cache is not None, size=type(FULL)(FULL | sizes))
    policy = configs[0].policy
    model = policy.model.world_model_cfg
    model.kv_cache = kv_cache or {}
    policy.device = model.device = 'cpu'
    policy.cuda = False
    return configs


def train(configs: Configs, folder: Path, env_steps: int) -> None:
    """Train until the evaluation returns 200, or for so many environment steps; ``folder`` is relative."""
    from lzero.entry import train_unizero

    configs[0].exp_name = str(folder)
    configs[0].env.stop_value = 200
    train_unizero([*configs], seed=0, max_env_step=env_steps)


def new_policy(configs: Configs) -> Any:
    """A policy with new weights."""
    from ding.config import compile_config
    from ding.policy import create_policy

    config = compile_config(configs[0], seed=0, auto=True, create_cfg=configs[1], save_cfg=False)
    policy = create_policy(config.policy, enable_field=['learn', 'collect', 'eval'])
    policy.env_config = config.env
    return policy


def policy_of(configs: Configs, checkpoint: Path) -> Any:
    """A trained policy."""
    policy = new_policy(configs)
    policy.learn_mode.load_state_dict(torch.load(checkpoint, map_location='cpu', weights_only=True))
    return policy


def play(policy: Any, starts: Sequence[int]) -> tuple[Recorded, list[int]]:
    """An evaluated episode of the real environment for each start: what was seen and done, and the returns.

    Args:
        starts: seeds of the states that the episodes begin in.
    """
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

    environments = [CartPoleEnv(policy.env_config) for _ in starts]
    seen = dict(enumerate(map(_started, environments, starts)))
    recorded: Recorded = [([], []) for _ in environments]
    policy.eval_mode.reset()
    while seen:
        ready = list(seen)
        rows = [seen[number] for number in ready]
        output = policy.eval_mode.forward(
            torch.from_numpy(np.stack([row['observation'] for row in rows])).float(),
            *[[row[name] for row in rows] for name in ('action_mask', 'to_play')],
            ready_env_id=set(ready),
            timestep=[row['timestep'] for row in rows],
        )
        for number in ready:
            action = int(output[number]['action'])
            recorded[number][0].append(np.array(seen[number]['observation']))
            recorded[number][1].append(action)
            step = environments[number].step(action)
            seen[number] = step.obs
            if step.done:
                policy.eval_mode.reset([number])
                del seen[number]
    return recorded, [len(actions) for _, actions in recorded]


def _started(environment: Any, start: int) -> dict[str, Any]:
    """The first observation; the host's environment takes no seed for it."""
    environment.reset()
    environment._env.unwrapped.np_random = np.random.default_rng(start)
    return environment.reset()
