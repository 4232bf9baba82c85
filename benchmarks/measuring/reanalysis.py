"""Reanalysis of a batch of old game segments through the host's replay buffer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from testing.families import Family
from testing.models import make_policy
from testing.precision import precision
from testing.reanalysis import segment

from .contestants import CACHES, quiet
from .instruments import clock

UNROLLED = 10
"""Steps after the first that a segment is reanalysed at."""

SHAPES = {
    '2/8/768': Family('atari', 2, 8, 768, 8, 8, (3, 64, 64), 6, 50),
    '2/2/64': Family('vector', 2, 2, 64, 8, 8, 4, 2, 50),
}


class BatchReanalysis:
    """One cache's reanalysis of ``segments`` segments of eleven roots each, ``simulations`` a search."""

    def __init__(self, shape: str, cache: str, segments: int, simulations: int) -> None:
        from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer

        options = CACHES[cache]
        with quiet():
            policy: Any = make_policy(
                SHAPES[shape],
                kv=options is not None,
                kv_cache=options,
                num_simulations=simulations,
                policy=dict(num_unroll_steps=UNROLLED),
                world_model=dict(num_unroll_steps=UNROLLED, max_blocks=20, max_tokens=40),
            )
        self._model, self._config = policy._target_model, policy._cfg
        self._segments = segments
        self._buffer = UniZeroGameBuffer(self._config)

    def seconds(self) -> float:
        """How long the policies of the batch take."""
        numbers = range(self._segments)
        with precision(torch.float32), quiet():
            games = [segment(self._config, UNROLLED + 2, 0, number) for number in numbers]
            actions = np.stack([game.action_segment[:UNROLLED] for game in games])
            timesteps = np.stack([game.timestep_segment[:UNROLLED] for game in games])
            context = self._buffer._prepare_policy_reanalyzed_context(list(numbers), games, [0] * len(games))
            self._buffer.reanalyze_num = self._segments
            begun = clock()
            self._buffer._compute_target_policy_reanalyzed(context, self._model, actions, timesteps)
            return clock() - begun
