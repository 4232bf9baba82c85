"""What the host passes in: checked, and in one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.window import Window
from lzero_kv.config import validation_mode_of


def check_world_model_config(config: Any) -> None:
    """Refuse a world model that the cache cannot serve.

    Raises:
        ValueError: says which field of ``world_model_cfg`` to change, and to what.
    """
    problems = []
    window = Window(int(config.context_length))
    if not config.rotary_emb and config.max_tokens < window.in_flight:
        problems.append(
            f'max_tokens={config.max_tokens}: expected at least {window.in_flight} learned positions for '
            f'context_length={config.context_length}; write max_tokens=2 * max_blocks with more blocks'
        )
    if config.num_heads < 1 or config.embed_dim % config.num_heads:
        problems.append(
            f'num_heads={config.num_heads}: expected at least 1, a divisor of embed_dim={config.embed_dim}'
        )
    if config.tokens_per_block != 2:
        problems.append(
            f'tokens_per_block={config.tokens_per_block}: expected 2 (one observation and one action token)'
        )
    try:
        validation_mode_of(config)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(
            'world_model_cfg does not fit use_new_cache_manager=True:\n  ' + '\n  '.join(problems)
        )


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
