"""Writes the cache's statistics beside the host's own charts, whenever a collector has finished."""

from __future__ import annotations

import functools
import time
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
        replace(collector, 'collect', _collecting(collector.collect))


def _logging(original: Any) -> Any:
    @functools.wraps(original)
    def _output_log(self: Any, train_iter: int) -> None:
        original(self, train_iter)
        report(self, train_iter)

    return _output_log


def _collecting(original: Any) -> Any:
    """A collection whose seconds are known when it is reported, which is before it returns."""

    @functools.wraps(original)
    def collect(self: Any, *args: Any, **kwargs: Any) -> Any:
        models = _world_models(self)
        if models is not None:
            self._kv_collection = time.perf_counter(), models['acting'].timings.snapshot()
        return original(self, *args, **kwargs)

    return collect


def _world_models(collector: Any) -> Mapping[str, Any] | None:
    """Those of a policy that keeps caches; None for another."""
    try:
        return collector._policy.get_attribute('kv_world_models')
    except NotImplementedError:
        return None


def report(collector: Any, train_iter: int) -> None:
    """Write what the caches of a collector's policy did since the last time; nothing where its policy keeps
    none.

    Of several processes the first one writes for all where they meet, else each one writes a log of its own.
    """
    world_models = _world_models(collector)
    if world_models is None:
        return
    acting = world_models['acting']
    begun = vars(collector).pop('_kv_collection', None)
    if begun is not None:
        acting.timings.count_collection(time.perf_counter() - begun[0], begun[1])
    if not (acting.cache_config.tensorboard and acting.cache_config.enable_stats):
        return
    managers = {name: model.kv_cache_manager for name, model in world_models.items()}
    validation, budget = run_counters(world_models), acting.budgets
    together = collector._world_size > 1 and ranks.meet(collector)
    others = ranks.gather(Moment.of(managers, validation, budget, acting.timings)) if together else ()
    sink = _sink(collector, together)
    if sink is not None:
        sink.write(managers, collector.envstep, train_iter, validation, budget, others, acting.timings)


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
