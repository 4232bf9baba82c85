"""Takes a sample of a running training every few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from demonstration.progress import TrainingProgress
from demonstration.watch import watching

from lzero_kv.cli.training import around
from soaking.memory import resident_bytes


@dataclass(frozen=True)
class Sample:
    """One moment of a training.

    Attributes:
        seconds: since the training began.
        resident_bytes: memory of the process, after what nothing refers to was given back (see
            :func:`~soaking.memory.resident_bytes`).
        replay_bytes: observations that the host's replay buffer holds.
        pool_bytes: memory of the tensors of all pools, acting and reanalysis.
        search_seconds: median processor time of one collection search of all environments since the last
            sample, None where there was none.
        env_steps: environment steps collected and evaluated so far.
        train_iterations: training iterations so far.
        compared, different, unexplained, cache_wrong: rows of the validation so far.
    """

    seconds: float
    resident_bytes: int
    replay_bytes: int
    pool_bytes: int
    search_seconds: float | None
    env_steps: int
    train_iterations: int
    compared: int
    different: int
    unexplained: int
    cache_wrong: int

    @property
    def own_bytes(self) -> int:
        """Memory of the process without the observations of the replay buffer."""
        return self.resident_bytes - self.replay_bytes


class TimeIsUp(BaseException):
    """Ends the training; no Exception, so that nothing on the way catches it by accident."""


@dataclass
class Recorder:
    """Takes samples of the training that runs within :meth:`recording`.

    Attributes:
        minutes: after which the training ends.
        every_seconds: between two samples.
        show: called with each sample.
        progress: what the training has done.
        samples: those taken.
    """

    minutes: float
    every_seconds: float
    show: Callable[[Sample], None]
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    samples: list[Sample] = field(default_factory=list)
    policy: Any = None
    replay: Any = None
    _searches: list[float] = field(default_factory=list)
    _begun: float = field(default_factory=time.monotonic)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the block: take samples, and end the training by :class:`TimeIsUp`."""
        from lzero.mcts.buffer.game_buffer import GameBuffer

        from lzero_kv.lightzero.policy import KVPolicy

        self.progress.listener = self._took_step
        with ExitStack() as stack:
            stack.enter_context(watching(self.progress))
            stack.enter_context(around(KVPolicy, '_forward_collect', self._timed_search))
            stack.enter_context(around(GameBuffer, 'remove_oldest_data_to_fit', self._fit))
            yield

    def _fit(self, original: Any, replay: Any) -> None:
        self.replay = replay
        original(replay)

    def _timed_search(self, original: Any, policy: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        self.policy = policy
        begun = time.process_time()  # other programs on the machine do not count
        output = original(policy, data, *args, **kwargs)
        if len(data) == int(policy._cfg.collector_env_num):  # fewer environments take less time
            self._searches.append(time.process_time() - begun)
        return output

    def _took_step(self) -> None:
        now = time.monotonic() - self._begun
        last = self.samples[-1].seconds if self.samples else 0.0
        if self.policy is not None and now - last >= self.every_seconds:
            self._take(now)
        if now >= 60 * self.minutes:
            raise TimeIsUp

    def _take(self, now: float) -> None:
        from lzero_kv.lightzero.reporting import run_counters
        from lzero_kv.telemetry.counters import ValidationCounters

        models = self.policy.kv_world_models
        total = (run_counters(models) or ValidationCounters()).total
        sample = Sample(
            seconds=now,
            resident_bytes=resident_bytes(),
            replay_bytes=0 if self.replay is None else replay_bytes(self.replay),
            pool_bytes=sum(
                model.kv_cache_manager.get_stats_summary()['total']['bytes'] for model in models.values()
            ),
            # Of all searches, of which few are compared: the median is that of one without a comparison.
            search_seconds=statistics.median(self._searches) if self._searches else None,
            env_steps=self.progress.collected_steps + self.progress.evaluated_steps,
            train_iterations=self.progress.train_iterations,
            compared=total.compared,
            different=total.different,
            unexplained=total.unexplained,
            cache_wrong=total.cache_wrong,
        )
        self._searches.clear()
        self.samples.append(sample)
        self.show(sample)


def replay_bytes(replay: Any) -> int:
    """Observations that a replay buffer of the host holds.

    They grow in LightZero 0.2.0, with any cache: for each segment that leaves, the buffer takes more
    transitions out of its index than the segment brought, so the number of transitions is bounded as
    configured, and that of segments is not.
    """
    return sum(np.asarray(segment.obs_segment).nbytes for segment in replay.game_segment_buffer)
