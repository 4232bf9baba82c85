"""The host's real collectors and evaluator with real environments, over the small policies of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Any

import numpy as np
import torch

from lzero_kv.lightzero.inference.inputs import RootInputs
from testing.families import Family
from testing.models import make_policy, world_model_of
from testing.recorder import replaced

TASKS = {
    'cartpole': Family('cartpole', 2, 3, 30, 5, 8, 4, 2, 5, evaluators=2, collectors=3, rotary=True),
    'pendulum': Family('pendulum', 2, 3, 24, 6, 8, 3, 1, 4, evaluators=2, collectors=3, continuous=True),
}
COLLECT = dict(temperature=1.0, epsilon=0.0)


def task_policy(task: str, **options: Any) -> Any:
    """A policy for a real environment; ``options`` as of ``make_policy``."""
    policy = dict(n_episode=3, num_segments=3, game_segment_length=20, num_unroll_steps=5, td_steps=2)
    policy |= options.pop('policy', {})
    return make_policy(
        TASKS[task], policy=policy, world_model=dict(num_unroll_steps=5), **{'kv': True, **options}
    )


@dataclass
class Rows:
    """What root inference was asked, row by row, held against what the environments did."""

    total: int = 0
    begun: int = 0
    wrong: list[str] = field(default_factory=list)
    fresh: set[int] = field(default_factory=set)
    """Numbers of the environments, as the manager counts them, that are at the beginning of an episode."""
    shown: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def continued(self) -> int:
        return self.total - self.begun

    def note(self, given: RootInputs) -> None:
        for row, env in enumerate(given.env_ids):
            action = given.last_actions[row]
            first = np.ndim(action) == 0 and action == -1
            if first != (env in self.fresh):
                self.wrong.append(f'environment {env}: first={first}')
            if not first and not torch.equal(given.last_observations[row], self.shown[env]):
                self.wrong.append(f'environment {env}: another last observation')
            self.total += 1
            self.begun += first
            self.fresh.discard(env)
            self.shown[env] = given.observations[row]


class Workers:
    """A collector ('episode' or 'segment') and an evaluator of one policy.

    Runs in the current directory, where the host's workers write their logs. Close it, or leave its ``with``
    block.
    """

    def __init__(self, policy: Any, task: str, collector: str, manager: str) -> None:
        from lzero.worker import MuZeroCollector, MuZeroEvaluator, MuZeroSegmentCollector
        from torch.utils.tensorboard import SummaryWriter

        self.policy, self.rows = policy, Rows()
        config = policy._cfg
        self.collect_envs = _environments(task, manager, config.collector_env_num)
        self.eval_envs = _environments(task, manager, config.evaluator_env_num)
        self.log = 'run/log/serial'
        common = dict(tb_logger=SummaryWriter(self.log), exp_name='run', policy_config=config)
        kind = MuZeroCollector if collector == 'episode' else MuZeroSegmentCollector
        self.collector = kind(
            env=self.collect_envs, policy=policy.collect_mode, collect_print_freq=1, **common
        )
        self.evaluator = MuZeroEvaluator(
            eval_freq=1,
            n_evaluator_episode=config.evaluator_env_num,
            env=self.eval_envs,
            policy=policy.eval_mode,
            **common,
        )
        self.rows.fresh |= set(range(config.collector_env_num))

    def __enter__(self) -> Workers:
        self._watching = ExitStack()
        self._watching.enter_context(self._watched())
        return self

    def __exit__(self, *error: Any) -> None:
        self._watching.close()
        self.collector.close()
        self.evaluator.close()

    def collect(self, train_iter: int = 0) -> Any:
        """One call of the host's ``collect``."""
        with redirect_stdout(StringIO()):
            return self.collector.collect(train_iter=train_iter, policy_kwargs=COLLECT)

    def evaluate(self, train_iter: int = 0) -> None:
        """One evaluation."""
        with redirect_stdout(StringIO()):
            self.evaluator.eval(train_iter=train_iter, envstep=self.collector.envstep)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        roots = world_model_of(self.policy).session.roots
        infer = roots.infer

        def watched_infer(given: RootInputs) -> Any:
            self.rows.note(given)
            return infer(given)

        with (
            replaced(roots, 'infer', watched_infer),
            self._ends(self.collect_envs, 0),
            self._ends(self.eval_envs, self.policy._cfg.collector_env_num),
        ):
            yield

    @contextmanager
    def _ends(self, envs: Any, first_id: int) -> Iterator[None]:
        step, reset = envs.step, envs.reset

        def watched_step(actions: Any) -> Any:
            timesteps = step(actions)
            self.rows.fresh |= {first_id + env for env, timestep in timesteps.items() if timestep.done}
            return timesteps

        def watched_reset(*arguments: Any) -> Any:
            self.rows.fresh |= {first_id + env for env in range(envs.env_num)}
            return reset(*arguments)

        with replaced(envs, 'step', watched_step), replaced(envs, 'reset', watched_reset):
            yield


def _environments(task: str, manager: str, number: int) -> Any:
    from ding.envs import create_env_manager
    from ding.envs.env_manager import get_env_manager_cls
    from easydict import EasyDict

    if task == 'cartpole':
        from zoo.classic_control.cartpole.envs.cartpole_lightzero_env import CartPoleEnv as Environment
    else:
        from zoo.classic_control.pendulum.envs.pendulum_lightzero_env import PendulumEnv as Environment
    config = Environment.default_config()
    config.update(
        dict(cartpole=dict(env_id='CartPole-v0'), pendulum=dict(env_id='Pendulum-v1', continuous=True))[task]
    )
    settings = EasyDict(get_env_manager_cls(EasyDict(type=manager)).default_config(), type=manager)
    settings.shared_memory = False
    envs = create_env_manager(settings, [partial(Environment, config)] * number)
    envs.seed(0)
    return envs
