"""`lzero-kv compare`: one config with the flag off and on, the same seeds in turn: time, memory, returns."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from lzero_kv.cli.comparison import (
    EVALUATION,
    LEARNING,
    PLUGIN,
    ROOTS,
    SAMPLING,
    SEARCH,
    STOCK,
    WHOLE,
    Comparison,
)
from lzero_kv.cli.console import Bar, show_line, show_table
from lzero_kv.cli.doctor import Mark, call_checks
from lzero_kv.cli.training import (
    UNBOUNDED,
    Hear,
    Progress,
    Request,
    answer_of,
    around,
    bounded,
    told_versions,
)
from lzero_kv.cli.training_call import ConfigError, OfConfig, TrainingCall, alone, training_call
from lzero_kv.sweep.rows import ROWS, Row
from lzero_kv.sweep.sweep import Sweep

PICTURE = 'compare.png'


def compare(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='CONFIG')],
    env_steps: int = 2000,
    seeds: int = 3,
    until: float | None = None,
    out: Annotated[Path, tyro.conf.arg(metavar='DIR')] = Path('data_lz/compare'),
    arguments: OfConfig = (),
) -> int:
    """Train a config with LightZero's own cache and with this one, and compare time, memory and returns.

    CONFIG is a config in LightZero's form, with or without the plugin in it. Its code is executed: give
    only files that you trust. What follows `--` is its own command line:
    lzero-kv compare CONFIG.py --env-steps 500 -- --smoke. Each training is a process of its own; flag off
    and on take turns (off, on, on, off, ...). A training ends as LightZero ends it: after the collection
    and the learning in which --env-steps was reached. Evaluations are left out, but for --until. Where it
    was stopped, the same command goes on, and --seeds may grow. Environments run in the training's process:
    a config with another env_manager is changed, and a note says so.

    Args:
        config: a config file that LightZero can run.
        env_steps: environment steps that each training collects, at least.
        seeds: number of seeds, from 0 on; each is trained twice.
        until: a return. The config's evaluations stay, and a training ends where one reaches it;
            --env-steps is then the most.
        out: the folder of the rows (rows.jsonl), the picture (compare.png) and what LightZero writes.
        arguments: of the config.

    Returns:
        0, 1 when something is wrong (the reason goes to standard error), 130 when interrupted.
    """
    numbers = {'--env-steps': env_steps, '--seeds': seeds}
    problems = [f'{name}: expected 1 or more, got {n}' for name, n in numbers.items() if n < 1]
    if until is not None and not math.isfinite(until):
        problems.append(f'--until: expected a return, got {until}')
    if problems:
        raise ValueError('; '.join(problems))
    call, notes = _checked(training_call(config, arguments), out)
    rows = _measure(call, Request(str(config), arguments, '', env_steps, str(out), until=until), seeds)
    found = Comparison.of([row for row in rows if row['seed'] < seeds])
    show_table(found.table())
    for note in notes:
        show_line(f'note: {note}')
    show_line(found.sentence())
    show_line(f'rows: {out / ROWS}, picture: {found.draw(out / PICTURE)}')
    return 0


def _checked(given: TrainingCall, out: Path) -> tuple[TrainingCall, list[str]]:
    """The training that the plugin would run, and what had to be changed for that, in words.

    Raises:
        ConfigError: something cannot be; nothing was trained or written.
    """
    call, notes = alone(given, out / 'training', flag=True)
    if given.options.get('model') is not None:
        raise ConfigError(
            f'{call.path} builds its model itself, one for both; leave model out of {call.entry}'
        )
    if call.config['policy'].get('multi_gpu'):
        raise ConfigError(f'{call.path} has multi_gpu=True; a comparison is of one process: write False')
    if failed := [check for check in call_checks(call) if check.mark is Mark.FAIL]:
        raise ConfigError(f'{call.path}: ' + '; '.join(' '.join(check.remedy.split()) for check in failed))
    return call, notes


@dataclass(frozen=True)
class Training:
    """One training of the comparison, a document of the sweep: its arm (``task``) and environment steps."""

    task: str
    seed: int
    size: float

    @property
    def id(self) -> str:
        """Name of the seed."""
        return f'seed {self.seed}'


def _measure(call: TrainingCall, request: Request, seeds: int) -> list[Row]:
    # exp_name is relative to the working folder, and the text of an object may hold its address
    config = {**call.config, 'exp_name': None}
    settings = json.dumps(
        [call.entry, config, call.create_config], default=lambda one: type(one).__qualname__, sort_keys=True
    )
    header = {
        'config': request.config,
        'arguments': request.arguments,
        'env_steps': request.env_steps,
        'until': request.until,
        'settings': hashlib.sha256(settings.encode()).hexdigest()[:16],
        'versions': told_versions(),
        'methods': ('training',),
    }
    trainings = [
        Training(arm, seed, request.env_steps)
        for seed in range(seeds)
        for arm in ((PLUGIN, STOCK) if seed % 2 else (STOCK, PLUGIN))
    ]
    sweep, whole = Sweep(Path(request.folder), header), len(trainings) * request.env_steps
    with Bar() as bar:

        def measure(training: Training) -> list[Row]:
            name = f'{training.task}, {training.id}'
            done = whole - request.env_steps * len(sweep.left(trainings))
            until = '' if request.until is None else f', or until an evaluation returns {request.until:g}'
            bar.say(f'{name}: training for {request.env_steps:,} environment steps{until}')

            def hear(numbers: dict[str, Any]) -> None:
                state = (
                    f'{name}: {numbers["steps"]:,} environment steps, {numbers["iterations"]:,} iterations'
                )
                bar.show(done + min(numbers['steps'], request.env_steps), whole, state)

            asked = dataclasses.replace(request, name=training.task, seed=training.seed)
            return [answer_of(__name__, asked, sweep.folder / f'{training.task}_{training.seed}.log', hear)]

        return sweep.run(trainings, measure)


class Clock:
    """Processor and wall seconds of the parts of a training.

    On a GPU a part ends when the host's call returns: a search reads its answers and has waited for all of
    its work, other parts may leave work behind that the next one waits for.
    """

    def __init__(self) -> None:
        self.processor: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self._within_part = False

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
        """Call a function under the clock; within another part its time is that part's."""
        if self._within_part:
            return original(*args, **kwargs)
        self._within_part = True
        try:
            with self.timing(part):
                return original(*args, **kwargs)
        finally:
            self._within_part = False

    def watch_acting(self, policy: Any) -> None:
        """Put the clock around the searches and root inferences of a policy that collects, stock or not."""
        policy._mcts_collect.search = partial(self.timed, SEARCH, policy._mcts_collect.search)
        model = policy._collect_model
        model.initial_inference = partial(self.timed, ROOTS, model.initial_inference)


