"""LightZero's world model with the cache manager in place of its dictionaries and rings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lzero.model.unizero_world_models.world_model import WorldModel

from lzero_kv.budget import BudgetReading
from lzero_kv.config import KVCacheConfig, validation_mode_of
from lzero_kv.keys import NodeKey
from lzero_kv.layout import KVLayout
from lzero_kv.manager import KVCacheManager
from lzero_kv.validation.tally import ValidationTally
from lzero_kv.window import Window

from .budgeted import BudgetedFlights, limiting_budget
from .by_latent import NodesByLatent
from .flight import Flights, shares_histories
from .inputs import check_finite_latents, check_world_model_config, same_latents, timesteps_of
from .legacy import Clearable
from .nodes import SearchNodes
from .observer import Observer, SearchBegun
from .roots import RootBatch, RootInference
from .static_engine import StaticEngine
from .static_nodes import StaticNodes
from .validation.validator import Validator

HostLast = tuple[torch.Tensor, Sequence[Any]]
"""A batch of last observations and last actions, as the host's policy keeps one for all environments."""


MOVED_NODES = 4
"""Slots for each row where nodes share histories: only windows that moved need one, and few are in use at
once."""


@dataclass
class Engine:
    """What serves inference while weights keep their dtype and device; made at the first use, never copied or
    saved."""

    manager: KVCacheManager
    flights: Flights
    roots: RootInference
    static: StaticEngine | None = None
    latest: RootBatch | None = None
    by_latent: NodesByLatent | None = None


