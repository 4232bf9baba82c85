"""Roots and nodes as the oracle answers for them, from the observations and actions that led there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lzero_kv.validation.oracle import Answer, Oracle, Token


@torch.no_grad()
def root_of(
    oracle: Oracle, observations: Sequence[torch.Tensor], actions: Sequence[Any], first_step: int = 0
) -> Answer:
    """The root after an episode of ``observations`` (each unbatched) and the ``actions`` between them, one
    fewer."""
    root = oracle.begin(Token(oracle.encode(observations[0]), 2 * first_step))
    for action, observation in zip(actions, observations[1:], strict=True):
        first = root.window.next_position
        step = Token(oracle.embed_action(action), first), Token(oracle.encode(observation), first + 1)
        answer = oracle.step(root.window, *step)
        root = Answer(answer.window, answer.value, answer.policy)
    return root


@torch.no_grad()
def child_of(oracle: Oracle, parent: Answer, action: Any, latent: torch.Tensor | None = None) -> Answer:
    """The node that ``action`` leads to. ``latent`` [embed] is its latent state; None takes the predicted
    one."""
    first = parent.window.next_position
    own = Token(oracle.embed_action(action), first)
    if latent is None:
        latent = oracle.latent(oracle.append(parent.window, own)[1])
    return oracle.step(parent.window, own, Token(latent, first + 1))
