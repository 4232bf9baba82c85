"""What serves a world model's inference while its weights keep their dtype and device: pools, weights, roots,
and the beginnings of searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import NodeKey
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.window import TOKENS_PER_STEP, Window
from lzero_kv.config import KVCacheConfig

from ..inputs import check_finite_latents, same_latents, timesteps_of
from .attention import WindowsBeside, causal_mask, prefilled
from .budget import BudgetedRootStep, WindowBudget, limiting_budget
from .compiled import CompiledSearch, StaticStep
from .events import Observer, SearchBegun
from .expand import Search, SearchByLatent
from .positions import positions_of
from .roots import RootBatch, RootInference, RootStep
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
    budget = limiting_budget(config, layers, tokens)
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


class InferenceSession:
    """Made at the first use, never copied or saved.

    Args:
        world_model: whose inference is served.
        environments, num_simulations: as of :func:`make_manager`.
        search_rows: most environments that are searched at once.

    Attributes:
        exact: whether windows that overflow are derived anew.
        budget: layer budgets of the windows; None where all tokens are kept.
        latest: the roots of the latest root inference.
        by_latent: the search of callers that name parents by their latent states.
    """

    def __init__(self, world_model: Any, environments: int, num_simulations: int, search_rows: int) -> None:
        config = world_model.cache_config
        self.world_model = world_model
        self.window = Window(world_model.context_length)
        self.exact = config.window != 'shift'
        self.positions = positions_of(world_model)
        weight = world_model.transformer.ln_f.weight
        self.manager = make_manager(
            world_model.config, config, weight.dtype, weight.device, environments, num_simulations
        )
        self._full = Geometry(
            self.manager.layout.heads,
            self.manager.layout.head_dim,
            (self.window.kept,) * world_model.num_layers,
        )
        budget = limiting_budget(config, world_model.num_layers, self.window.kept)
        self.budget = None if budget is None else WindowBudget(self, budget)
        self.roots = RootInference(self)
        self._weights: InferenceWeights | None = None
        self._shift: torch.Tensor | None = None
        self._static: StaticStep | None = None
        if world_model.backend != 'eager':
            self._static = StaticStep(self, world_model.backend, search_rows)
        self.latest: RootBatch | None = None
        self.by_latent: SearchByLatent | None = None

    @property
    def observers(self) -> list[Observer]:
        """The world model's."""
        return self.world_model.observers

    @property
    def geometry(self) -> Geometry:
        """How windows lie in the storage now."""
        return self._full if self.budget is None else self.budget.geometry

    @property
    def weights(self) -> InferenceWeights:
        """Transformer and heads by the weights of the latest :meth:`take_weights`."""
        if self._weights is None:
            precision = self.world_model.cache_config.precision
            self._weights = InferenceWeights(self.world_model, precision=precision)
        return self._weights

    def take_weights(self) -> None:
        """Notice weights that changed; called where a root inference or a search begins."""
        if self._weights is not None and self._weights.stale():
            self._weights = self._shift = None

    def shift_table(self) -> torch.Tensor | None:
        """What each place adds to keys and values (:meth:`LearnedPositions.projected`), by the present
        weights; None where windows are exact or positions rotary."""
        if self.exact or self.positions.rotary:
            return None
        if self._shift is None:
            self._shift = self.positions.projected(self.window.in_flight)
        return self._shift

    def begin_roots(self) -> None:
        """A root inference begins: what may change between searches alone changes now."""
        self.take_weights()
        if self.budget is not None:
            self.budget.advance()

    def root_step(self, slots: np.ndarray) -> RootStep | BudgetedRootStep:
        """Load the histories in ``slots`` (int64 ``[B]``)."""
        return RootStep(self, slots) if self.budget is None else BudgetedRootStep(self, self.budget, slots)

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

    def begin_search(self, root_latents: np.ndarray, timestep: Any, simulations: int) -> Search:
        """:meth:`KVWorldModel.begin_search`."""
        rows = len(root_latents)
        self.take_weights()
        latest = None if self.world_model.reanalyze_phase else self.latest
        if latest is not None and not same_latents(latest.latents, root_latents):
            latest = None
        if latest is None:
            check_finite_latents(root_latents)
        roots = latest or self._roots_of_latents(root_latents, timestep)
        static = self._static if self._static is not None and self._static.serves(rows) else None
        # before the pool takes what is left of max_bytes
        step_memory = None if static is None else self.manager.search_memory(static.elements(simulations))
        static = None if step_memory is None else static
        longest = int(roots.lengths.max()) + TOKENS_PER_STEP * simulations
        derived = rows * simulations if self.exact and longest > self.window.kept else 0
        windows = derived + (0 if roots.stored else rows)
        if static is not None and windows:
            windows = static.rows * (simulations + 1 if derived else 1)
        self.manager.begin_search(min(windows, rows), windows, upfront=static is not None)
        capacity = self.manager.window_bound
        begun = SearchBegun(root_latents, timestep, roots.stored, roots.next_positions, capacity)
        for observer in self.observers:
            observer.search_begun(begun)
        steps = simulations
        if self.exact and int(roots.lengths.min()) + TOKENS_PER_STEP > self.window.kept:
            steps = 0  # every child gets a derived window
        if static is not None and step_memory is not None:
            return CompiledSearch(static, self, roots, simulations, step_memory, steps)
        while self.exact and steps:
            # nodes whose steps have no room get windows of their own, which can be evicted
            memory = self.manager.search_memory(Search.elements(self, rows, simulations, steps))
            if memory is not None:
                return Search(self, roots, simulations, memory, steps)
            steps //= 2
        memory = self.memory(Search.elements(self, rows, simulations, steps))
        return Search(self, roots, simulations, memory, steps)

    def _roots_of_latents(self, root_latents: np.ndarray, timestep: Any) -> RootBatch:
        """Histories of one observation each, which the search's first simulation computes."""
        rows, layout = len(root_latents), self.manager.layout
        embed = self.world_model.embed_dim
        latents = torch.as_tensor(root_latents).to(layout.device, layout.dtype).reshape(rows, 1, embed)
        return RootBatch(
            [NodeKey(row, 0) for row in range(rows)],
            latents,
            latents,
            np.ones(rows, dtype=np.int64),
            TOKENS_PER_STEP * np.maximum(timesteps_of(timestep, rows), 0) + 1,
            np.ones((rows, 1 if self.budget is None else self.geometry.layers), dtype=np.int64),
            stored=False,
        )

    def forget_weights(self) -> None:
        """Drop all keys and values and what was made of the weights; environments stay in their episodes."""
        self.manager.clear_all()
        self.roots.contexts.forget_tokens()
        self._weights = self._shift = None

    def forget_search(self) -> None:
        """Searches do not go on from the latest roots."""
        self.latest = self.by_latent = None

    def blank(self) -> None:
        """Write zeros into all slots, after a failure that may have left numbers there that are not
        finite."""
        self.manager.forget_search_memory()
        if self.manager.storage.bytes:
            self.manager.storage.tensor.zero_()
