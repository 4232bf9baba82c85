"""Serves a world model's inference while its weights keep their dtype and device: root inference, and the
beginnings of searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import NodeKey
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.window import TOKENS_PER_STEP, Window

from .budget import WindowBudget
from .compiled import CompiledSearch, StaticStep
from .events import SearchBegun, observed
from .expand import Search, SearchByLatent
from .inputs import check_finite_latents, same_latents, timesteps_of
from .resources import InferenceResources
from .roots import RootBatch, RootInference
from .rows import Geometry


class InferenceSession(InferenceResources):
    """The roots and searches of one world model, over its resources.

    Args:
        search_rows: most environments that are searched at once; others as of :class:`InferenceResources`.

    Attributes:
        budget: layer budgets of the windows; None where all tokens are kept.
        latest: the roots of the latest root inference.
        by_latent: the search of callers that name parents by their latent states.
    """

    def __init__(self, world_model: Any, environments: int, num_simulations: int, search_rows: int) -> None:
        super().__init__(world_model, environments, num_simulations)
        budget = world_model.cache_config.limiting_budget(world_model.num_layers, self.window.kept)
        self.budget = None if budget is None else WindowBudget(self, budget)
        self.roots = RootInference(self, self.budget)
        self._static: StaticStep | None = None
        if world_model.backend != 'eager':
            self._static = StaticStep(self, world_model.backend, search_rows)
        self.latest: RootBatch | None = None
        self.by_latent: SearchByLatent | None = None

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
        with observed():
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
                return Search(self, roots, simulations, memory, steps, self.budget)
            steps //= 2
        memory = self.memory(Search.elements(self, rows, simulations, steps))
        return Search(self, roots, simulations, memory, steps, self.budget)

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


def check_room(manager: KVCacheManager, model: Any, rows: int) -> None:
    """Refuse caches that cannot hold what a search of ``rows`` environments needs at once.

    Layer budgets change their windows: of them the working memory is not looked at.

    Args:
        manager: as :func:`~.resources.make_manager` made it, not used yet.
        model: the host's ``world_model_cfg``.

    Raises:
        ValueError: says which option to raise.
    """
    config, layout, layers = manager.cache_config, manager.layout, int(model.num_layers)
    exact, kept = config.window != 'shift', Window(int(model.context_length)).kept
    if exact and config.window_slots is not None and config.window_slots < rows:
        raise ValueError(
            f'kv_cache.window_slots={config.window_slots}: expected at least {rows}, one window for each '
            f'environment that is searched at once; raise it, or leave it out'
        )
    if config.max_bytes is None or config.limiting_budget(layers, kept) is not None:
        return
    geometry = Geometry(layout.heads, layout.head_dim, (kept,) * layers)
    simulations = manager.num_simulations
    stored = 0 if exact else simulations  # a shifted window cannot do without its steps
    corrected = not (exact or model.rotary_emb)
    elements = Search.elements_of(geometry, kept, rows, simulations, stored, corrected)
    wanted = elements * layout.dtype.itemsize
    if wanted > manager.spare_bytes:
        raise ValueError(
            f'kv_cache.max_bytes={config.max_bytes:,} is too small: a search of {rows} environments works '
            f'with {wanted:,} bytes beside the pools, which leave {manager.spare_bytes:,}; raise it'
        )
