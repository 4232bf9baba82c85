"""Where a token stands: learned absolute positions count inside the window, rotary ones from the start of the
episode."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from lzero_kv.cache.transfer import sender


class Placed(NamedTuple):
    """The positions of a batch of tokens.

    Attributes:
        added: ``[..., embed]``, learned positions; None where positions are rotary.
        rotation: complex ``[..., head_dim / 2]``, rotary factors; None where positions are learned.
    """

    added: torch.Tensor | None
    rotation: torch.Tensor | None

    def add_to(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings with their learned positions; as they are where positions are rotary."""
        return x if self.added is None else x + self.added


class LearnedPositions:
    """Learned absolute positions: a token's position is its place in the window, 0 for the oldest."""

    def __init__(self, world_model: Any) -> None:
        self._embedding = world_model.pos_emb
        self._transformer = world_model.transformer
        self._send = sender(world_model.pos_emb.weight.device)

    def at(self, places: np.ndarray, logical: np.ndarray) -> Placed:
        """The learned positions of window ``places`` (int64 ``[...]``)."""
        return Placed(F.embedding(self._send(np.maximum(places, 0)), self._embedding.weight), None)

    def projected(self, places: int) -> torch.Tensor:
        """What the position alone adds to keys and values by the present weights, ``[places, layers, 2,
        heads, head_dim]``.

        The host's correction of a token that moves to another place is the difference of two rows. The
        projection leaves out that a position goes through a LayerNorm and earlier layers, so the correction
        is an approximation (``window='rebuild'`` is exact).
        """
        weight = self._embedding.weight[:places]
        blocks = [
            torch.stack([block.attn.key(weight), block.attn.value(weight)], dim=1)
            for block in self._transformer.blocks
        ]
        heads = self._transformer.blocks[0].attn.num_heads
        return torch.stack(blocks, dim=1).unflatten(-1, (heads, -1))


class RotaryPositions:
    """Rotary positions: a token's position is counted from the start of its episode and never changes."""

    def __init__(self, world_model: Any) -> None:
        self._config = world_model.config
        self._factors = world_model.transformer.freqs_cis
        self._send = sender(self._factors.device)

    def at(self, places: np.ndarray, logical: np.ndarray) -> Placed:
        """The rotary factors of ``logical`` positions (int64 ``[...]``)."""
        logical = np.maximum(logical, 0)
        newest = int(logical.max())
        if newest >= len(self._factors):
            self._reach(newest)
        return Placed(None, self._factors[self._send(logical)])

    def factors(self, logical: np.ndarray) -> torch.Tensor:
        """Cosine and sine ``[..., head_dim / 2, 2]`` of ``logical`` positions (int64 ``[...]``)."""
        rotation = self.at(logical, logical).rotation
        assert rotation is not None
        return torch.view_as_real(rotation)

    def _reach(self, position: int) -> None:
        """Make the table cover ``position``.

        The host wraps positions at ``max_seq_len``, which breaks the distance between a token behind the wrap
        and one in front of it; the factors are a formula of the position, so the table is extended instead.
        """
        from lzero.model.unizero_world_models.transformer import precompute_freqs_cis

        end = 1 << position.bit_length()
        head_dim = self._config.embed_dim // self._config.num_heads
        self._factors = precompute_freqs_cis(head_dim, end, self._config.rope_theta).to(self._factors)


Positions = LearnedPositions | RotaryPositions


def positions_of(world_model: Any) -> Positions:
    """The kind of positions that the world model was configured with."""
    return RotaryPositions(world_model) if world_model.config.rotary_emb else LearnedPositions(world_model)
