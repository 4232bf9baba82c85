"""Where a token stands: learned absolute positions count inside the window, rotary ones from the start of the
episode."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.transfer import to_device


class LearnedPositions:
    """Learned absolute positions: a token's position is its place in the window, 0 for the oldest."""

    def __init__(self, world_model: Any) -> None:
        self._embedding = world_model.pos_emb

    def place(
        self, x: torch.Tensor, places: np.ndarray, logical: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Add the learned position to embeddings ``[..., embed]`` that stand at window ``places`` (int64
        ``[...]``)."""
        return x + self._embedding(to_device(np.maximum(places, 0), x.device)), None


class RotaryPositions:
    """Rotary positions: a token's position is counted from the start of its episode and never changes."""

    def __init__(self, world_model: Any) -> None:
        self._transformer = world_model.transformer
        self._config = world_model.config
        self._factors = self._transformer.freqs_cis

    def place(
        self, x: torch.Tensor, places: np.ndarray, logical: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings as they are, and the rotary factors (complex ``[..., head_dim / 2]``) of ``logical``
        positions."""
        return x, self._at(logical)

    def factors(self, logical: np.ndarray) -> torch.Tensor:
        """Cosine and sine ``[..., head_dim / 2, 2]`` of ``logical`` positions (int64 ``[...]``)."""
        return torch.view_as_real(self._at(logical))

    def _at(self, logical: np.ndarray) -> torch.Tensor:
        logical = np.maximum(logical, 0)
        self._reach(int(logical.max()))
        return self._factors[to_device(logical, self._factors.device)]

    def _reach(self, position: int) -> None:
        """Make the table cover ``position``.

        The host wraps positions at ``max_seq_len``, which breaks the distance between a token behind the wrap
        and one in front of it; the factors are a formula of the position, so the table is extended instead.
        """
        if position < len(self._factors):
            return
        from lzero.model.unizero_world_models.transformer import precompute_freqs_cis

        end = 1 << position.bit_length()
        head_dim = self._config.embed_dim // self._config.num_heads
        self._factors = precompute_freqs_cis(head_dim, end, self._config.rope_theta).to(self._factors)


Positions = LearnedPositions | RotaryPositions


def positions_of(world_model: Any) -> Positions:
    """The kind of positions that the world model was configured with."""
    return RotaryPositions(world_model) if world_model.config.rotary_emb else LearnedPositions(world_model)
