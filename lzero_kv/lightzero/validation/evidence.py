"""Why the old system is off: causes that the state of its structures and a repeated step prove."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lzero_kv.lightzero.validation.enactment import Close, Enacted, HostStep
from lzero_kv.lightzero.validation.twin import HistoryName, Trace
from lzero_kv.validation.causes import Cause

Causes = frozenset[Cause]


def lookup_causes(trace: Trace, asked: HistoryName, other_observation: bool = False) -> Causes:
    """Why the entry behind a key that was found is not that of the history that was asked for.

    Args:
        trace: the lookup, which found an entry.
        asked: the history.
        other_observation: whether the host asked with an observation that is not the environment's own last.
    """
    owner = trace.owner
    if owner is None or owner.history == asked:
        return frozenset()
    if owner.key != trace.key:
        return frozenset({Cause.SLOT_OVERWRITTEN})
    if other_observation:
        return frozenset({Cause.OTHER_ENVIRONMENT})
    # The key is right and bit-equal, so the latent states are: nothing else is in it.
    shared = {Cause.EQUAL_LATENTS}
    if owner.history.env_id != asked.env_id:
        shared.add(Cause.OTHER_ENVIRONMENT)
    return frozenset(shared)


def served_causes(trace: Trace, asked: HistoryName, other_observation: bool = False) -> Causes | None:
    """Why what was found is not what it should be, by the slot's owner; None when nothing proves it."""
    if not trace.intact:
        return None  # what lies there is not what was written for its owner, whoever that is
    causes = lookup_causes(trace, asked, other_observation)
    if causes:
        return causes
    if trace.owner is None or not trace.owner.proven or not trace.owner.causes:
        return None
    return trace.owner.causes


def step_causes(
    step: HostStep, answers: dict[str, torch.Tensor], enact: Callable[[HostStep], Enacted], close: Close
) -> tuple[Causes | None, Enacted]:
    """Which mistakes of the host's step changed its answers.

    The repeated step, with all of the mistakes, must give the host's own answers; a mistake counts when the
    step without it gives others.

    Returns:
        The causes, None when the repeated step does not give the host's answers; and the repeated step.
    """
    enacted = enact(step)

    def same(other: dict[str, torch.Tensor]) -> bool:
        return all(close(other[name], enacted.answers[name]) for name in enacted.answers if name in other)

    if not same(answers):
        return None, enacted
    mended = {}
    if step.zeros:
        mended[Cause.ZERO_PADDING] = step.without_padding()
    if step.positions != step.true_positions:
        mended[Cause.ROTARY_POSITION] = step.at_true_positions()
    if step.action is not None and step.true_action is not None and not close(step.action, step.true_action):
        mended[Cause.OTHER_ENVIRONMENT] = step.with_true_action()
    causes = set()
    for cause, without in mended.items():
        other = enact(without)
        if not (same(other.answers) and _newest_alike(other, enacted, close)):
            causes.add(cause)
    return frozenset(causes), enacted


def _newest_alike(one: Enacted, other: Enacted, close: Close) -> bool:
    tokens = min(one.stored.shape[1], other.stored.shape[1])
    sized = one.stored.shape == other.stored.shape
    return sized and close(one.stored[:, -tokens:], other.stored[:, -tokens:])
