"""LightZero's world model with the cache manager in place of its dictionaries and rings."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lzero.model.unizero_world_models.world_model import WorldModel

from lzero_kv.budget import BudgetSnapshot
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.lightzero.inference.events import Observer
from lzero_kv.lightzero.inference.expand import Search, SearchByLatent
from lzero_kv.lightzero.inference.inputs import RootInputs, timesteps_of
from lzero_kv.lightzero.inference.resources import make_manager
from lzero_kv.lightzero.inference.session import InferenceSession, check_room
from lzero_kv.lightzero.settings import choices_of
from lzero_kv.telemetry.counters import Timings

if TYPE_CHECKING:
    from lzero_kv.telemetry.counters import ValidationCounters

HostLast = tuple[torch.Tensor, Sequence[Any]]
"""A batch of last observations and last actions, as the host's policy keeps one for all environments."""


class Clearable:
    """Stands for one of the host's cache dictionaries: empty, and clears the manager's pools when it is
    cleared.

    Args:
        owner: the object that keeps the pools.
        method: name of its method that clears them.
    """

    def __init__(self, owner: Any, method: str) -> None:
        self._owner = owner
        self._method = method

    def clear(self) -> None:
        """Clear what this name stands for."""
        getattr(self._owner, self._method)()


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
        self.cache_config, self._validation_mode = choices_of(config)
        self._session: InferenceSession | None = None
        self._validator: Any = None
        self.timings = Timings()
        self._counters = None if self._validation_mode is None else _validation().ValidationCounters()
        super().__init__(config, tokenizer)
        self._env_num = self._search_rows = int(config.env_num)
        self._num_simulations = int(config.get('num_simulations', 50))
        self._env_ids: Sequence[int] | None = None
        self._host_last: HostLast | None = None
        self.observers: list[Observer] = []
        self.keys_values_wm = self.keys_values_wm_single_env = self.keys_values_wm_single_env_tmp = None

    def _initialize_cache_structures(self) -> None:
        """The host's own structures: other code clears them, and they stay empty."""
        self.use_new_cache_manager = True
        self.past_kv_cache_init_infer_envs = [Clearable(self, 'clear_init_caches')]
        self.past_kv_cache_recurrent_infer = Clearable(self, 'clear_recur_cache')
        self.keys_values_wm_list, self.keys_values_wm_size_list = [], []

    @property
    def kv_cache_manager(self) -> KVCacheManager:
        """The manager of this world model's caches."""
        return self.session.manager

    @property
    def session(self) -> InferenceSession:
        """The session, made for the dtype and device that the weights have now."""
        if self._session is None:
            # a search may be the first to ask; tensors made in its inference mode could not be written to
            # outside it
            with torch.inference_mode(False):
                self._session = InferenceSession(
                    self, self._env_num, self._num_simulations, self._search_rows
                )
            manager = self._session.manager
            self.keys_values_wm_list = manager.keys_values_wm_list
            self.keys_values_wm_size_list = manager.keys_values_wm_size_list
            if self._validation_mode is not None:
                self._validator = _validation().Validator(
                    self, self._validation_mode, self.cache_config, self._counters
                )
                self.observers.append(self._validator)
        return self._session

    @property
    def backend(self) -> Literal['eager', 'compile', 'cudagraph']:
        """How the steps of a search run: ``kv_cache.backend``, on the device that the weights have now."""
        return self.cache_config.backend_on(self.transformer.ln_f.weight.device)

    def _drop_session(self) -> None:
        """New pools will be made; what watched the old ones forgets them."""
        self._session = None
        if self._validator is not None:
            self.observers.remove(self._validator)
            self._validator = None
        for observer in self.observers:
            observer.contexts_lost()

    @property
    def validation(self) -> ValidationCounters | None:
        """Counters of the validation since the model was made; None without ``cache_validation_mode``."""
        return self._counters

    @property
    def budgets(self) -> BudgetSnapshot | None:
        """The layer budgets of this moment; None where all tokens are kept, or before the first inference."""
        budget = None if self._session is None else self._session.budget
        return None if budget is None else budget.snapshot()

    @property
    def validator(self) -> Any:
        """The observer that compares this model with the stock one; None before the first inference, and
        without ``cache_validation_mode``."""
        return self._validator

    @property
    def stock(self) -> Any:
        """The stock world model that validation keeps beside this one; None where it keeps none."""
        return None if self._validator is None else self._validator.stock

    def expect(self, environments: int, num_simulations: int, rows: int | None = None) -> None:
        """Size the pools for a policy: all its collection and evaluation environments, its simulations per
        search, and the most environments that are searched at once (None: all of them).

        Raises:
            ValueError: the cache's configuration has no room for them. Nothing is changed.
        """
        rows = environments if rows is None else rows
        # Allocates nothing; a configuration that cannot serve is refused here and not in a training's midst.
        weight = self.transformer.ln_f.weight
        manager = make_manager(
            self.config, self.cache_config, weight.dtype, weight.device, environments, num_simulations
        )
        check_room(manager, self.config, rows)
        self._env_num, self._num_simulations, self._search_rows = environments, num_simulations, rows
        self._drop_session()

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
        if self._session is None:
            return
        for env_id in env_ids:
            self._session.roots.contexts.discard(env_id)
            self._session.manager.init_pools[env_id].clear()
        for observer in self.observers:
            observer.episodes_ended(env_ids)

    @torch.no_grad()
    def forward_initial_inference(self, obs_act_dict: dict[str, Any], start_pos: Any = 0) -> tuple[Any, ...]:
        """Root inference; as the host's, for any number of rows, beginning and continued episodes mixed.

        Without ``current_obs`` (targets for training and reanalysis) the host's own cache-free pass answers.
        """
        begun = time.perf_counter()
        observations = obs_act_dict['current_obs']
        if observations is None:
            if np.ndim(start_pos) == 0:  # the host's replay buffer for sampled actions passes no timesteps
                start_pos = np.full(len(obs_act_dict['action']), start_pos)
            return super().forward_initial_inference(obs_act_dict, start_pos)
        env_ids = obs_act_dict.get('ready_env_id') if self._env_ids is None else self._env_ids
        # a tensor's numbers are no keys: each is another object
        env_ids = range(len(observations)) if env_ids is None else list(map(operator.index, env_ids))
        session = self.session
        if self._validator is not None:
            self._validator.stock_last, self._validator.start_pos = self._host_last, start_pos
        with self.clean_on_failure():
            given = RootInputs(
                env_ids,
                obs_act_dict['obs'],
                obs_act_dict['action'],
                observations,
                timesteps_of(start_pos, len(observations)),
            )
            roots, outputs = session.roots.infer(given.copied())
        session.manager.clear_recur_cache()  # not before: a refused call leaves the running search as it is
        session.by_latent, session.latest = None, roots
        self.latent_state = roots.latents
        self.timings.count_roots(time.perf_counter() - begun)
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
        session = self.session
        with self.clean_on_failure():
            if session.by_latent is None or simulation_index == 0:
                search = self.begin_search(latents, start_pos, self._num_simulations)
                session.by_latent = SearchByLatent(self, search, latents)
            outputs = session.by_latent.expand(latents, actions)
        self.latent_state = outputs.latent
        return outputs.hidden, outputs.latent, outputs.reward, outputs.policy, outputs.value

    def begin_search(self, root_latents: np.ndarray, timestep: Any, num_simulations: int) -> Search:
        """Begin a search from the roots of the latest root inference.

        Roots of anything else (reanalysis) begin with their latent state as their only history, all in one
        batch.

        Args:
            root_latents: ``[B, 1, embed]``.
            timestep: step of the episode of each root.
            num_simulations: children each root will get at most.

        Raises:
            ValueError: a latent state is nan or infinite. Nothing is changed.
            RuntimeError: what the rows need at once does not fit into ``max_bytes`` or ``window_slots``, or
                there is no memory.
        """
        return self.session.begin_search(root_latents, timestep, num_simulations)

    @contextmanager
    def clean_on_failure(self) -> Iterator[None]:
        """Within the block a failure leaves no number behind that a later mask could not hide: 0 * nan is
        nan.

        What is refused (ValueError) was refused before anything was stored, and pools stay as they are. What
        fails on the way (RuntimeError, such as nan from broken weights) empties them; environments stay in
        their episodes. A step that is taken again begins a new history, with its last observation.
        """
        session = self.session
        try:
            yield
        except RuntimeError:
            session.forget_search()
            self.clear_caches()
            session.blank()
            raise

    def clear_caches(self) -> None:
        """Drop all keys and values, as after an update of the weights; environments stay in their
        episodes."""
        if self._session is not None:
            self._session.forget_weights()
        for observer in self.observers:
            observer.caches_cleared()

    def clear_init_caches(self) -> None:
        """Drop the roots' keys and values; each is computed again from its window when it is asked for."""
        if self._session is not None:
            self._session.manager.clear_init_caches()
        for observer in self.observers:
            observer.roots_cleared()

    def clear_recur_cache(self) -> None:
        """Drop the nodes of the latest search."""
        if self._session is not None:
            self._session.manager.clear_recur_cache()
        for observer in self.observers:
            observer.nodes_cleared()

    def precompute_pos_emb_diff_kv(self) -> None:
        """Nothing to do: the correction is taken from the weights of the moment when a search begins.

        Under validation the host's own is kept beside it, as old as the host would have it.
        """
        if self._validation_mode in ('store', 'model'):
            super().precompute_pos_emb_diff_kv()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.clear_caches()
        if self._session is not None:
            self._session.forget_search()

    def _apply(self, *args: Any, **kwargs: Any) -> KVWorldModel:
        super()._apply(*args, **kwargs)
        if self._session is not None:
            layout, weight = self._session.manager.layout, self.transformer.ln_f.weight
            if (layout.dtype, layout.device) != (weight.dtype, weight.device):
                self._drop_session()  # pools follow the weights to their new dtype and device
            else:
                self.clear_caches()  # the host moves its target model to where it is before every sample
        return self

    def __getstate__(self) -> dict[str, Any]:
        counters = None if self._counters is None else type(self._counters)()
        fresh = {
            'timings': Timings(),
            '_session': None,
            '_validator': None,
            '_counters': counters,
            'observers': [],
        }
        return {**self.__dict__, **fresh}


def _validation() -> Any:
    """The validator's module, loaded only where ``cache_validation_mode`` asks for it."""
    from lzero_kv.validation import validator

    return validator
