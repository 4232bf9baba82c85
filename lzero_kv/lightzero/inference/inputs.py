"""What callers of inference pass in: checked, and in one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


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
