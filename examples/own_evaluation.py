"""An evaluation loop of one's own with a LightZero policy and this cache: two CartPoles, no evaluator.

    python examples/own_evaluation.py

The policy gets what LightZero's evaluator would give it: the ready environments by their ids, and a reset for
each that ended, so that the cache forgets its history.
"""

from __future__ import annotations

import numpy as np
import torch

import lzero_kv.plugin  # noqa: F401  (installs the cache; before the policy is built)
from lzero_kv.configs.cartpole_unizero_kv_config import make_config


def main(steps: int = 12) -> dict[str, float]:
    """Play, and return what the cache counted."""
    from ding.config import compile_config
    from ding.policy import create_policy
    from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv

    main_config, create_config = make_config('CartPole-v0', seed=0, smoke=True)
    main_config.policy.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    config = compile_config(main_config, seed=0, auto=True, create_cfg=create_config, save_cfg=False)
    policy = create_policy(config.policy, enable_field=['learn', 'collect', 'eval'])
    # a checkpoint: policy.learn_mode.load_state_dict(torch.load(path, map_location='cpu', weights_only=True))
    environments = [CartPoleEnv(config.env) for _ in range(2)]
    observed = {env_id: env.reset() for env_id, env in enumerate(environments)}
    policy.eval_mode.reset()
    for _ in range(steps):
        ready = list(observed)
        output = policy.eval_mode.forward(
            torch.from_numpy(np.stack([observed[i]['observation'] for i in ready])).float(),
            [observed[i]['action_mask'] for i in ready],
            [observed[i]['to_play'] for i in ready],
            ready_env_id=np.array(ready),
            timestep=[observed[i]['timestep'] for i in ready],
        )
        for env_id in ready:
            step = environments[env_id].step(output[env_id]['action'])
            observed[env_id] = step.obs
            if step.done:
                policy.eval_mode.reset([env_id])
                observed[env_id] = environments[env_id].reset()
    numbers = policy._eval_model.world_model.kv_cache_manager.get_stats_summary()['roots']
    print(numbers)
    return numbers


if __name__ == '__main__':
    main()
