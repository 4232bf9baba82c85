"""What inference of one world model works with: pools, weights, positions, working memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.window import Window
from lzero_kv.config import KVCacheConfig

from .attention import WindowsBeside, causal_mask, prefilled
from .events import Observer
from .positions import RotaryPositions, positions_of
from .rows import Geometry
from .weights import InferenceWeights


def make_manager(
    model: Any,
    config: KVCacheConfig,
    dtype: torch.dtype,
    device: torch.device,
    environments: int,
    num_simulations: int,
) -> KVCacheManager:
    """The caches of a world model; nothing is allocated yet.

    Args:
        model: the host's ``world_model_cfg``, for the sizes.
        config: the user's choices.
        dtype, device: of the weights.
        environments: of collection and evaluation together.
        num_simulations: of a search.

    Raises:
        ValueError: the cache's configuration has no room for them.
        TypeError: the model is in bfloat16.
    """
    if dtype == torch.bfloat16:
        raise TypeError(
            'the world model is in bfloat16, which LightZero cannot search with: it keeps latent states and '
            'values as numpy arrays, and numpy has no bfloat16; write world_model.float()'
        )
    layers, tokens = int(model.num_layers), Window(int(model.context_length)).kept
    budget = config.limiting_budget(layers, tokens)
    if budget is not None:  # one run of tokens, which the layers divide among themselves
        layers, tokens = 1, budget.sizes(layers, tokens).total
    layout = KVLayout(
        layers=layers,
        heads=int(model.num_heads),
        head_dim=int(model.embed_dim) // int(model.num_heads),
        tokens=tokens,
        dtype=dtype,
        device=device,
    )
    return KVCacheManager(
        model,
        environments,
        layout=layout,
        cache_config=config,
        num_simulations=num_simulations,
        scratch=config.backend_on(device) != 'eager',
    )


class InferenceResources:
    """Made at the first use, for the dtype and device of the weights; never copied or saved.

    Args:
        world_model: whose inference is served.
        environments, num_simulations: as of :func:`make_manager`.

    Attributes:
        exact: whether windows that overflow are derived anew.
        geometry: how windows lie in the storage now; a layer budget changes it between two searches.
    """

    def __init__(self, world_model: Any, environments: int, num_simulations: int) -> None:
        config = world_model.cache_config
        self.world_model = world_model
        self.window = Window(world_model.context_length)
        self.exact = config.window != 'shift'
        self.positions = positions_of(world_model)
        weight = world_model.transformer.ln_f.weight
        self.manager = make_manager(
            world_model.config, config, weight.dtype, weight.device, environments, num_simulations
        )
        layout = self.manager.layout
        widths = (self.window.kept,) * world_model.num_layers
        self.geometry = Geometry(layout.heads, layout.head_dim, widths)
        self._weights: InferenceWeights | None = None
        self._shift: torch.Tensor | None = None

    @property
    def observers(self) -> list[Observer]:
        """The world model's."""
        return self.world_model.observers

    @property
    def weights(self) -> InferenceWeights:
        """Transformer and heads by the weights of the latest :meth:`take_weights`."""
        if self._weights is None:
            precision = self.world_model.cache_config.precision
            self._weights = InferenceWeights(self.world_model, precision=precision)
        return self._weights

    def take_weights(self) -> None:
        """Notice weights that changed, and drop what was computed with the old ones; called where a root
        inference or a search begins."""
        if self._weights is not None and self._weights.stale():
            self.world_model.clear_caches()

    def shift_table(self) -> torch.Tensor | None:
        """What each place adds to keys and values (:meth:`LearnedPositions.projected`), by the present
        weights; None where windows are exact or positions rotary."""
        if self.exact or isinstance(self.positions, RotaryPositions):
            return None
        if self._shift is None:
            self._shift = self.positions.projected(self.window.in_flight)
        return self._shift

    def prefilled(
        self, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> torch.Tensor:
        """Keys and values ``[B, layers, 2, heads, T, head_dim]`` of whole histories.

        Args:
            tokens: ``[B, T, embed]`` raw embeddings, right-aligned.
            lengths, next_positions: int64 ``[B]``.
        """
        return prefilled(self.weights, *self.placed(tokens, lengths, next_positions))

    def placed(
        self, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, torch.Tensor | None]:
        """Whole histories with their positions, for a prefill; arguments as of :meth:`prefilled`."""
        columns = np.arange(-tokens.shape[1], 0)
        places = self.positions.at(lengths[:, None] + columns, next_positions[:, None] + columns)
        return places.add_to(tokens), lengths, places.rotation

    def windows_beside(
        self,
        tokens: torch.Tensor,
        lengths: np.ndarray,
        next_positions: np.ndarray,
        out: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> WindowsBeside:
        """Whole histories for the pass of other tokens to compute; ``out`` and ``rows`` as of
        :class:`WindowsBeside`, other arguments as of :meth:`prefilled`."""
        x, _, rotation = self.placed(tokens, lengths, next_positions)
        return WindowsBeside(x, rotation, causal_mask(lengths, x.shape[1], x), out, rows)

    def memory(self, elements: int) -> torch.Tensor:
        """Working memory of a root inference or a search, one at a time.

        Raises:
            RuntimeError: it does not fit into ``max_bytes``.
        """
        memory = self.manager.search_memory(elements)
        if memory is None:
            layout, config = self.manager.layout, self.manager.cache_config
            raise RuntimeError(
                f'inference needs {elements * layout.dtype.itemsize:,} bytes beside the pools; raise '
                f'kv_cache.max_bytes={config.max_bytes}'
            )
        return memory
