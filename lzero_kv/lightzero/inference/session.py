"""What serves a world model's inference while its weights keep their dtype and device: pools, flights, roots,
and the beginnings of searches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import NodeKey
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.window import TOKENS_PER_STEP, Window
from lzero_kv.lightzero.inference.budgeted import BudgetedFlights, limiting_budget
from lzero_kv.lightzero.inference.by_latent import NodesByLatent
from lzero_kv.lightzero.inference.events import SearchBegun
from lzero_kv.lightzero.inference.flights import Flights, shares_histories
from lzero_kv.lightzero.inference.nodes import SearchNodes
from lzero_kv.lightzero.inference.roots import RootBatch, RootInference
from lzero_kv.lightzero.inference.static import StaticEngine, StaticNodes
from lzero_kv.lightzero.inference.trees import SearchTrees
from lzero_kv.lightzero.inputs import check_finite_latents, same_latents, timesteps_of

MOVED_NODES = 4
"""Slots for each row where nodes share histories: only windows that moved need one, and few are in use at
once."""


def make_manager(world_model: Any, environments: int, num_simulations: int) -> KVCacheManager:
    """The caches of a world model by its configuration; nothing is allocated yet.

    Args:
        environments: of collection and evaluation together.
        num_simulations: of a search.

    Raises:
        ValueError: the cache's configuration has no room for them.
    """
    config, window = world_model.cache_config, Window(world_model.context_length)
    weight = world_model.transformer.ln_f.weight
    budget = limiting_budget(config, world_model.num_layers, window)
    shared = budget is not None or shares_histories(config, window)
    layers, tokens = world_model.num_layers, window.kept
    if budget is not None:  # one run of tokens, which the layers divide among themselves
        layers, tokens = 1, budget.sizes(layers, tokens).total
    return KVCacheManager(
        world_model.config,
        environments,
        config.enable_stats,
        layout=KVLayout(
            layers=layers,
            heads=world_model.num_heads,
            head_dim=world_model.embed_dim // world_model.num_heads,
            tokens=tokens,
            dtype=weight.dtype,
            device=weight.device,
        ),
        cache_config=config,
        num_simulations=MOVED_NODES if shared else num_simulations,
        scratch=world_model.engine_kind != 'eager',
    )


class Engine:
    """Made at the first use, never copied or saved.

    Args:
        world_model: whose inference is served.
        environments, num_simulations: as of :func:`make_manager`.
        search_rows: most environments that are searched at once.

    Attributes:
        latest: the roots of the latest root inference.
        by_latent: the search of callers that name parents by their latent states.
    """

    def __init__(self, world_model: Any, environments: int, num_simulations: int, search_rows: int) -> None:
        self._world_model = world_model
        self.manager = make_manager(world_model, environments, num_simulations)
        self.flights = self._make_flights()
        self.roots = RootInference(world_model, self.manager, self.flights)
        self.static: StaticEngine | None = None
        if self.manager.scratch:
            self.static = StaticEngine(
                world_model, self.manager, self.flights, world_model.engine_kind, search_rows
            )
        self.latest: RootBatch | None = None
        self.by_latent: NodesByLatent | None = None

    def _make_flights(self) -> Flights:
        model, manager = self._world_model, self.manager
        budget = limiting_budget(model.cache_config, model.num_layers, Window(model.context_length))
        if budget is None:
            return Flights(model, manager, model.cache_config)
        return BudgetedFlights(model, manager, model.cache_config, budget)

    def begin_search(self, root_latents: np.ndarray, timestep: Any, num_simulations: int) -> SearchNodes:
        """:meth:`KVWorldModel.begin_search`."""
        rows = len(root_latents)
        self.flights.take_weights()
        latest = None if self._world_model.reanalyze_phase else self.latest
        if latest is not None and not same_latents(latest.latents, root_latents):
            latest = None
        if latest is None:
            check_finite_latents(root_latents)
        self.manager.clear_recur_cache()
        static = self._static_for(rows, num_simulations)
        trees = None if static is not None else self._trees(rows, latest, num_simulations)
        if trees is None:
            own = 0 if latest is not None else rows
            self.manager.reserve_recurrent(rows * num_simulations + own, minimum=2 * rows + own)
        else:
            self.manager.reserve_recurrent(rows * MOVED_NODES, minimum=rows)
        roots = latest or self._roots_of_latents(root_latents, timestep, store=trees is None)
        capacity = self.manager.recur_pool.pool_size
        begun = SearchBegun(root_latents, timestep, latest is not None, roots.next_positions, capacity)
        for observer in self._world_model.observers:
            observer.search_begun(begun)
        arguments = self._world_model, self.manager, self.flights, roots, num_simulations
        return SearchNodes(*arguments, trees) if static is None else StaticNodes(static, *arguments)

    def _static_for(self, rows: int, num_simulations: int) -> StaticEngine | None:
        """Who serves a search on static shapes, where every node has a slot; None where nobody does, or where
        slots for all nodes do not fit and nodes can share their histories."""
        if self.static is None or not self.static.serves(rows):
            return None
        most = self.static.rows * (num_simulations + 1)
        if self.flights.shares_histories and not self.manager.can_reserve(most):
            return None
        return self.static

    def _trees(self, rows: int, latest: RootBatch | None, num_simulations: int) -> SearchTrees | None:
        """Nodes that share their roots' histories; None where each has a slot of its own."""
        flights, embed = self.flights, self.manager.layout.embed_dim
        if not flights.shares_histories:
            return None
        now, most = (1, 1) if latest is None else (int(latest.lengths.max()), latest.tokens.shape[1])
        widths = flights.widths(now)
        needed, largest = (
            SearchTrees.elements(embed, rows, each, num_simulations)
            for each in (widths, flights.widths(most))
        )
        memory = self.manager.tree_memory(needed, largest)
        if memory is not None:
            return SearchTrees(flights, memory, rows, widths, num_simulations)
        if isinstance(flights, BudgetedFlights):
            raise RuntimeError(
                f'a search of {rows} rows and {num_simulations} simulations under kv_cache.budget needs '
                f'{needed * self.manager.layout.dtype.itemsize:,} bytes beside the pools; raise '
                f'kv_cache.max_bytes={self.manager.cache_config.max_bytes}'
            )
        return None

    def _roots_of_latents(self, root_latents: np.ndarray, timestep: Any, store: bool) -> RootBatch:
        """Histories of one observation each, all computed in one batch, and stored unless the caller keeps
        them."""
        rows, layout = len(root_latents), self.manager.layout
        # Long windows of thousands of reanalysed roots would not fit in memory, and hold one token each.
        width = self.flights.window.kept if self.flights.host_padding else 1
        latents = torch.as_tensor(root_latents).to(layout.device, layout.dtype).reshape(rows, 1, -1)
        lengths = np.ones(rows, dtype=np.int64)
        next_positions = TOKENS_PER_STEP * np.maximum(timesteps_of(timestep, rows), 0) + 1
        kv = latents.new_zeros(rows, 2 * self.flights.layers, width, layout.embed_dim)
        self.flights.recompute(latents, lengths, next_positions, kv[:, :, width - 1 :])
        keys = [NodeKey(row, 0) for row in range(rows)]
        if store:
            self.manager.store(keys, kv, lengths, next_positions, newest=width)
        return RootBatch(keys, latents, latents, lengths, next_positions, None if store else kv)

    def forget_weights(self) -> None:
        """Drop all keys and values and what was made of the weights; environments stay in their episodes."""
        self.manager.clear_all()
        self.roots.contexts.forget_tokens()
        self.flights.forget_weights()

    def forget_search(self) -> None:
        """Nobody may go on from the latest roots."""
        self.latest = self.by_latent = None

    def forget_working_memory(self) -> None:
        """Drop the reused buffers, after a failure that may have left non-finite numbers in them."""
        self.flights.forget_buffer()
        self.manager.forget_trees()

    def blank(self) -> None:
        """Write zeros into all slots."""
        slab, layout = self.manager.slab, self.manager.layout
        if slab.bytes:
            row = torch.zeros(layout.batch_shape(1), dtype=layout.dtype, device=layout.device)
            slab.store(np.arange(slab.slots), row.expand(slab.slots, *row.shape[1:]))
