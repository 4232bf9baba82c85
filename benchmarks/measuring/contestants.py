"""Those who are compared: LightZero's own cache, the manager in its modes, and the model alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from lzero_kv.lightzero.inference.attention import Columns, decode
from lzero_kv.lightzero.inference.heads import (
    action_embeddings,
    predict_policy_value,
    predict_reward_latent,
)
from lzero_kv.lightzero.inference.positions import Placed, positions_of
from lzero_kv.lightzero.inference.precision import REDUCED, lacking
from lzero_kv.lightzero.inference.weights import InferenceWeights
from testing.episodes import Episodes
from testing.families import Family
from testing.models import collect_model, make_policy, options_of_device, world_model_of
from testing.recorder import replaced

Read = TypeVar('Read')

Shape = Literal['atari', 'stack4', 'multitask', 'memory', 'lunarlander', 'cartpole']

SHAPES: dict[Shape, Family] = {
    'atari': Family('atari', 2, 8, 768, 8, 8, (3, 64, 64), 6, 50),
    'stack4': Family('stack4', 4, 8, 768, 8, 8, (4, 64, 64), 6, 50, frames=4),
    'multitask': Family('multitask', 8, 24, 768, 8, 8, (3, 64, 64), 18, 50),
    'memory': Family('memory', 4, 4, 256, 8, 162, (3, 5, 5), 4, 50, timesteps=False),
    'lunarlander': Family('lunarlander', 4, 4, 256, 8, 8, 8, 4, 50, timesteps=False),
    'cartpole': Family('cartpole', 2, 2, 64, 8, 8, 4, 2, 25, rotary=True),
}
"""The shapes of LightZero's configs, eight environments each."""

USUAL: tuple[Shape, ...] = ('atari', 'memory', 'lunarlander', 'cartpole')
"""Those that are measured in minutes."""

CACHES: dict[str, dict[str, Any] | None] = {
    'stock': None,
    'rebuild': dict(window='rebuild', backend='eager'),
    'shift': dict(window='shift', backend='eager'),
    'rebuild compiled': dict(window='rebuild', backend='compile'),
    'shift compiled': dict(window='shift', backend='compile'),
}
"""Options of ``kv_cache``; None for LightZero's own."""

GRAPHS: dict[str, dict[str, Any] | None] = {
    'rebuild graph': dict(window='rebuild', backend='cudagraph'),
    'shift graph': dict(window='shift', backend='cudagraph'),
}
"""Those that need a CUDA device."""

PRECISIONS: dict[str, dict[str, Any] | None] = {
    f'{window} {precision}': dict(window=window, backend='eager', precision=precision)
    for window in ('rebuild', 'shift')
    for precision in REDUCED
}
"""Those that plan with large weights of fewer bits, on a CPU."""

EAGER = [name for name, options in CACHES.items() if options is None or options['backend'] == 'eager']
"""Those that compile nothing, which would take minutes at every shape."""


@dataclass
class Contestant:
    """A policy with one of the caches, and the episodes it plays."""

    name: str
    policy: Any
    episodes: Episodes

    @property
    def model(self) -> Any:
        return collect_model(self.policy)

    def simulations(self, number: int) -> None:
        """How many simulations the next searches have."""
        self.policy._mcts_collect._cfg.num_simulations = number

    @contextmanager
    def root_inferences(self, read: Callable[[], Read]) -> Iterator[list[tuple[Read, Read]]]:
        """Meanwhile ``read`` is asked before and after each root inference; both answers."""
        infer, found = self.model.initial_inference, list[tuple[Read, Read]]()

        def initial_inference(*args: Any, **kwargs: Any) -> Any:
            before = read()
            answer = infer(*args, **kwargs)
            found.append((before, read()))
            return answer

        with replaced(self.model, 'initial_inference', initial_inference):
            yield found

    def cache_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values between calls, besides the host's training."""
        world_model = world_model_of(self.policy)
        manager = getattr(world_model, 'kv_cache_manager', None)
        if hasattr(manager, 'bytes'):
            return int(manager.bytes)
        if manager is not None:  # that of LightZero's development branch
            pools = [pool._pool for pool in (*manager.init_pools, manager.recur_pool, manager.wm_pool)]
        else:
            pools = [world_model.shared_pool_recur_infer, world_model.shared_pool_wm]
            pools += world_model.shared_pool_init_infer
        return sum(_bytes_of(entry) for pool in pools for entry in pool if entry is not None)


