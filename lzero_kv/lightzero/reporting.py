"""Writes the cache's statistics beside the host's own charts, whenever a collector has finished."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lzero_kv.lightzero import ranks
from lzero_kv.telemetry.counters import ValidationCounters
from lzero_kv.telemetry.reading import Moment
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
        report(self, train_iter)

    return _output_log


def report(collector: Any, train_iter: int) -> None:
    """Write what the caches of a collector's policy did since the last time; nothing where its policy keeps
    none.

    Of several processes the first one writes for all where they meet, else each one writes a log of its own.
    """
    try:
        world_models = collector._policy.get_attribute('kv_world_models')
    except NotImplementedError:
        return
    acting = world_models['acting']
    if not (acting.cache_config.tensorboard and acting.cache_config.enable_stats):
        return
    managers = {name: model.kv_cache_manager for name, model in world_models.items()}
    validation, budget = run_counters(world_models), acting.budgets
    together = collector._world_size > 1 and ranks.meet(collector)
    others = ranks.gather(Moment.of(managers, validation, budget)) if together else ()
    sink = _sink(collector, together)
    if sink is not None:
        sink.write(managers, collector.envstep, train_iter, validation, budget, others)


def _sink(collector: Any, together: bool) -> TensorBoardSink | None:
    """The collector's sink; None where another process writes for this one."""
    known, writer = getattr(collector, '_kv_cache_sink', None), collector._tb_logger
    if writer is None and (together or collector._world_size == 1):
        return None
    if known is not None and writer in (None, known.writer):
        return known
    collector._kv_cache_sink = TensorBoardSink(writer or ranks.own_writer(collector))
    return collector._kv_cache_sink


def run_counters(world_models: Mapping[str, Any]) -> ValidationCounters | None:
    """Validation counters of a policy's ``kv_world_models`` together; None without validation."""
    counters = [model.validation for model in world_models.values() if model.validation is not None]
    return sum(counters, ValidationCounters()) if counters else None
