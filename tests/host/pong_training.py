"""A small training on real Pong in a process of its own; writes what TensorBoard got to a file.

    python -m tests.host.pong_training (stock | off) RESULT.json

Runs in the current directory. ``stock`` is the host as its authors ship it; ``off`` imports the plugin and
writes the flag as False. The tree breaks ties by order instead of by the clock, else no two trainings are
equal.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from atari_unizero_kv_config import make_config
from easydict import EasyDict

PLUGIN = 'lzero_kv.plugin'
SIZE = EasyDict(
    collector_env_num=2,
    evaluator_env_num=1,
    game_segment_length=20,
    num_simulations=6,
    batch_size=4,
    num_unroll_steps=5,
    infer_context_length=4,
    num_layers=2,
    num_heads=3,
    embed_dim=48,
    replay_ratio=0.06,
    train_start_after_envsteps=0,
    eval_freq=1,
    max_episode_steps=24,
    env_manager='base',
)
ENV_STEPS = 60
"""More than one collection gives, so that a second evaluation follows the first training."""


def configs(mode: str) -> tuple[Any, Any]:
    """The main and create config of a mode."""
    main, create = make_config('PongNoFrameskip-v4', seed=0, kv=False, size=SIZE)
    main.exp_name = 'pong'
    main.policy.learn.learner.hook.log_show_after_iter = 1
    world_model = main.policy.model.world_model_cfg
    if mode == 'stock':
        create.policy.import_names.remove(PLUGIN)
        del world_model['use_new_cache_manager'], world_model['kv_cache']
    elif mode == 'off':
        if PLUGIN not in create.policy.import_names or world_model.use_new_cache_manager is not False:
            raise RuntimeError('expected a config with the plugin and the flag as False')
    else:
        raise ValueError(f"expected 'stock' or 'off', got {mode!r}")
    return main, create


def train(mode: str) -> dict[str, Any]:
    """Train; gives back, to the last bit, the steps and values of all scalars, and digests of all weights."""
    from lzero.entry import train_unizero
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from testing.repeatable_tree import host_trees, repeatable

    with repeatable(*host_trees()):
        policy = train_unizero(list(configs(mode)), seed=0, max_env_step=ENV_STEPS)
    events = EventAccumulator('pong/log/serial', size_guidance=dict(scalars=0))
    events.Reload()
    scalars = {
        tag: [(point.step, float(point.value).hex()) for point in events.Scalars(tag)]
        for tag in events.Tags()['scalars']
    }
    state = policy.learn_mode.state_dict()
    weights = {
        f'{part}.{name}': hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for part in ('model', 'target_model') for name, tensor in state[part].items()
    }  # fmt: skip
    return dict(scalars=scalars, weights=weights, patches=patches())


def patches() -> dict[str, bool]:
    """Whether the training loaded the plugin, whether the host has it, and whether a model was served."""
    from lzero.model import unizero_model
    from lzero.model.unizero_world_models.world_model import WorldModel

    return dict(
        plugin='lzero_kv.plugin' in sys.modules,
        installed=unizero_model.WorldModel is not WorldModel,
        engine='lzero_kv.lightzero.world_model' in sys.modules,
    )


if __name__ == '__main__':
    Path(sys.argv[2]).write_text(json.dumps(train(sys.argv[1])))