def train(request: Request, hear: Hear) -> dict[str, Any]:
    """Train one arm with one seed, and return the row of the comparison."""
    folder = Path(request.folder) / 'training' / f'{request.name}_{request.seed}'
    given = training_call(Path(request.config), request.arguments)
    call, _ = alone(given, folder, flag=request.name == PLUGIN)
    call.config['policy']['model']['world_model_cfg'].pop('cache_validation_mode', None)

    def tell(progress: Progress) -> None:
        hear({'steps': progress.collected, 'iterations': progress.iterations})

    progress = Progress(UNBOUNDED, tell, evaluates=request.until is not None)
    if progress.evaluates:
        call.config['env']['stop_value'] = request.until
    clock, returns, stops = Clock(), [], []
    with watched(call, progress, clock, returns, stops):
        call.run(seed=request.seed, max_env_step=request.env_steps, max_train_iter=UNBOUNDED)
    return {
        'task': request.name,
        'document': f'seed {request.seed}',
        'method': 'training',
        'seed': request.seed,
        'env_steps': progress.collected,
        'iterations': progress.iterations,
        'until': request.until,
        'reached': any(stops),
        'device': str(progress.policy._cfg.device),
        'processor': dict(clock.processor),
        'wall': dict(clock.wall),
        'peak_bytes': peak_bytes(),
        'returns': returns,
    }


@contextmanager
def watched(
    call: TrainingCall,
    progress: Progress,
    clock: Clock,
    returns: list[tuple[int, float]],
    stops: list[bool],
) -> Iterator[None]:
    """Within the block a training is counted and timed, the whole from the first collection on.

    Every episode that ends in a collection is added to ``returns``, the host's verdict on every evaluation
    behind the first collection to ``stops``.
    """
    from ding.worker import BaseLearner
    from lzero.mcts import SampledUniZeroGameBuffer, UniZeroGameBuffer
    from lzero.worker import MuZeroCollector, MuZeroEvaluator, MuZeroSegmentCollector

    owner, known = _acting_class(call), 0

    def act(original: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
        if not progress.collected:
            clock.watch_acting(policy)
            stack.enter_context(clock.timing(WHOLE))
        return original(policy, *args, **kwargs)

    def evaluate(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not progress.collected:  # of the untrained model, which LightZero never lets end a training
            return original(*args, **kwargs)
        verdict = clock.timed(EVALUATION, original, *args, **kwargs)
        stops.append(bool(verdict[0]))
        return verdict

    def log(original: Any, collector: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal known
        ended = collector._episode_info[known:]
        returns.extend((progress.collected, float(info['reward'])) for info in ended)
        original(collector, *args, **kwargs)
        known = len(collector._episode_info)  # the host forgets them where it logs them

    with bounded(progress, owner), ExitStack() as stack:
        stack.enter_context(around(owner, '_forward_collect', act))
        stack.enter_context(around(BaseLearner, 'train', partial(clock.timed, LEARNING)))
        if progress.evaluates:
            stack.enter_context(around(MuZeroEvaluator, 'eval', evaluate))
        for buffer in (UniZeroGameBuffer, SampledUniZeroGameBuffer):
            for name in {'sample', 'reanalyze_buffer'} & vars(buffer).keys():
                stack.enter_context(around(buffer, name, partial(clock.timed, SAMPLING)))
        for collector in (MuZeroCollector, MuZeroSegmentCollector):
            stack.enter_context(around(collector, '_output_log', log))
        yield


def _acting_class(call: TrainingCall) -> Any:
    """The class whose ``_forward_collect`` is the outermost: the plugin's where the flag is on."""
    from ding.utils import POLICY_REGISTRY

    kind = call.create_config['policy']['type']
    importlib.import_module(f'lzero.policy.{kind}')
    if not call.config['policy']['model']['world_model_cfg']['use_new_cache_manager']:
        return POLICY_REGISTRY.get(kind)
    from lzero_kv.lightzero.policy import KVPolicy

    return KVPolicy


def peak_bytes() -> int:
    """Most resident memory of this process, or, with a GPU, most memory of tensors there."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
