"""The demo's last searches once more: with LightZero's own cache and with this one, and what each served."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from ding.policy import create_policy

from demonstration.progress import ROUNDS, VALIDATED
from lzero_kv.lightzero.reporting import run_counters
from lzero_kv.telemetry.counters import ValidationCounters


@dataclass(frozen=True)
class Search:
    """What a policy was given for one step of all environments."""

    observations: torch.Tensor
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Beside:
    """The same searches with both caches.

    Attributes:
        searches: batches of searches.
        stock, own: processor seconds of all of them, root inferences included; the faster of the rounds.
        counters: roots and nodes of each, compared with a computation without any cache.
    """

    searches: int
    stock: float
    own: float
    counters: ValidationCounters


def compare(policy: Any, searches: Sequence[Search], seed: int, listener: Callable[[int], None]) -> Beside:
    """Search again with the weights of ``policy``; ``listener`` is told how many batches took as long."""
    off, on = _twin(policy, use_new_cache_manager=False), _twin(policy)
    seconds = [[_play(one, searches, seed, partial(listener, 1)) for one in (off, on)] for _ in range(ROUNDS)]
    stock, own = map(min, zip(*seconds, strict=True))
    # validation runs LightZero's cache and model beside each inference, so it is not timed
    checked = _twin(policy, cache_validation_mode='model')
    _play(checked, searches, seed, partial(listener, VALIDATED))
    counters = run_counters(checked.kv_world_models)
    assert counters is not None
    return Beside(len(searches), stock, own, counters)


def _twin(policy: Any, **world_model: Any) -> Any:
    """A policy of the same weights, with empty caches and other options of the world model."""
    config = copy.deepcopy(policy._cfg)
    config.model.world_model_cfg.update(world_model)
    twin: Any = create_policy(config, enable_field=['learn', 'collect', 'eval'])
    twin._collect_model.load_state_dict(policy._collect_model.state_dict())
    twin.recompute_pos_emb_diff_and_clear_cache()  # as LightZero does after learning
    twin._collect_model.eval()
    return twin


def _play(policy: Any, searches: Sequence[Search], seed: int, listener: Callable[[], None]) -> float:
    """Processor seconds of the searches; noise and actions are drawn from ``seed``."""
    np.random.seed(seed)
    policy.collect_mode.reset()
    seconds = 0.0
    for search in searches:
        begun = time.process_time()
        policy.collect_mode.forward(search.observations, *search.arguments, **search.options)
        seconds += time.process_time() - begun
        listener()
    return seconds
