"""Where a training stands; light to import, so that the screen can show it before torch is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lzero_kv import KVCacheManager

STEPS = 20  # batches of searches that are made again at the end; windows are full from the fourth on
ROUNDS = 2  # of each cache, in turn
ITERATION = 10  # batches of searches that take as long as a training iteration of the demo's size
VALIDATED = 10  # the same for a batch that is validated
COMPARED = STEPS * (2 * ROUNDS + VALIDATED)


@dataclass
class TrainingProgress:
    """What a training has done so far, kept up to date by `demonstration.watch.watching`."""

    phase: str = 'loading torch and LightZero'
    collected_steps: int = 0
    evaluated_steps: int = 0
    train_iterations: int = 0
    searches_done: int = 0  # batches, those of the comparison after the training included
    returns: list[float] = field(default_factory=list)  # mean episode return of each evaluation
    manager: KVCacheManager | None = (
        None  # of the model that collects and evaluates; None while the cache is off
    )
    policy: Any = None  # that collects
    searches: list[Any] = field(default_factory=list)  # the first ones of the latest collection
    beside: Any = None  # those searches with both caches, at the end
    listener: Callable[[], None] = lambda: None  # called after every batch of searches and training iteration

    @property
    def work(self) -> int:
        """What was done, in batches of searches."""
        return self.searches_done + ITERATION * self.train_iterations

    def searched(self, batches: int = 1) -> None:
        """Count a batch of searches, or one that takes as long as several."""
        self.searches_done += batches
        self.listener()

    def find_manager(self, policy: Any) -> None:
        """Keep the cache manager behind a policy's mode functions, if it has one."""
        try:
            self.manager = policy.get_attribute('kv_world_models')['acting'].kv_cache_manager
        except NotImplementedError:
            self.manager = None

    def statistics(self) -> dict[str, Any]:
        """The manager's statistics by pool; empty while there is no manager, or one that keeps none."""
        summary = self.manager.get_stats_summary() if self.manager is not None else {}
        return summary if summary.get('stats_enabled') else {}