class KVWorldModel(WorldModel):
    """The host's ``WorldModel``; root and recurrent inference are served by a :class:`KVCacheManager`.

    Training, its losses and the state dict are the host's own: the cache holds no parameter and no buffer.

    Args:
        config: the host's ``world_model_cfg``; ``kv_cache`` in it configures the cache.
        tokenizer: the host's tokenizer.

    Raises:
        ValueError: the cache's configuration is impossible, or does not fit the world model.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self.cache_config = KVCacheConfig.from_world_model_cfg(config)
        check_world_model_config(config)
        self._validation_mode = validation_mode_of(config)
        self._engine: Engine | None = None
        self._validator: Validator | None = None
        self._tally = ValidationTally()
        super().__init__(config, tokenizer)
        self._check_budget()
        self._env_num = self._search_rows = int(config.env_num)
        self._num_simulations = int(config.get('num_simulations', 50))
        self._env_ids: Sequence[int] | None = None
        self._host_last: HostLast | None = None
        self.observers: list[Observer] = []
        # The host's own structures, which other code clears and nothing fills any more.
        self.past_kv_cache_init_infer_envs = [Clearable(self, 'clear_init_caches')]
        self.past_kv_cache_recurrent_infer = Clearable(self, 'clear_recur_cache')
        self.keys_values_wm = self.keys_values_wm_single_env = self.keys_values_wm_single_env_tmp = None

    @property
    def kv_cache_manager(self) -> KVCacheManager:
        """The manager of this world model's caches."""
        return self.engine.manager

    @property
    def engine(self) -> Engine:
        """The engine, made for the dtype and device that the weights have now."""
        if self._engine is None:
            manager = self._make_manager()
            self.keys_values_wm_list = manager.keys_values_wm_list
            self.keys_values_wm_size_list = manager.keys_values_wm_size_list
            flights = self._make_flights(manager)
            self._engine = Engine(manager, flights, RootInference(self, manager, flights))
            if manager.scratch:
                self._engine.static = StaticEngine(
                    self, manager, flights, self.engine_kind, self._search_rows
                )
            if self._validation_mode is not None:
                self._validator = Validator(self, self._validation_mode, self.cache_config, self._tally)
                self.observers.append(self._validator)
        return self._engine

    def _check_budget(self) -> None:
        limiting = limiting_budget(self.cache_config, self.num_layers, Window(self.context_length))
        if limiting is not None and self._validation_mode is not None:
            raise ValueError(
                f'cache_validation_mode={self._validation_mode!r} compares whole histories, and '
                f'kv_cache.budget keeps a part of them: the differences would be its own; leave one of the '
                f'two out'
            )

    @property
    def engine_kind(self) -> Literal['eager', 'compile', 'cudagraph']:
        """How the steps of a search run on the device where the weights are: ``kv_cache.engine``."""
        return self.cache_config.engine_on(self.transformer.ln_f.weight.device.type)

    def _drop_engine(self) -> None:
        """New pools will be made; what watched the old ones forgets them."""
        self._engine = None
        if self._validator is not None:
            self.observers.remove(self._validator)
            self._validator = None
        for observer in self.observers:
            observer.contexts_lost()

    @property
    def validation(self) -> ValidationTally | None:
        """What validation found since the model was made; None where it is off."""
        return None if self._validation_mode is None else self._tally

    @property
    def budgets(self) -> BudgetReading | None:
        """The layer budgets of this moment; None where all tokens are kept, or before the first inference."""
        flights = None if self._engine is None else self._engine.flights
        return flights.reading() if isinstance(flights, BudgetedFlights) else None

    @property
    def validator(self) -> Validator | None:
        """Who compares this model with the old system; None before the first inference, or where validation
        is off."""
        return self._validator

    def _make_manager(self) -> KVCacheManager:
        weight, window = self.transformer.ln_f.weight, Window(self.context_length)
        budget = limiting_budget(self.cache_config, self.num_layers, window)
        shared = budget is not None or shares_histories(self.cache_config, window)
        layers, tokens = self.num_layers, window.kept
        if budget is not None:  # one run of tokens, which the layers divide among themselves
            layers, tokens = 1, budget.sizes(layers, tokens).total
        layout = KVLayout(
            layers=layers,
            heads=self.num_heads,
            head_dim=self.embed_dim // self.num_heads,
            tokens=tokens,
            dtype=weight.dtype,
            device=weight.device,
        )
        return KVCacheManager(
            self.config,
            self._env_num,
            self.cache_config.enable_stats,
            layout=layout,
            cache_config=self.cache_config,
            num_simulations=MOVED_NODES if shared else self._num_simulations,
            scratch=self.engine_kind != 'eager',
        )

    def _make_flights(self, manager: KVCacheManager) -> Flights:
        budget = limiting_budget(self.cache_config, self.num_layers, Window(self.context_length))
        if budget is None:
            return Flights(self, manager, self.cache_config)
        return BudgetedFlights(self, manager, self.cache_config, budget)

    def expect(self, environments: int, num_simulations: int, rows: int | None = None) -> None:
        """Size the pools for a policy: all its collection and evaluation environments, its simulations per
        search, and the most environments that are searched at once (None: all of them).

        Raises:
            ValueError: the cache's configuration has no room for them.
        """
        self._env_num, self._num_simulations = environments, num_simulations
        self._search_rows = environments if rows is None else rows
        self._drop_engine()
        # Allocates nothing; a configuration that cannot serve is refused here and not in a training's midst.
        self._make_manager()

    @contextmanager
    def serving(self, env_ids: Sequence[int], host_last: HostLast | None = None) -> Iterator[None]:
        """Name the environments that the rows of the next root inference belong to.

        ``host_last``: last observations and actions that the host alone would have passed, for validation.
        """
        self._env_ids, self._host_last = list(env_ids), host_last
        try:
            yield
        finally:
            self._env_ids = self._host_last = None

    def end_episodes(self, env_ids: Sequence[int]) -> None:
        """Forget the histories of environments whose episode ended."""
        if self._engine is None:
            return
        for env_id in env_ids:
            self._engine.roots.contexts.discard(env_id)
            self._engine.manager.init_pools[env_id].clear()
        for observer in self.observers:
            observer.episodes_ended(env_ids)

    @torch.no_grad()
    def forward_initial_inference(self, obs_act_dict: dict[str, Any], start_pos: Any = 0) -> tuple[Any, ...]:
        """Root inference; as the host's, for any number of rows, beginning and continued episodes mixed.

        Without ``current_obs`` (targets for training and reanalysis) the host's own cache-free pass answers.
        """
        observations = obs_act_dict['current_obs']
        if observations is None:
            if np.ndim(start_pos) == 0:  # the host's replay buffer for sampled actions passes no timesteps
                start_pos = np.full(len(obs_act_dict['action']), start_pos)
            return super().forward_initial_inference(obs_act_dict, start_pos)
        env_ids = range(len(observations)) if self._env_ids is None else self._env_ids
        engine = self.engine
        if self._validator is not None:
            self._validator.host_last, self._validator.start_pos = self._host_last, start_pos
        with self.clean_on_failure():
            roots, outputs = engine.roots.infer(
                env_ids,
                obs_act_dict['obs'],
                obs_act_dict['action'],
                observations,
                timesteps_of(start_pos, len(observations)),
            )
        engine.manager.clear_recur_cache()  # not before: a refused call leaves the running search as it is
        engine.by_latent, engine.latest = None, roots
        self.latent_state = roots.latents
        return outputs.hidden, self.latent_state, outputs.reward, outputs.policy, outputs.value

    @torch.no_grad()
    def forward_recurrent_inference(
        self,
        state_action_history: list[tuple[np.ndarray, torch.Tensor]],
        simulation_index: int = 0,
        search_depth: Sequence[int] = (),
        start_pos: Any = 0,
    ) -> tuple[Any, ...]:
        """Recurrent inference for callers that name a parent by its latent state alone; as the host's.

        Searches go through :meth:`begin_search`, where the parent is known.
        """
        latents, actions = state_action_history[-1]
        engine = self.engine
        with self.clean_on_failure():
            if engine.by_latent is None or simulation_index == 0:
                nodes = self.begin_search(latents, start_pos, self._num_simulations)
                engine.by_latent = NodesByLatent(self, nodes, latents)
            outputs = engine.by_latent.expand(latents, actions)
        self.latent_state = outputs.latent
        return outputs.hidden, outputs.latent, outputs.reward, outputs.policy, outputs.value

    def begin_search(self, root_latents: np.ndarray, timestep: Any, num_simulations: int) -> SearchNodes:
        """Begin a search from the roots of the latest root inference.

        Roots of anything else (reanalysis) begin with their latent state as their only history, all in one
        batch.

        Args:
            root_latents: ``[B, 1, embed]``.
            timestep: step of the episode of each root.
            num_simulations: children each root will get at most.

        Raises:
            ValueError: a latent state is nan or infinite. Nothing is changed.
            RuntimeError: the nodes of two simulations do not fit into ``max_bytes``.
        """
        engine, rows = self.engine, len(root_latents)
        engine.flights.take_weights()
        latest = None if self.reanalyze_phase else engine.latest
        if latest is not None and not same_latents(latest.latents, root_latents):
            latest = None
        if latest is None:
            check_finite_latents(root_latents)
        engine.manager.clear_recur_cache()
        trees = None
        static = self._static_for(rows, num_simulations)
        if engine.flights.shares_histories and static is None:
            width, most = (1, 1) if latest is None else (int(latest.lengths.max()), latest.tokens.shape[1])
            columns, largest = (
                [tokens + 2 * num_simulations for tokens in engine.flights.widths(longest)]
                for longest in (width, most)
            )
            trees = engine.manager.tree_buffer(rows, columns, largest)
            if trees is None and isinstance(engine.flights, BudgetedFlights):
                raise RuntimeError(
                    f'a search of {rows} rows and {num_simulations} simulations under kv_cache.budget needs '
                    f'{engine.manager.bytes_of_trees(rows, columns):,} bytes beside the pools; raise '
                    f'kv_cache.max_bytes={self.cache_config.max_bytes}'
                )
        if trees is None:
            own = 0 if latest is not None else rows
            engine.manager.reserve_recurrent(rows * num_simulations + own, minimum=2 * rows + own)
        else:
            engine.manager.reserve_recurrent(rows * MOVED_NODES, minimum=rows)
        roots = latest or self._begin_with_latents(root_latents, timestep, store=trees is None)
        capacity = engine.manager.recur_pool.pool_size
        begun = SearchBegun(root_latents, timestep, latest is not None, roots.next_positions, capacity)
        for observer in self.observers:
            observer.search_begun(begun)
        if static is not None:
            return StaticNodes(static, self, engine.manager, engine.flights, roots, num_simulations)
        return SearchNodes(self, engine.manager, engine.flights, roots, num_simulations, trees)

    def _static_for(self, rows: int, num_simulations: int) -> StaticEngine | None:
        """Who serves a search on static shapes, where every node has a slot; None where nobody does, or where
        nodes that share their histories need the memory less."""
        engine = self.engine
        if engine.static is None or not engine.static.serves(rows):
            return None
        most = engine.static.rows * (num_simulations + 1)
        if engine.flights.shares_histories and not engine.manager.can_reserve(most):
            return None
        return engine.static

    def _begin_with_latents(self, root_latents: np.ndarray, timestep: Any, store: bool) -> RootBatch:
        """Histories of one observation each, all computed in one batch, and stored unless the caller keeps
        them."""
        engine, rows = self.engine, len(root_latents)
        layout = engine.manager.layout
        # Long windows of thousands of reanalysed roots would not fit in memory, and hold one token each.
        width = engine.flights.window.kept if engine.flights.host_padding else 1
        latents = torch.as_tensor(root_latents).to(layout.device, layout.dtype).reshape(rows, 1, -1)
        lengths = np.ones(rows, dtype=np.int64)
        next_positions = 2 * np.maximum(timesteps_of(timestep, rows), 0) + 1
        kv = latents.new_zeros(rows, 2 * engine.flights.layers, width, layout.embed_dim)
        engine.flights.recompute(latents, lengths, next_positions, kv[:, :, width - 1 :])
        keys = [NodeKey(row, 0) for row in range(rows)]
        if store:
            engine.manager.store(keys, kv, lengths, next_positions, newest=width)
        return RootBatch(keys, latents, latents, lengths, next_positions, None if store else kv)

    @contextmanager
    def clean_on_failure(self) -> Iterator[None]:
        """Within the block a failure leaves no number behind that a later mask could not hide: 0 * nan is
        nan.

        What is refused (ValueError) was refused before anything was stored, and pools stay as they are. What
        fails on the way (RuntimeError, such as nan from broken weights) empties them; environments stay in
        their episodes.
        """
        engine = self.engine
        try:
            yield
        except Exception as error:
            engine.flights.forget_buffer()
            engine.manager.forget_trees()
            if isinstance(error, RuntimeError):
                engine.latest = engine.by_latent = None
                self.clear_caches()
                self._blank(engine.manager)
            raise

    @staticmethod
    def _blank(manager: KVCacheManager) -> None:
        slab = manager.slab
        if slab.bytes:
            row = torch.zeros(
                manager.layout.batch_shape(1), dtype=manager.layout.dtype, device=manager.layout.device
            )
            slab.store(np.arange(slab.slots), row.expand(slab.slots, *row.shape[1:]))

    def clear_caches(self) -> None:
        """Drop all keys and values, as after an update of the weights; environments stay in their
        episodes."""
        if self._engine is not None:
            self._engine.manager.clear_all()
            self._engine.roots.contexts.forget_tokens()
            self._engine.flights.forget_weights()
        for observer in self.observers:
            observer.caches_cleared()

    def clear_init_caches(self) -> None:
        """Drop the roots' keys and values; each is computed again from its window when it is asked for."""
        if self._engine is not None:
            self._engine.manager.clear_init_caches()
        for observer in self.observers:
            observer.roots_cleared()

    def clear_recur_cache(self) -> None:
        """Drop the nodes of the latest search."""
        if self._engine is not None:
            self._engine.manager.clear_recur_cache()
        for observer in self.observers:
            observer.nodes_cleared()

    def precompute_pos_emb_diff_kv(self) -> None:
        """Nothing to do: the correction is taken from the weights of the moment when a search begins.

        Under validation the host's own is kept beside it, as old as the host would have it.
        """
        if self._validation_mode is not None:
            super().precompute_pos_emb_diff_kv()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.clear_caches()
        if self._engine is not None:
            self._engine.latest = self._engine.by_latent = None

    def _apply(self, *args: Any, **kwargs: Any) -> KVWorldModel:
        super()._apply(*args, **kwargs)
        if self._engine is not None:
            layout, weight = self._engine.manager.layout, self.transformer.ln_f.weight
            if (layout.dtype, layout.device) != (weight.dtype, weight.device):
                self._drop_engine()  # pools follow the weights to their new dtype and device
            else:
                self.clear_caches()  # the host moves its target model to where it is before every sample
        return self

    def __getstate__(self) -> dict[str, Any]:
        fresh = {'_engine': None, '_validator': None, '_tally': ValidationTally(), 'observers': []}
        return {**self.__dict__, **fresh}
