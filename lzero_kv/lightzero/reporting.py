"""Writes the cache's statistics beside the host's own charts, whenever a collector has finished."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lzero_kv.telemetry.counters import ValidationCounters
from lzero_kv.telemetry.tensorboard import TensorBoardSink


def replace_collector_logs(replace: Callable[[Any, str, Any], None]) -> None:
    """Let the host's collectors write cache statistics after their own; ``replace(owner, name, value)`` sets
    an attribute."""
    from lzero.worker import MuZeroCollector, MuZeroSegmentCollector

    for collector in (MuZeroCollector, MuZeroSegmentCollector):
        replace(collector, '_output_log', _logging(collector._output_log))


def _logging(original: Any) -> Any:
    @functools.wraps(original)
    def _output_log(self: Any, train_iter: int) -> None:
        original(self, train_iter)
        if self._rank == 0 and self._tb_logger is not None:
            report(self, train_iter)

    return _output_log


def report(collector: Any, train_iter: int) -> None:
    """Write what the caches of a collector's policy did since the last time; nothing where its policy keeps
    none."""
    try:
        world_models = collector._policy.get_attribute('kv_world_models')
    except NotImplementedError:
        return
    acting = world_models['acting']
    if not (acting.cache_config.tensorboard and acting.cache_config.enable_stats):
        return
    sink = getattr(collector, '_kv_cache_sink', None)
    if sink is None or sink.writer is not collector._tb_logger:
        sink = collector._kv_cache_sink = TensorBoardSink(collector._tb_logger)
    sink.write(
        {name: model.kv_cache_manager for name, model in world_models.items()},
        env_step=collector.envstep,
        train_iter=train_iter,
        validation=run_counters(world_models),
        budget=acting.budgets,
    )


def run_counters(world_models: Mapping[str, Any]) -> ValidationCounters | None:
    """Validation counters of a policy's ``kv_world_models`` together; None without validation."""
    counters = [model.validation for model in world_models.values() if model.validation is not None]
    return sum(counters, ValidationCounters()) if counters else None
