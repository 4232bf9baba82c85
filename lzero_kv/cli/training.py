"""Trainings of the host in processes of their own, bounded by a number of environment steps."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lzero_kv
from lzero_kv.sweep.rows import versions

TOLD = ('LightZero', 'DI-engine', 'torch', 'numpy')
PACKAGES = Path(lzero_kv.__file__).resolve().parents[1]
UNBOUNDED = 10**10  # of the entry's own bounds
TOLD_SECONDS = 0.25
EVALUATION_SHARE = 4  # one of this many steps at most; LightZero evaluates whole episodes before it collects

Hear = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """One training to run.

    Attributes:
        config: the config file.
        arguments: of the config file's command line.
        name: of the training: an arm of a comparison, or a mode of validation.
        env_steps: environment steps after which it ends.
        folder: where the command's results and what the host writes go.
        seed: of a training of a comparison.
        until: return of an evaluation that ends a training of a comparison; None leaves evaluations out.
        rate: fraction of searches whose nodes are validated; roots always are.
        simulations: of a search; None for the config's own number.
    """

    config: str
    arguments: tuple[str, ...]
    name: str
    env_steps: int
    folder: str
    seed: int = 0
    until: float | None = None
    rate: float = 1.0
    simulations: int | None = None


def told_versions() -> dict[str, str]:
    """Versions of what a training's numbers depend on."""
    return {**versions(*TOLD), 'machine': platform.platform()}


def answer_of(module: str, request: Request, log: Path, hear: Hear) -> Any:
    """What ``train`` of a module returns, run by :mod:`lzero_kv.cli.child`.

    Args:
        module: its name.
        request: what is trained.
        log: file of what the process writes; an existing one is replaced.
        hear: is given each report of progress.

    Raises:
        ValueError: it ended without an answer; the message says why and where its log is.
    """
    reader, writer = os.pipe()
    arguments = [module, str(writer), json.dumps(asdict(request))]
    # The same package as here, also where that is a checkout; and threads wait for each other on few cores.
    path = os.pathsep.join([str(PACKAGES), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = {'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONPATH': path}
    with log.open('wb') as file, os.fdopen(reader, encoding='utf-8') as answers:
        child = subprocess.Popen(
            [sys.executable, '-m', 'lzero_kv.cli.child', *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            env=environment,
        )
        os.close(writer)
        answer: dict[str, Any] = {}
        try:
            for line in answers:
                answer = json.loads(line)
                if 'progress' in answer:
                    hear(answer['progress'])
            child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if 'run' in answer:
        return answer['run']
    reason = answer.get('error', f'the process ended with code {child.returncode}')
    raise ValueError(f'{reason} (what LightZero wrote: {log})')


class EnoughSteps(BaseException):
    """Ends a training; no Exception, so that no handler on the way catches it by accident."""


class _EnoughEvaluation(BaseException):
    """Ends an evaluation, after which the training goes on."""


@dataclass
class Progress:
    """How far a bounded training is.

    Attributes:
        limit: environment steps of collection and evaluation together.
        listener: called after an inference of a batch of environments or a training iteration, at most once
            in TOLD_SECONDS.
        evaluates: whether a part of the steps may be evaluation's; else the host's evaluations are left out.
        collected, evaluated: environment steps so far.
        iterations: training iterations so far.
        policy: the policy, as soon as it acted.
        told: when the listener was called.
    """

    limit: int
    listener: Callable[[Progress], None] = lambda progress: None
    evaluates: bool = True
    collected: int = 0
    evaluated: int = 0
    iterations: int = 0
    policy: Any = field(default=None, repr=False)
    told: float = -TOLD_SECONDS

    def tell(self) -> None:
        """Call the listener where it is time."""
        if (now := time.monotonic()) - self.told >= TOLD_SECONDS:
            self.told = now
            self.listener(self)

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return self.collected + self.evaluated

    @property
    def counts(self) -> dict[str, int]:
        """Steps and iterations by name."""
        return {'steps': self.steps, 'iterations': self.iterations}

    @property
    def evaluation_limit(self) -> int:
        """Steps after which an evaluation ends, so that collection and training get theirs."""
        return max(1, self.limit // EVALUATION_SHARE) if self.evaluates else 0


@contextmanager
def bounded(progress: Progress, owner: type | None = None) -> Iterator[None]:
    """Within the block a training counts its steps in ``progress``, and raises :class:`EnoughSteps` before
    the first batch of environments that would go past ``progress.limit``.

    ``owner`` is the policy class whose own methods act; None for that of the plugin.
    """
    from ding.worker import BaseLearner
    from lzero.worker import MuZeroEvaluator

    if owner is None:
        from lzero_kv.lightzero.policy import KVPolicy as owner

    def collect(original: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
        _stop_at_limit(progress)
        return acted(original, policy, 'collected', *args, **kwargs)

    def evaluate(original: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
        _stop_at_limit(progress)
        if progress.evaluated >= progress.evaluation_limit:
            raise _EnoughEvaluation
        return acted(original, policy, 'evaluated', *args, **kwargs)

    def acted(original: Any, policy: Any, counter: str, *args: Any, **kwargs: Any) -> Any:
        progress.policy = policy
        output = original(policy, *args, **kwargs)
        setattr(progress, counter, getattr(progress, counter) + len(output))
        progress.tell()
        return output

    def evaluation(original: Any, evaluator: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(evaluator, *args, **kwargs)
        except _EnoughEvaluation:
            # As after the last step of each episode: nothing of them may reach the collection that follows.
            for env_id in range(evaluator._env_num):
                evaluator._policy.reset([env_id])
            return False, {}  # go on training; the entries only log the second

    def train(original: Any, learner: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(learner, *args, **kwargs)
        progress.iterations += 1
        progress.tell()
        return result

    with ExitStack() as stack:
        stack.enter_context(around(owner, '_forward_collect', collect))
        stack.enter_context(around(owner, '_forward_eval', evaluate))
        stack.enter_context(around(MuZeroEvaluator, 'eval', evaluation))
        stack.enter_context(around(BaseLearner, 'train', train))
        yield


def _stop_at_limit(progress: Progress) -> None:
    if progress.steps >= progress.limit:
        raise EnoughSteps


@contextmanager
def around(owner: type, name: str, call: Callable[..., Any]) -> Iterator[None]:
    """Call ``call(original, self, *args, **kwargs)`` in the place of a method."""
    original = vars(owner)[name]

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(original, self, *args, **kwargs)

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)
