"""A training of the host that ends after a number of environment steps, in the middle of whatever it does."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

EVALUATION_SHARE = 4  # one of this many steps at most; LightZero evaluates whole episodes before it collects


class EnoughSteps(BaseException):
    """Ends a training; no Exception, so that no handler on the way catches it by accident."""


class _EnoughEvaluation(BaseException):
    """Ends an evaluation, after which the training goes on."""


@dataclass
class Progress:
    """How far a bounded training is.

    Attributes:
        limit: environment steps of collection and evaluation together.
        listener: called after every inference of a batch of environments and every training iteration.
        evaluates: whether a part of the steps may be evaluation's; else the host's evaluations are left out.
        collected, evaluated: environment steps so far.
        iterations: training iterations so far.
        policy: the policy, as soon as it acted.
    """

    limit: int
    listener: Callable[[Progress], None] = lambda progress: None
    evaluates: bool = True
    collected: int = 0
    evaluated: int = 0
    iterations: int = 0
    policy: Any = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return self.collected + self.evaluated

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
        progress.listener(progress)
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
        progress.listener(progress)
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


def every(seconds: float, act: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """A listener that acts at most once in ``seconds``."""
    last = -seconds

    def listener(progress: Progress) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= seconds:
            last = now
            act(progress)

    return listener
