"""One training of a comparison, in a process of its own: `python -m lzero_kv.cli.compare_run`; see
:mod:`lzero_kv.cli.child`."""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from lzero_kv.cli.bounded_training import Progress, around, bounded, every
from lzero_kv.cli.child import serve, tell
from lzero_kv.cli.engagement import alone
from lzero_kv.cli.training_call import training_call

PROGRESS_SECONDS = 0.5
UNBOUNDED = 10**10
STOCK, PLUGIN = 'stock', 'lzero_kv'
SEARCH, ROOTS, SAMPLING, LEARNING, WHOLE = (
    'search',
    'root inference',
    'sampling',
    'learning',
    'whole training',
)
PARTS = (SEARCH, ROOTS, SAMPLING, LEARNING)
"""Parts that are timed; they do not overlap. A search inside sampling (reanalysis) counts as sampling."""


@dataclass(frozen=True)
class Request:
    """One training.

    Attributes:
        config: the config file.
        arguments: of the config file's command line.
        arm: ``STOCK`` or ``PLUGIN``: flag off or on.
        seed: of the training.
        env_steps: collected environment steps after which the host ends it, with the collection and the
            learning that have begun.
        folder: where the host writes.
    """

    config: str
    arguments: tuple[str, ...]
    arm: str
    seed: int
    env_steps: int
    folder: str


class Clock:
    """Processor and wall seconds of the parts of a training.

    On a GPU a part ends when the host's call returns: a search reads its answers and has waited for all of
    its work, other parts may leave work behind that the next one waits for.
    """

    def __init__(self) -> None:
        self.processor: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the seconds of the block under ``part``."""
        begun = time.process_time(), time.perf_counter()
        try:
            yield
        finally:
            self.processor[part] += time.process_time() - begun[0]
            self.wall[part] += time.perf_counter() - begun[1]

    def timed(self, part: str, original: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function under the clock."""
        with self.timing(part):
            return original(*args, **kwargs)

    def watch_acting(self, policy: Any) -> None:
        """Put the clock around the searches and root inferences of a policy that collects, stock or not."""
        policy._mcts_collect.search = partial(self.timed, SEARCH, policy._mcts_collect.search)
        model = policy._collect_model
        model.initial_inference = partial(self.timed, ROOTS, model.initial_inference)


def run(request: Request, report: TextIO) -> dict[str, Any]:
    """Train, and return the row of the comparison."""
    folder = Path(request.folder) / 'training' / f'{request.arm}_{request.seed}'
    given = training_call(Path(request.config), request.arguments)
    call, _ = alone(given, request.config, folder, flag=request.arm == PLUGIN)
    call.config['policy']['model']['world_model_cfg'].pop('cache_validation_mode', None)
    sys.path.insert(0, str(Path(request.config).resolve().parent))  # as `python CONFIG` has it
    import lzero.entry

    progress = Progress(UNBOUNDED, every(PROGRESS_SECONDS, partial(_tell, report)), evaluates=False)
    clock, returns, whole = Clock(), [], ExitStack()
    options = {**call.options, 'seed': request.seed, 'max_env_step': request.env_steps}
    with whole, _watched(call, progress, clock, whole, returns):
        getattr(lzero.entry, call.entry)(
            [call.config, call.create_config], **{**options, 'max_train_iter': UNBOUNDED}
        )
    return {
        'task': request.arm,
        'document': f'seed {request.seed}',
        'method': 'training',
        'seed': request.seed,
        'env_steps': progress.collected,
        'iterations': progress.iterations,
        'device': str(progress.policy._cfg.device),
        'processor': dict(clock.processor),
        'wall': dict(clock.wall),
        'peak_bytes': _peak_bytes(),
        'returns': returns,
    }


@contextmanager
def _watched(
    call: Any, progress: Progress, clock: Clock, whole: ExitStack, returns: list[tuple[int, float]]
) -> Iterator[None]:
    """Within the block a training is counted and timed; ``whole`` is timed from the first action on."""
    from ding.utils import POLICY_REGISTRY
    from ding.worker import BaseLearner
    from lzero.mcts import SampledUniZeroGameBuffer, UniZeroGameBuffer
    from lzero.worker import MuZeroCollector, MuZeroSegmentCollector

    owner, known = _acting_class(call, POLICY_REGISTRY), 0

    def act(original: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
        if progress.policy is None:
            clock.watch_acting(policy)
            whole.enter_context(clock.timing(WHOLE))
        return original(policy, *args, **kwargs)

    def log(original: Any, collector: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal known
        ended = collector._episode_info[known:]
        returns.extend((progress.collected, float(info['reward'])) for info in ended)
        original(collector, *args, **kwargs)
        known = len(collector._episode_info)  # the host forgets them where it logs them

    with ExitStack() as stack, bounded(progress, owner):
        stack.enter_context(around(owner, '_forward_collect', act))
        stack.enter_context(around(BaseLearner, 'train', partial(clock.timed, LEARNING)))
        for buffer in (UniZeroGameBuffer, SampledUniZeroGameBuffer):
            stack.enter_context(around(buffer, 'sample', partial(clock.timed, SAMPLING)))
        for collector in (MuZeroCollector, MuZeroSegmentCollector):
            stack.enter_context(around(collector, '_output_log', log))
        yield


def _acting_class(call: Any, registry: Any) -> type:
    """The class whose ``_forward_collect`` is the outermost: the plugin's where the flag is on."""
    kind = call.create_config['policy']['type']
    importlib.import_module(f'lzero.policy.{kind}')
    if not call.config['policy']['model']['world_model_cfg']['use_new_cache_manager']:
        return registry.get(kind)
    from lzero_kv.lightzero.policy import KVPolicy

    return KVPolicy


def _peak_bytes() -> int:
    """Most resident memory of this process, or, with a GPU, most memory of tensors there."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _tell(report: TextIO, progress: Progress) -> None:
    tell(report, {'steps': progress.collected, 'iterations': progress.iterations})


if __name__ == '__main__':
    sys.exit(serve(lambda asked, report: run(Request(**asked), report)))