def caches_on(device: str, compiled: bool) -> list[str]:
    """Who is compared there."""
    return [*(CACHES if compiled else EAGER), *(GRAPHS if device == 'cuda' else [])]


def precisions_of(family: Family, device: str) -> list[str]:
    """Those of :data:`PRECISIONS` that a model of this width is not refused."""
    fit = [name for name in REDUCED if not lacking(name, family.embed)]
    return [name for name in PRECISIONS if name.split()[1] in fit] if device == 'cpu' else []


def contestant(family: Family, cache: str, device: str = 'cpu', **further: Any) -> Contestant:
    """Build a policy of LightZero's own kind with the same random weights for every cache.

    ``further`` are options of ``kv_cache`` beside those of :data:`CACHES`, :data:`GRAPHS` and
    :data:`PRECISIONS`.
    """
    options = (CACHES | GRAPHS | PRECISIONS)[cache]
    with quiet():
        policy = make_policy(
            family,
            kv=options is not None,
            kv_cache=options and options | further,
            **options_of_device(device),
        )
        episodes = Episodes(policy, range(family.collectors), record=False, timesteps=family.timesteps)
    return Contestant(cache, policy, episodes)


def silence_host() -> None:
    """Import the host, which sets the root logger to DEBUG, and set it to WARNING."""
    import lzero.model.unizero_model  # noqa: F401

    logging.getLogger().setLevel(logging.WARNING)


class Floor:
    """The model's own operators on static shapes: no cache is read or written, no tree is walked.

    One encoding of the observations and two tokens for the root, then two tokens and all heads for each
    simulation, over windows of ``tokens`` tokens.
    """

    def __init__(self, family: Family, tokens: int, device: str = 'cpu') -> None:
        self._simulations = family.simulations
        with quiet():
            policy = make_policy(family, kv=True, **options_of_device(device))
        self._world_model = world_model_of(policy)
        self._weights = InferenceWeights(self._world_model)
        size = (family.observation,) if isinstance(family.observation, int) else family.observation
        self._observations = torch.randn(family.collectors, *size, device=device)
        self._actions = torch.zeros(family.collectors, dtype=torch.int64, device=device)
        self._tokens = tokens
        positions = positions_of(self._world_model)
        self._placed: dict[tuple[int, int], Placed] = {}
        for ahead, new in ((0, 2), (0, 1), (1, 1)):
            end = tokens + ahead + new
            at = np.broadcast_to(np.arange(end - new, end), (family.collectors, new))
            self._placed[ahead, new] = positions.at(at, at)
        shape = family.collectors, family.layers, 2, family.heads, tokens + 2, family.embed // family.heads
        self._buffer = torch.randn(*shape, device=device)

    def capture(self) -> Callable[[], object]:
        """A step as one CUDA graph: what the model computes when nothing waits for Python."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    @torch.no_grad()
    def step(self) -> None:
        """What the model computes in one environment step."""
        latent = self._world_model.tokenizer.encode_to_obs_embeddings(self._observations)[:, 0]
        action = action_embeddings(self._world_model, self._actions)
        predict_policy_value(self._weights, self._append(torch.stack([action, latent], dim=1), 0))
        for _ in range(self._simulations):
            action = action_embeddings(self._world_model, self._actions)
            _, latent = predict_reward_latent(self._weights, self._append(action[:, None], 0))
            predict_policy_value(self._weights, self._append(latent[:, None], 1))

    def _append(self, x: torch.Tensor, ahead: int) -> torch.Tensor:
        new = x.shape[1]
        end, placed = self._tokens + ahead + new, self._placed[ahead, new]
        seen = self._buffer[..., :end, :]
        keys, values = (part.unbind(1) for part in seen.unbind(2))
        own = seen[..., end - new :, :].unbind(1)
        columns = Columns(keys, values, own, [None] * len(own))
        return decode(self._weights, columns, placed.add_to(x), placed.rotation)


@contextmanager
def quiet() -> Iterator[None]:
    """The host prints while it builds models and plays."""
    with Path(os.devnull).open('w') as nowhere, redirect_stdout(nowhere):
        yield


def _bytes_of(entry: Any) -> int:
    return sum(
        cache._cache.numel() * cache._cache.element_size()
        for layer in entry._keys_values
        for cache in (layer._k_cache, layer._v_cache)
    )
