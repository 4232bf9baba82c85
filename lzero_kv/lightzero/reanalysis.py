"""Lets the host's replay buffer for sampled actions use what its reanalysis searched.

That reanalysis cannot run for sampled batches: it returns policies and actions where its caller takes
policies alone. For the whole buffer it writes the new actions nowhere, although the new policies belong to
them. This module repairs both, for models that keep a cache. (LightZero 0.2.0 gives no timestep to the model
either, and the world model answers without one.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np

from lzero_kv.lightzero.world_model import KVWorldModel

ACTIONS, POSITIONS, SEGMENT_ACTIONS = 2, 2, 5
"""Places in the host's lists: sampled actions in a batch, positions and sampled actions in a reanalysis
context."""


def replace_sampled_reanalysis(replace: Callable[[Any, str, Any], None]) -> None:
    """Repair the host's buffer for caching models; ``replace(owner, name, value)`` sets an attribute."""
    from lzero.mcts.buffer.game_buffer_sampled_unizero import SampledUniZeroGameBuffer as Buffer

    replace(
        Buffer,
        '_compute_target_policy_reanalyzed',
        _keeping_actions(Buffer._compute_target_policy_reanalyzed),
    )
    replace(Buffer, 'sample', _with_new_actions(Buffer.sample))


def _keeping_actions(original: Any) -> Any:
    @functools.wraps(original)
    def compute_target_policy_reanalyzed(
        self: Any, policy_re_context: Any, model: Any, batch_action: np.ndarray
    ) -> Any:
        context = policy_re_context
        if context is None or not isinstance(model.world_model, KVWorldModel):
            return original(self, context, model, batch_action)
        with redirect_stdout(StringIO()):  # the host reports each of its own failed writes of an action
            policies, sampled = original(self, context, model, batch_action)
        # [sequences, unrolled steps + 1, sampled actions, action dimensions]
        sampled = sampled.reshape(len(context[POSITIONS]), -1, *sampled.shape[1:])
        for segment, first, searched in zip(
            context[SEGMENT_ACTIONS], context[POSITIONS], sampled, strict=True
        ):
            steps = max(0, min(len(searched), len(segment) - first))
            segment[first : first + steps] = list(searched[:steps])
        self.reanalyzed_actions = sampled
        return policies

    return compute_target_policy_reanalyzed


def _with_new_actions(original: Any) -> Any:
    def sample(self: Any, batch_size: int, policy: Any) -> list[Any]:
        self.reanalyzed_actions = None
        batch, targets = original(self, batch_size, policy)
        if self.reanalyzed_actions is not None:
            batch[ACTIONS][: len(self.reanalyzed_actions)] = self.reanalyzed_actions
        return [batch, targets]

    return sample
