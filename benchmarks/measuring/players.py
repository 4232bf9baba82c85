"""What is done with a contestant: it begins, warms up, takes timed steps, and is looked at closely."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from testing.models import world_model_of

from .contestants import Contestant, Floor, quiet
from .instruments import HostReads, Memory, Operators, Split, clock, timed

Numbers = dict[str, Any]
MIB = 2**20


class Player:
    """A contestant of this process. One in another process answers to the same calls."""

    def __init__(self, contestant: Contestant, simulations: int) -> None:
        self.contestant = contestant
        self.name = contestant.name
        self._full = simulations

    def begin(self) -> list[float]:
        """Play the first step, with one simulation; the value the model predicts for each root."""
        self.contestant.simulations(1)
        with quiet():
            return [root.predicted_value for root in self.contestant.episodes.step()]

    def warm_up(self, steps: int) -> None:
        """Play ``steps`` steps with one simulation each, which fill the windows, and a full one.

        Raises RuntimeError when the full one searched less or more than it should.
        """
        self.contestant.simulations(1)
        with quiet():
            for _ in range(steps):
                self.contestant.episodes.step()
            self.contestant.simulations(self._full)
            searched = {sum(root.visits) for root in self.contestant.episodes.step()}
        if searched != {self._full}:
            raise RuntimeError(f'{self.name}: expected {self._full} simulations of each root, got {searched}')

    def threads(self, number: int) -> None:
        """Threads of the next steps."""
        torch.set_num_threads(number)

    def step(self) -> tuple[float, float]:
        """Milliseconds of one environment step, and of the root inference in it."""
        with quiet(), self.contestant.root_inferences(clock) as roots:
            whole = timed(self.contestant.episodes.step)
        begun, ended = roots[0]
        return whole, (ended - begun) * 1000

    def visits(self) -> list[np.ndarray]:
        """Play one step; the visit counts of each root's actions."""
        with quiet():
            return [np.array(root.visits, dtype=float) for root in self.contestant.episodes.step()]

    def split(self, steps: int = 3) -> dict[str, float]:
        """Seconds of ``steps`` steps by part; watching makes them a little slower than timed ones."""
        split = Split()
        with quiet(), split.watching():
            for _ in range(steps):
                self.contestant.episodes.step()
        return dict(split.seconds)

    def look_closer(self) -> Numbers:
        """What a step and one more simulation are made of; slower than a timed step."""
        numbers = self.counts()
        seconds = self.split()
        total = sum(seconds.values())
        numbers['share_of_time'] = {part: round(of / total, 3) for part, of in seconds.items()}
        return numbers

    def counts(self) -> Numbers:
        """What can be counted, and repeats exactly: the difference of a search and of half of it, by
        simulation; memory of the full step; hit rates since the beginning.
        """
        halves = [self._counted(self._full // 2), self._counted(self._full)]
        more = self._full - self._full // 2
        numbers: Numbers = {
            f'{name}_per_simulation': round((halves[1][name] - halves[0][name]) / more, 3)
            for name in halves[0]
            if not name.startswith('step_')
        }
        numbers |= {name: round(value, 3) for name, value in halves[1].items() if name.startswith('step_')}
        numbers['cache_mib'] = round(self.contestant.cache_bytes() / MIB, 3)
        return numbers | self._hits()

    def _counted(self, simulations: int) -> dict[str, float]:
        self.contestant.simulations(simulations)
        step = self.contestant.episodes.step
        with quiet():
            with Operators() as operators, HostReads() as reads:
                step()
            with Memory() as memory:
                step()
        return {
            'operators': operators.count,
            'mib_moved': operators.bytes_moved / MIB,
            'host_reads': reads.count,
            'allocations': memory.allocations,
            'mib_allocated': memory.allocated / MIB,
            'step_peak_mib': memory.peak / MIB,
            'step_kept_mib': memory.kept / MIB,
        } | memory.device_counts

    def _hits(self) -> Numbers:
        world_model = world_model_of(self.contestant.policy)
        if not hasattr(getattr(world_model, 'kv_cache_manager', None), 'stats_snapshot'):
            return {}
        stats = world_model.kv_cache_manager.stats_snapshot()
        numbers = {f'{kind}_hit_rate': round(of.hit_rate, 4) for kind, of in stats.items()}
        tokens = stats['nodes'].window_tokens / max(1, stats['nodes'].queries)
        return numbers | {'window_tokens_per_node_query': round(tokens, 3)}


class FloorPlayer:
    """The model alone, timed as the others are; ``captured`` as one CUDA graph."""

    def __init__(self, floor: Floor, captured: bool = False) -> None:
        self.name = 'floor graph' if captured else 'floor'
        self._step = floor.capture() if captured else floor.step
        self._step()

    def threads(self, number: int) -> None:
        """Threads of the next steps."""
        torch.set_num_threads(number)

    def step(self) -> tuple[float, float]:
        """Milliseconds of one environment step; it has no root inference of its own to tell apart."""
        return timed(self._step), float('nan')
