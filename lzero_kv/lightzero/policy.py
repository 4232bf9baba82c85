"""What the policy knows and the world model does not: which environments are ready, what each saw last, when
one ends."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lzero.policy.unizero import UniZeroPolicy

from lzero_kv.lightzero.host import last_observations, simulations_of, zeros_batch
from lzero_kv.lightzero.inference.inputs import NO_ACTION
from lzero_kv.lightzero.world_model import KVWorldModel


class LastSteps:
    """Each environment's last observation and action, of one phase (collection or evaluation).

    Args:
        first_id: the manager's number of the phase's environment 0, so that the phases do not share
            histories.
        environments: how many environments the phase has.
    """

    def __init__(self, first_id: int, environments: int) -> None:
        self.first_id = first_id
        self.environments = environments
        self._steps: dict[int, tuple[torch.Tensor, Any]] = {}
        self._timesteps: dict[int, int] = {}

    def manager_id(self, env_id: int) -> int:
        """The manager's number of an environment of this phase.

        Raises:
            ValueError: there is no such environment.
        """
        if not 0 <= env_id < self.environments:
            raise ValueError(
                f'expected environment ids in [0, {self.environments}), got {env_id}; '
                f'write the real collector_env_num and evaluator_env_num in the policy config'
            )
        return self.first_id + int(env_id)

    def of(self, env_ids: Sequence[int], observations: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """Last observations ``[B, ...]`` and actions of ``env_ids``; zeros and -1 where an episode begins."""
        steps = [self._steps.get(int(env_id)) for env_id in env_ids]
        last = [
            torch.zeros_like(new) if step is None else step[0]
            for step, new in zip(steps, observations, strict=True)
        ]
        return torch.stack(last), [NO_ACTION if step is None else step[1] for step in steps]

    def of_all(self, env_ids: Sequence[int], observations: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """As :meth:`of`, a row for every environment of the phase: those of ``env_ids``, and blanks."""
        last, actions = self.of(env_ids, observations)
        every = last.new_zeros(self.environments, *last.shape[1:])
        every[list(env_ids)] = last
        chosen = dict(zip(env_ids, actions, strict=True))
        return every, [chosen.get(env_id, NO_ACTION) for env_id in range(self.environments)]

    def restarted(self, env_ids: Sequence[int], timesteps: Sequence[int]) -> list[int]:
        """Environments whose timestep is 0 again: another episode began, and the host did not report the end
        of the last one.

        A 0 after a 0 says nothing: the host's segment collector repeats the timesteps with which its call
        began.
        """
        return [
            env_id
            for env_id, timestep in zip(env_ids, timesteps, strict=True)
            if timestep == 0 < self._timesteps.get(int(env_id), 0)
        ]

    def remember(self, env_id: int, observation: torch.Tensor, action: Any, timestep: int) -> None:
        """Note copies of what an environment was shown, at which timestep (negative: unknown), and what was
        chosen: the caller may write into its own."""
        self._steps[int(env_id)] = observation.clone(), copy.deepcopy(action)
        self._timesteps[int(env_id)] = timestep

    def forget(self, env_ids: Sequence[int] | None = None) -> list[int]:
        """Forget environments (None: all) whose episode ended; gives back their numbers at the manager.

        Raises:
            ValueError: there is no such environment. Nothing is forgotten.
        """
        ended = range(self.environments) if env_ids is None else env_ids
        manager_ids = [self.manager_id(env_id) for env_id in ended]  # first: one that is unknown is refused
        for env_id in ended:
            self._steps.pop(int(env_id), None)
            self._timesteps.pop(int(env_id), None)
        return manager_ids


class KVPolicy(UniZeroPolicy):
    """Placed in front of the class of a UniZero policy (which may be a subclass); gives the world model each
    ready environment's own last step.

    The host keeps one batch of last observations and actions, forgets it for all environments when one ends
    or is missing, and shares it between collection and evaluation.
    """

    _cfg: Any
    _model: Any
    _target_model: Any

    def engage(self) -> None:
        """Size the cache for this policy's environments and searches."""
        collectors, evaluators = int(self._cfg.collector_env_num), int(self._cfg.evaluator_env_num)
        self._last_steps = {
            'collect': LastSteps(0, collectors),
            'eval': LastSteps(collectors, evaluators),
        }
        # the class behind this one and KVPolicy, whose methods read the last inputs
        self._last_names = {
            phase: last_observations(type(self).__mro__[2], phase) for phase in self._last_steps
        }
        self._serving = False
        for model in (self._model, self._target_model):
            model.world_model.expect(
                collectors + evaluators, simulations_of(self._cfg), max(collectors, evaluators)
            )

    @property
    def kv_world_models(self) -> dict[str, KVWorldModel]:
        """The world models that keep a cache: ``acting`` in the environments, ``reanalysis`` of replayed
        ones."""
        return {'acting': self._model.world_model, 'reanalysis': self._target_model.world_model}

    def _get_kv_world_models(self) -> dict[str, KVWorldModel]:
        # The host's mode functions (collect_mode.get_attribute) ask for an attribute by this name.
        return self.kv_world_models

    def _forward_collect(self, data: torch.Tensor, *args: Any, **kwargs: Any) -> dict:
        return self._forward('collect', super()._forward_collect, data, *args, **kwargs)

    def _forward_eval(self, data: torch.Tensor, *args: Any, **kwargs: Any) -> dict:
        return self._forward('eval', super()._forward_eval, data, *args, **kwargs)

    def _forward(
        self, phase: str, method: Callable[..., dict], data: torch.Tensor, *args: Any, **kwargs: Any
    ) -> dict:
        # positional or by name, as the host's own signature allows
        given = inspect.signature(method).bind(data, *args, **kwargs).arguments
        with self._own_last_steps(phase, data, given.get('ready_env_id'), given.get('timestep')) as remember:
            return remember(method(data, *args, **kwargs))

    @contextmanager
    def _own_last_steps(
        self, phase: str, data: torch.Tensor, ready_env_id: Any, timestep: Any
    ) -> Iterator[Any]:
        steps = self._last_steps[phase]
        env_ids = self._ready(ready_env_id, len(data))
        manager_ids = [steps.manager_id(env_id) for env_id in env_ids]
        timesteps = reported_timesteps(timestep, len(data))
        self._end(phase, steps.restarted(env_ids, timesteps))
        host_last = self._last_inputs(phase)
        self._set_last_inputs(phase, *self._given(phase, env_ids, data))

        def remember(output: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
            for env_id, observation, timestep in zip(env_ids, data, timesteps, strict=True):
                steps.remember(env_id, observation, output[env_id]['action'], timestep)
            return output

        self._serving = True  # the host resets its shared batch while it runs, which ends no episode
        try:
            with self._model.world_model.serving(manager_ids, host_last):
                yield remember
        finally:
            self._serving = False

    def _ready(self, ready_env_id: Any, rows: int) -> list[int]:
        """Environment ids in the order of the rows, as the host reads them."""
        normalize = getattr(self, '_normalize_ready_env_id', None)
        if normalize is not None:
            return normalize(ready_env_id, rows)
        return [int(env_id) for env_id in (range(rows) if ready_env_id is None else ready_env_id)]

    def _last_inputs(self, phase: str) -> tuple[torch.Tensor, list[Any]]:
        name = self._last_names[phase]
        return getattr(self, name), getattr(self, name.replace('obs', 'action'))

    def _set_last_inputs(self, phase: str, observations: torch.Tensor, actions: list[Any]) -> None:
        name = self._last_names[phase]
        setattr(self, name, observations)
        setattr(self, name.replace('obs', 'action'), actions)

    def _given(self, phase: str, env_ids: Sequence[int], data: torch.Tensor) -> Any:
        """Last observations and actions as the host's method wants them: a row for every environment where it
        keeps one batch for each phase, else for the ready ones. They have the dtype of the observations."""
        steps = self._last_steps[phase]
        every = self._last_names[phase].endswith(phase)
        return (steps.of_all if every else steps.of)(env_ids, data)

    def _reset_collect(self, *given: Any, **named: Any) -> None:
        self._reset('collect', given, named)

    def _reset_eval(self, *given: Any, **named: Any) -> None:
        self._reset('eval', given, named)

    def _reset(self, phase: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Reset in the place of UniZeroPolicy, then as the policy's own class does where it has a method.

        That may call UniZeroPolicy's: the last inputs that this wipes are set anew before each use, and the
        roots that it clears now and then are computed again.
        """
        self._reset_phase(phase, *given, **named)
        own = getattr(super(), f'_reset_{phase}')
        if own.__func__ is not getattr(UniZeroPolicy, f'_reset_{phase}'):
            own(*given, **named)

    def _reset_phase(
        self,
        phase: str,
        env_id: Any = None,
        current_steps: Any = None,
        reset_init_data: bool = True,
        **task: Any,
    ) -> None:
        """Forget the environments that ended: those of a list, or all.

        With a number of steps the host reports one more step of a running episode, and clears every cache now
        and then to bound its memory. The pools are bounded, so nothing is to be done.
        """
        one = isinstance(env_id, (int, np.integer))
        if not self._serving and (not one or current_steps is None):
            self._end(phase, [int(env_id)] if one else env_id)
        if self._model.world_model.stock is not None:
            self._reset_host(phase, one, current_steps, reset_init_data)

    def _reset_host(self, phase: str, one: bool, current_steps: Any, reset_init_data: bool) -> None:
        """What the host alone would do: wipe its one batch of last inputs, and now and then, where ``one``
        environment reports its steps, its caches."""
        if reset_init_data:
            environments = self._last_steps[phase].environments
            zeros = zeros_batch(self._cfg.model.observation_shape, environments, self._cfg.device)
            self._set_last_inputs(phase, zeros, [NO_ACTION] * environments)
        interval = 2000 if self._cfg.get('sample_type', '') == 'episode' else 200
        if one and current_steps is not None and current_steps % interval == 0:
            self._model.world_model.stock.clear_caches()

    def _end(self, phase: str, env_ids: Sequence[int] | None) -> None:
        self._model.world_model.end_episodes(self._last_steps[phase].forget(env_ids))


def reported_timesteps(timestep: Any, rows: int) -> list[int]:
    """The step of its episode that each row is at, -1 where the environments do not tell."""
    if timestep is None or np.ndim(timestep) == 0 or len(timestep) != rows:
        return [-1] * rows
    return [int(np.asarray(step).reshape(-1)[0]) for step in timestep]
