"""Drives the host's reanalysis of old episodes with real game segments and the real replay buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .precision import precision
from .recorder import Node, Recorder, replaced
from .repeatable_tree import host_trees, repeatable

MATRIX_PRODUCTS = ('_mkl_linear', 'addmm', 'mm', 'bmm', 'baddbmm', 'linear', '_scaled_dot_product')


@dataclass(frozen=True)
class Reanalysis:
    """One call of the host's policy reanalysis."""

    observations: torch.Tensor
    """Of the roots, [roots, ...]: for each segment, ``num_unroll_steps + 1`` in a row."""
    nodes: tuple[tuple[Node, ...], ...]
    """Per root, in order of expansion."""
    policies: np.ndarray
    """The new policy targets [segments, num_unroll_steps + 1, actions]."""
    products: int | None
    """Matrix products dispatched during the whole call; None where they were not counted."""


class _CountProducts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.products += name in MATRIX_PRODUCTS or name.startswith(MATRIX_PRODUCTS[-1])
        return func(*args, **(kwargs or {}))


def reanalyze(policy: Any, segments: int, *, seed: int = 0, counted: bool = False) -> Reanalysis:
    """Reanalyse ``segments`` synthetic game segments, each longer than the unroll, with the policy's target
    model. To have its products ``counted`` takes as long again.

    Of 'unizero' policies only: the host's reanalysis for 'sampled_unizero' calls its search without a
    timestep and fails.
    """
    from lzero.mcts.buffer.game_buffer_unizero import UniZeroGameBuffer

    config, model = policy._cfg, policy._target_model
    dtype = next(model.world_model.parameters()).dtype
    steps = config.num_unroll_steps
    with precision(dtype):
        buffer = UniZeroGameBuffer(config)
        games = [segment(config, steps + 2, seed, number) for number in range(segments)]
        actions = np.stack([game.action_segment[:steps] for game in games])
        timesteps = np.stack([game.timestep_segment[:steps] for game in games])
        context = buffer._prepare_policy_reanalyzed_context(list(range(segments)), games, [0] * segments)
        buffer.reanalyze_num = segments
        recorder, counter = Recorder(model.world_model, sampled=False), _CountProducts() if counted else None
        watching = counter or nullcontext()
        with _keyed_noise(seed), repeatable(*host_trees()), recorder.attached(), watching:
            compute = buffer._compute_target_policy_reanalyzed
            more = [timesteps] if len(signature(compute).parameters) > 3 else []
            policies = compute(context, model, actions, *more)
    stacks = torch.from_numpy(np.asarray(context[0])).to(dtype)  # [roots, frames, ...]
    observations = stacks.flatten(1) if stacks.ndim == 3 else stacks.flatten(1, 2)
    nodes = tuple(tuple(row) for row in recorder.nodes(len(observations)))
    return Reanalysis(observations, nodes, np.asarray(policies), counter and counter.products)


def segment(config: Any, length: int, seed: int, number: int) -> Any:
    from gymnasium.spaces import Discrete
    from lzero.mcts.buffer.game_segment import GameSegment

    draw = np.random.default_rng([seed, number])
    shape = config.model.observation_shape
    frame = (shape,) if isinstance(shape, int) else (config.model.image_channel, *shape[1:])
    dtype = np.float64 if torch.get_default_dtype() == torch.float64 else np.float32
    stack = config.model.frame_stack_num
    frames = draw.standard_normal((stack + length, *frame)).astype(np.float32).astype(dtype)
    game = GameSegment(Discrete(config.model.action_space_size), length, config)
    game.reset(list(frames[:stack]))
    for step in range(length):
        legal = np.ones(config.model.action_space_size, dtype=np.int8)
        game.append(draw.integers(len(legal)), frames[stack + step], 0.0, legal, -1, step)
        game.store_search_stats(legal.tolist(), 0.0)
    game.game_segment_to_array()
    return game


@contextmanager
def _keyed_noise(seed: int) -> Iterator[None]:
    calls = iter(range(1_000_000))

    def dirichlet(alphas: Any) -> np.ndarray:
        return np.random.default_rng([seed, next(calls)]).dirichlet(alphas)

    with replaced(np.random, 'dirichlet', dirichlet):
        yield
