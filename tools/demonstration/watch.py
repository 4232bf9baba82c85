"""Counts what a training of the host does, by wrapping methods for the time of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
from ding.envs import BaseEnvManager
from ding.worker import BaseLearner
from lzero.worker import MuZeroCollector, MuZeroEvaluator

from demonstration.progress import STEPS, TrainingProgress
from demonstration.stock import Search
from lzero_kv.cli.training import around
from lzero_kv.lightzero.policy import KVPolicy


@contextmanager
def watching(progress: TrainingProgress) -> Iterator[None]:
    """Keep `progress` up to date with the trainings that run in this block (env manager: `base`)."""

    def collect(original: Any, collector: Any, *args: Any, **kwargs: Any) -> Any:
        progress.phase = 'collecting'
        progress.find_manager(collector._policy)
        progress.searches.clear()
        return original(collector, *args, **kwargs)

    def search(original: Any, policy: Any, observations: Any, *args: Any, **options: Any) -> Any:
        progress.policy = policy
        if len(progress.searches) < STEPS:
            progress.searches.append(Search(observations.clone(), deepcopy(args), deepcopy(options)))
        return original(policy, observations, *args, **options)

    def evaluate(original: Any, evaluator: Any, *args: Any, **kwargs: Any) -> Any:
        progress.phase = 'evaluating'
        progress.find_manager(evaluator._policy)
        stop, episodes = original(evaluator, *args, **kwargs)
        progress.returns.append(float(np.mean(episodes['eval_episode_return'])))
        return stop, episodes

    def step(original: Any, env_manager: Any, actions: dict[int, Any]) -> Any:
        timesteps = original(env_manager, actions)
        if progress.phase == 'collecting':
            progress.collected_steps += len(actions)
        else:
            progress.evaluated_steps += len(actions)
        progress.searched()
        return timesteps

    def train(original: Any, learner: Any, *args: Any, **kwargs: Any) -> Any:
        progress.phase = 'training'
        result = original(learner, *args, **kwargs)
        progress.train_iterations += 1
        progress.listener()
        return result

    with ExitStack() as stack:
        stack.enter_context(around(MuZeroCollector, 'collect', collect))
        stack.enter_context(around(KVPolicy, '_forward_collect', search))
        stack.enter_context(around(MuZeroEvaluator, 'eval', evaluate))
        stack.enter_context(around(BaseEnvManager, 'step', step))
        stack.enter_context(around(BaseLearner, 'train', train))
        yield
