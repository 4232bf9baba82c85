"""Real environments, collected from by LightZero's own collector: environment steps per second."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import atari_unizero_segment_kv_config
import cartpole_unizero_kv_config
from easydict import EasyDict

from testing.models import collect_model, load_weights, random_weights

from .contestants import CACHES, quiet
from .instruments import clock

SEGMENT = 20
"""Environment steps of a game segment."""
SEGMENTS = 8
"""Segments of one call of the collector, one for each environment."""


def _cartpole(kv: bool) -> tuple[EasyDict, EasyDict]:
    module = cartpole_unizero_kv_config
    size = EasyDict(module.FULL | dict(env_manager='base'))
    return module.make_config('CartPole-v0', 0, kv=kv, size=size)


def _pong(kv: bool) -> tuple[EasyDict, EasyDict]:
    module = atari_unizero_segment_kv_config
    size = EasyDict(module.FULL | dict(env_manager='base'))
    return module.make_config('PongNoFrameskip-v4', 0, kv=kv, size=size)


TASKS: dict[str, Callable[[bool], Any]] = {'cartpole': _cartpole, 'pong': _pong}
"""LightZero's config of each task."""


class Collection:
    """Eight environments, a policy of LightZero's config with random weights, and its segment collector.

    That collector begins a new episode where one ends, so all environments are searched at once, however long
    the episodes of a policy are. Nothing is trained. The log goes to a temporary folder; close it to remove
    that.
    """

    def __init__(self, task: str, cache: str) -> None:
        from ding.envs import create_env_manager, get_vec_env_setting
        from ding.policy import create_policy
        from lzero.worker import MuZeroSegmentCollector
        from torch.utils.tensorboard import SummaryWriter

        self._folder = tempfile.TemporaryDirectory()
        with quiet(), contextlib.chdir(self._folder.name):
            config = _compiled(*TASKS[task](CACHES[cache] is not None), CACHES[cache])
            make_environment, collecting, _ = get_vec_env_setting(config.env, eval_=False)
            environments = create_env_manager(
                config.env.manager, [partial(make_environment, cfg=one) for one in collecting]
            )
            environments.seed(0)
            policy = create_policy(config.policy, model=None, enable_field=['learn', 'collect', 'eval'])
            load_weights(policy, random_weights(collect_model(policy), 0))
            collect_model(policy).eval()
            self._collector = MuZeroSegmentCollector(
                env=environments,
                policy=policy.collect_mode,
                tb_logger=SummaryWriter(self._folder.name),
                policy_config=config.policy,
                collect_print_freq=10**9,
                exp_name='run',
            )

    def segment(self) -> tuple[int, float]:
        """Environment steps and seconds of one call of the collector."""
        before, begun = self._collector.envstep, clock()
        with quiet(), contextlib.chdir(self._folder.name):
            self._collector.collect(train_iter=0, policy_kwargs=dict(temperature=1.0, epsilon=0.0))
        return self._collector.envstep - before, clock() - begun

    def close(self) -> None:
        """Close the environments and remove what the collector wrote."""
        with quiet(), contextlib.chdir(self._folder.name):
            self._collector.close()
        self._folder.cleanup()


def _compiled(main: EasyDict, create: EasyDict, options: dict[str, Any] | None) -> EasyDict:
    from ding.config import compile_config

    main.policy.device = 'cpu'
    main.policy.cuda = False
    main.policy.num_segments, main.policy.game_segment_length = SEGMENTS, SEGMENT
    world_model = main.policy.model.world_model_cfg
    if options is None:
        create.policy.import_names.remove('lzero_kv.plugin')
        del world_model['use_new_cache_manager'], world_model['kv_cache']
    else:
        world_model.kv_cache = EasyDict(options)
    main.exp_name = os.path.join(os.getcwd(), 'run')
    return compile_config(main, seed=0, env=None, auto=True, create_cfg=create, save_cfg=False)
