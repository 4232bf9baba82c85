"""What callers of inference pass in: checked, and in one form."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch

from lzero_kv.cache.keys import RootKey, digest_rows
from lzero_kv.cache.window import TOKENS_PER_STEP

NO_ACTION = -1
"""The host's last action where an episode begins."""


@dataclass(frozen=True, eq=False)
class RootInputs:
    """What one root inference is given, one row for each environment.

    Attributes:
        env_ids: numbers of the environments, all different.
        last_observations: ``[B, ...]``, what the last action was chosen for; not read in rows without one.
        last_actions: one per row; -1 where the episode begins.
        observations: ``[B, ...]``, the new ones.
        timesteps: int64 ``[B]``, step of the episode, negative where the environment does not tell.
    """

    env_ids: Sequence[int]
    last_observations: torch.Tensor
    last_actions: Sequence[Any]
    observations: torch.Tensor
    timesteps: np.ndarray

    def copied(self) -> Self:
        """The same with observations and actions of its own: the caller may write into its."""
        actions = copy.deepcopy(list(self.last_actions))
        return replace(self, last_actions=actions, observations=self.observations.clone())

    @cached_property
    def first(self) -> np.ndarray:
        """bool ``[B]``: rows that begin an episode."""
        return np.array([np.ndim(action) == 0 and int(action) == NO_ACTION for action in self.last_actions])

    @cached_property
    def new_tokens(self) -> np.ndarray:
        """int64 ``[B]``: tokens that each history gets."""
        return np.where(self.first, 1, TOKENS_PER_STEP)

    @cached_property
    def keys(self) -> list[RootKey]:
        """Names of the new roots."""
        return [RootKey(*name) for name in zip(self.env_ids, digest_rows(self.observations), strict=True)]

    @cached_property
    def last_digests(self) -> list[int]:
        """Digests of the last observations; zeros where every episode begins."""
        rows = len(self.first)
        return [0] * rows if self.first.all() else digest_rows(self.last_observations[:rows])

    def check(self, environments: int) -> None:
        """Refuse what does not belong together.

        Raises:
            ValueError: not one last observation, last action and environment for each observation, or not
                all different environments in ``[0, environments)``.
        """
        rows = len(self.observations)
        lengths = len(self.last_observations), len(self.last_actions), len(self.env_ids)
        if lengths[1:] != (rows, rows) or (lengths[0] < rows and not self.first.all()):
            raise ValueError(
                f'expected one last observation, last action and environment id for each of {rows} '
                f'observations, got {lengths[0]}, {lengths[1]} and {lengths[2]}'
            )
        unknown = [env_id for env_id in self.env_ids if not 0 <= env_id < environments]
        if unknown or len(set(self.env_ids)) != rows:
            raise ValueError(
                f'expected different environment ids in [0, {environments}), got {list(self.env_ids)}; '
                f'write env_num=max(collector_env_num, evaluator_env_num) in world_model_cfg'
            )


def check_actions(world_model: Any, actions: torch.Tensor, rows: int) -> None:
    """Refuse actions that are not one of the action space for each of ``rows`` rows; reads them back from
    their device.

    Args:
        actions: integers ``[B]`` or ``[B, 1]``, or ``[B, action_space_size]`` where actions are continuous.

    Raises:
        ValueError: says what came.
    """
    size = world_model.action_space_size
    numbers = size if world_model.continuous_action_space else 1
    if actions.numel() != rows * numbers:
        each = f' of {numbers} numbers' if world_model.continuous_action_space else ''
        raise ValueError(f'expected {rows} actions{each}, got {actions.numel()} numbers')
    if world_model.continuous_action_space:
        if not torch.isfinite(actions).all():
            raise ValueError(f'expected actions of {size} finite numbers, got {actions.tolist()}')
        return
    outside = actions[(actions < 0) | (actions >= size)].tolist()
    if outside:
        raise ValueError(f'expected actions in [0, {size}), got {outside}')


def timesteps_of(start_pos: Any, rows: int) -> np.ndarray:
    """The host's ``timestep`` or ``start_pos`` (a number, a list, an array, tensors in a list) as int64
    ``[rows]``.

    Reanalysis gives ``[sequences, unrolled steps]`` and leaves out the last step of each sequence, which
    follows the one before it.
    """
    if start_pos is None:
        return np.full(rows, -1, dtype=np.int64)
    values = np.asarray(
        [np.asarray(value, dtype=np.float64) for value in start_pos] if np.ndim(start_pos) else start_pos
    )
    values = values.astype(np.int64)
    if values.ndim >= 2 and values.size != rows:
        values = values.reshape(values.shape[0], -1)
        values = np.concatenate([values, values[:, -1:] + 1], axis=1)
    values = values.reshape(-1)
    if len(values) == 1:
        values = np.repeat(values, rows)
    if len(values) != rows:
        raise ValueError(f'expected a timestep for each of {rows} rows, got {len(values)}')
    return values


def check_finite_latents(latents: np.ndarray | torch.Tensor) -> None:
    """Refuse latent states ``[B, 1, embed]`` that are nan or infinite.

    Raises:
        ValueError: names the rows.
    """
    finite = torch.isfinite(torch.as_tensor(latents)).flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f'expected finite latent states, got nan or inf in rows '
            f'{(~finite).nonzero().flatten().tolist()}; check the observations and the weights of the '
            f'encoder. Nothing was stored'
        )


def same_latents(latents: torch.Tensor, given: np.ndarray) -> bool:
    """Whether the host passes back the latent states of the latest root inference."""
    return latents.shape[0] == len(given) and bool(
        np.array_equal(
            latents.detach().cpu().numpy().reshape(len(given), -1), np.asarray(given).reshape(len(given), -1)
        )
    )
