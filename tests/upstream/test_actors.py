"""Asynchronous collection: the actors that Ray starts keep caches, and drop them with the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testing.models import buildable_vector_model, collect_model, random_weights, world_model_of


def actor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Main's collector actor on CartPole, in this process: Ray would only put it into another."""
    monkeypatch.setitem(sys.modules, 'ray', SimpleNamespace(remote=lambda kind: kind))
    from cartpole_unizero_kv_config import make_config
    from ding.config import compile_config
    from lzero.entry.async_muzero.actors import MuZeroSegmentCollectorActor

    main, create = make_config('CartPole-v0', seed=0, smoke=True)
    main.policy.model.world_model_cfg |= dict(
        cache_validation_mode='recompute', kv_cache=dict(validation_rate=1.0)
    )
    main.policy |= dict(
        collect_num_simulations=8, eval_num_simulations=8, num_segments=2, game_segment_length=9
    )
    sys.modules.pop('lzero_kv.plugin', None)  # another test may have imported and uninstalled it
    config = compile_config(main, seed=0, auto=True, create_cfg=create, save_cfg=False)
    with buildable_vector_model():
        return MuZeroSegmentCollectorActor(config, create, seed=0)


def test_an_actor_serves_no_context_of_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = actor(monkeypatch)
    world_model, policy = world_model_of(mine._policy), dict(temperature=1.0, epsilon=0.0)
    steps = 0
    for version, seed in ((0, 0), (0, 0), (1, 1)):
        weights = random_weights(collect_model(mine._policy), seed)
        steps += mine.collect(weights, version, version, 0, policy)['envstep_delta']
    mine.close()
    counted = world_model.validation
    assert counted.total.cache_wrong == 0
    assert counted.roots.compared >= steps > 30
    assert counted.nodes.compared > 0
    roots = world_model.kv_cache_manager.stats_snapshot()['roots']
    assert roots.hits > 20 and 0 < roots.misses <= 2, 'the windows of both environments, once'
