"""A real manager doing a training's work in small, and the log it leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.config import KVCacheConfig
from lzero_kv.telemetry.tensorboard import TensorBoardSink

LAYERS, HEADS, EMBED, TOKENS, ENVIRONMENTS, SIMULATIONS = 2, 3, 12, 8, 4, 5
WORLD_MODEL = SimpleNamespace(num_layers=LAYERS, num_heads=HEADS, embed_dim=EMBED, context_length=TOKENS)


def make_manager(nodes: int | None = 11, **choices: object) -> KVCacheManager:
    """A manager whose recurrent pool holds `nodes` entries: fewer than a search makes, so that it evicts."""
    config = KVCacheConfig(window_slots=nodes, **choices)
    return KVCacheManager(WORLD_MODEL, ENVIRONMENTS, cache_config=config, num_simulations=SIMULATIONS)


def env_step(manager: KVCacheManager, step: int) -> None:
    """One step of all environments: root lookup and store, then a search that looks up its parents."""
    rows = range(ENVIRONMENTS)
    last = manager.lookup([RootKey(row, 1000 * row + step - 1) for row in rows])
    manager.count_rebuilt(3 * int((last == NO_SLOT).sum()), roots=True)
    for row in rows:
        manager.count_step(2, 5 + row, env_id=row)
    _store(manager, [RootKey(row, 1000 * row + step) for row in rows])
    manager.clear_recur_cache()
    _store(manager, [NodeKey(row, 0) for row in rows])
    for simulation in range(SIMULATIONS):
        found = manager.lookup([NodeKey(row, (simulation * (row + 1)) // 2) for row in rows])
        manager.count_rebuilt(2 * int((found == NO_SLOT).sum()), roots=False)
        manager.count_step(2 * ENVIRONMENTS, 7 * int((found != NO_SLOT).sum()))
        _store(manager, [NodeKey(row, simulation + 1) for row in rows])


def write_experiment(experiment: Path, points: int = 6, *, reanalysis: bool = False) -> Path:
    """Write a log as a LightZero training does, into `<experiment>/log/serial`; returns that folder."""
    folder = experiment / 'log' / 'serial'
    manager, target = make_manager(), make_manager(nodes=40) if reanalysis else None
    managers = {'acting': manager, **({'reanalysis': target} if target is not None else {})}
    with SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer)
        for point in range(points):
            for step in range(5 * point, 5 * point + 5):
                env_step(manager, step)
            if target is not None:
                env_step(target, point)
            writer.add_scalar('collector_step/reward_mean', point - 21.0, 20 * (point + 1))
            sink.write(managers, env_step=20 * (point + 1), train_iter=7 * (point + 1))
    return folder


def write_stock_experiment(experiment: Path) -> Path:
    """Write a log without a chart of the cache, as a training without the plugin does."""
    folder = experiment / 'log' / 'serial'
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar('collector_step/reward_mean', -21.0, 20)
    return folder


def _store(manager: KVCacheManager, keys: list[RootKey] | list[NodeKey]) -> None:
    count = len(keys)
    kv = torch.zeros(count, 2 * LAYERS, HEADS, TOKENS, EMBED // HEADS)
    manager.store(keys, kv, np.full(count, 2, dtype=np.int64), np.full(count, 2, dtype=np.int64))
