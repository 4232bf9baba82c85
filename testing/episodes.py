"""Deterministic episodes driven through a real policy, exactly as LightZero's collectors and evaluator
drive it.

Everything random is keyed by (environment, episode, step): observations, root noise and the chosen action.
So the history of an environment is the same whichever cache serves it, whichever environments are ready,
and wherever it stands in a batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .models import world_model_of
from .precision import precision
from .recorder import Node, Recorder, replaced
from .repeatable_tree import host_trees, repeatable


@dataclass(frozen=True)
class Root:
    """One environment's part of one call of the policy."""

    env: int
    episode: int
    observations: tuple[torch.Tensor, ...]
    """The episode so far, the current observation last."""
    actions: tuple[Any, ...]
    """The actions between those observations: one fewer."""
    action: Any
    """The action chosen now."""
    visits: tuple[int, ...]
    searched_value: float
    predicted_value: float
    policy: np.ndarray
    """Logits, as in Node."""
    nodes: tuple[Node, ...] = field(repr=False)
    """In order of expansion."""

    @property
    def step(self) -> int:
        return len(self.actions)


class Episodes:
    """Environments that never influence each other, and the policy that plays them.

    ``identities`` names the stream each environment id plays (its own number by default), so that one
    stream can be played alone. ``lengths`` gives the steps of each stream's episodes, cyclically; None for
    endless ones. ``mode`` is 'collect' or 'eval'. With ``record`` false, roots carry no nodes.
    """

    def __init__(
        self,
        policy: Any,
        identities: Sequence[int],
        *,
        lengths: Mapping[int, Sequence[int]] | None = None,
        mode: str = 'collect',
        seed: int = 0,
        record: bool = True,
        timesteps: bool = True,
        tie_rule: bool = True,
    ) -> None:
        self.policy = policy
        self.identities = tuple(identities)
        self.mode = mode
        self.seed = seed
        self.record = record
        self.timesteps = timesteps
        self.tie_rule = tie_rule
        self.lengths = lengths or {}
        self.dtype = next(world_model_of(policy).parameters()).dtype
        self.episode = [0] * len(self.identities)
        self.observations: list[list[torch.Tensor]] = [[] for _ in self.identities]
        self.actions: list[list[Any]] = [[] for _ in self.identities]
        for env in range(len(self.identities)):
            self._observe(env)
        self.reset()

    @property
    def _interface(self) -> Any:
        return self.policy.collect_mode if self.mode == 'collect' else self.policy.eval_mode

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """The reset of the policy's mode; the host calls it with nothing, with [env], or after every step."""
        with precision(self.dtype):
            self._interface.reset(*args, **kwargs)

    def run(self, schedule: int | Sequence[Collection[int]]) -> list[Root]:
        """Play the steps of ``schedule``: the environments ready at each step, or a number of steps with
        all of them.
        """
        if isinstance(schedule, int):
            schedule = [range(len(self.identities))] * schedule
        return [root for ready in schedule for root in self.step(ready)]

    def step(self, ready: Collection[int] | None = None) -> list[Root]:
        """One call of the policy for the environments ``ready`` (all by default), then one step of each of
        them.
        """
        ready_set = set(range(len(self.identities)) if ready is None else ready)
        rows = list(ready_set)  # the order in which the host, too, walks through the set
        config = self.policy._cfg
        observation = torch.stack([self.observations[env][-1] for env in rows]).to(config.device)
        masks = [np.ones(config.model.action_space_size, dtype=np.int8) for _ in rows]
        to_play = [np.array(-1) for _ in rows]
        recorder = Recorder(world_model_of(self.policy), sampled=config.type == 'sampled_unizero')
        with ExitStack() as stack:
            stack.enter_context(precision(self.dtype))
            stack.enter_context(self._scripted(rows))
            if self.tie_rule:
                stack.enter_context(repeatable(*host_trees()))
            if self.record:
                stack.enter_context(recorder.attached())
            times = dict(ready_env_id=ready_set, timestep=[self._timestep(env) for env in rows])
            if self.mode == 'collect':
                output = self._interface.forward(observation, masks, 1.0, to_play, 0.0, **times)
            else:
                output = self._interface.forward(observation, masks, to_play, **times)
        nodes = recorder.nodes(len(rows))
        roots = [self._root(env, output[env], tuple(nodes[row])) for row, env in enumerate(rows)]
        for root in roots:
            self._advance(root)
        return roots

    def _root(self, env: int, output: dict[str, Any], nodes: tuple[Node, ...]) -> Root:
        return Root(
            env=env,
            episode=self.episode[env],
            observations=tuple(self.observations[env]),
            actions=tuple(self.actions[env]),
            action=output['action'],
            visits=tuple(output['visit_count_distributions']),
            searched_value=float(output['searched_value']),
            predicted_value=float(np.asarray(output['predicted_value']).reshape(())),
            policy=np.asarray(output['predicted_policy_logits'], dtype=np.float64),
            nodes=nodes,
        )

    def _advance(self, root: Root) -> None:
        env = root.env
        self.actions[env].append(root.action)
        steps = len(self.actions[env])
        self.reset(env_id=env, current_steps=steps, reset_init_data=False)
        lengths = self.lengths.get(self.identities[env])
        if lengths and steps >= lengths[self.episode[env] % len(lengths)]:
            self.episode[env] += 1
            self.observations[env], self.actions[env] = [], []
            self.reset([env])
        self._observe(env)

    def _observe(self, env: int) -> None:
        shape = self.policy._cfg.model.observation_shape
        draw = self._generator(env, 0).standard_normal(shape)
        self.observations[env].append(torch.tensor(draw, dtype=torch.float32).to(self.dtype))

    def _timestep(self, env: int) -> np.ndarray:
        step = len(self.actions[env]) if self.timesteps else -1
        # The evaluator converts every observation after the first to float32, its timestep included.
        return np.array(step, dtype=np.float32 if self.mode == 'eval' and self.actions[env] else np.int64)

    def _generator(self, env: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng(
            [self.seed, self.identities[env], self.episode[env], len(self.actions[env]), purpose]
        )

    @contextmanager
    def _scripted(self, rows: Sequence[int]) -> Iterator[None]:
        """Root noise and chosen actions from the script; the host asks for both in the order of the rows."""
        module = importlib.import_module(f'lzero.policy.{self.policy._cfg.type}')
        noise = iter([self._generator(env, 1) for env in rows])
        choice = iter([self._generator(env, 2) for env in rows])

        def select_action(
            visits: Sequence[int], temperature: float = 1, deterministic: bool = True
        ) -> tuple[int, float]:
            return int(next(choice).integers(len(visits))), 0.0

        with (
            replaced(np.random, 'dirichlet', lambda alphas: next(noise).dirichlet(alphas)),
            replaced(module, 'select_action', select_action),
        ):
            yield
