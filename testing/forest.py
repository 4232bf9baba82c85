"""Answers of many roots and nodes with windows that shift, all of one depth in one step.

The second form for ``'shift'``: :mod:`lzero_kv.validation.oracle` appends one token of one history at a time.
Every history begins with one observation, so all nodes of one depth have windows of one length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lzero_kv.validation.oracle import Oracle

from .fresh import Logits, logits_of


class Place(NamedTuple):
    """One node of a forest."""

    depth: int
    """Steps since the first observation."""
    number: int
    """Among the nodes of that depth."""


class Forest:
    """Histories as paths of a forest; what they share is computed once.

    Args:
        oracle: of the rule 'shift'.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._latents: list[list[torch.Tensor]] = []
        self._steps: list[list[tuple[int, torch.Tensor]]] = []
        """At each depth: number of the parent and embedding of the action."""
        self._roots: dict[tuple[Any, ...], Place] = {}
        self._held: list[Sequence[torch.Tensor]] = []
        """Names of roots are addresses of their observations, which have to stay."""

    @torch.no_grad()
    def root(self, observations: Sequence[torch.Tensor], actions: Sequence[Any]) -> Place:
        """The root after an episode; episodes of the same tensors share their beginning."""
        self._held.append(observations)
        name: tuple[Any, ...] = (id(observations[0]),)
        place = self._known(name, None, None, observations[0])
        for action, observation in zip(actions, observations[1:], strict=True):
            name = *name, np.asarray(action).tobytes(), id(observation)
            place = self._known(name, place, action, observation)
        return place

    def child(self, parent: Place, action: Any, latent: torch.Tensor) -> Place:
        """The node that ``action`` leads to, with its latent state [embed]."""
        return self._add(parent.depth + 1, latent, (parent.number, self._oracle.embed_action(action)))

    @torch.no_grad()
    def answers(self) -> dict[Place, Logits]:
        """Logits by name of every node; those of a first observation have neither reward nor latent."""
        oracle, answers = self._oracle, dict[Place, Logits]()
        kv = self._latents[0][0].new_zeros(len(self._latents[0]), 2 * len(oracle.layers), 0, oracle.heads, 1)
        kv = kv.expand(-1, -1, -1, -1, oracle.head_dim)
        for depth, (latents, steps) in enumerate(zip(self._latents, self._steps, strict=True)):
            found: list[Logits] = [{} for _ in latents]
            if depth:
                actions = torch.stack([action for _, action in steps])
                kv, features = self._appended(kv[[parent for parent, _ in steps]], actions, 2 * depth - 1)
                found = logits_of(oracle, ('reward', 'latent'), features)
            kv, features = self._appended(kv, torch.stack(latents), 2 * depth)
            kv = self._trimmed(kv)
            for number, logits in enumerate(logits_of(oracle, ('policy', 'value'), features)):
                answers[Place(depth, number)] = found[number] | logits
        return answers

    def _known(self, name: tuple[Any, ...], parent: Place | None, action: Any, seen: torch.Tensor) -> Place:
        if name not in self._roots:
            latent = self._oracle.encode(seen)
            first = parent is None
            self._roots[name] = self._add(0, latent) if first else self.child(parent, action, latent)
        return self._roots[name]

    def _add(self, depth: int, latent: torch.Tensor, step: tuple[int, torch.Tensor] | None = None) -> Place:
        if depth == len(self._latents):
            self._latents.append([])
            self._steps.append([])
        self._latents[depth].append(latent.reshape(-1))
        if step is not None:
            self._steps[depth].append(step)
        return Place(depth, len(self._latents[depth]) - 1)

    def _appended(
        self, kv: torch.Tensor, x: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows ``[N, 2 * layers, tokens, heads, head_dim]`` with tokens ``[N, embed]`` more, and their
        features."""
        oracle, grown = self._oracle, []
        if not oracle.rotary:
            x = x + oracle.model.pos_emb.weight[kv.shape[2]]
        for block, before in zip(oracle.blocks, kv.unflatten(1, (-1, 2)).unbind(1), strict=True):
            query, *new = oracle._projected(block, x)
            if oracle.rotary:
                query, new[0] = oracle._rotate(query, position), oracle._rotate(new[0], position)
            keys, values = both = torch.cat([before, torch.stack(new, 1)[:, :, None]], 2).unbind(1)
            scores = torch.einsum('nthd,nhd->nth', keys, query) / math.sqrt(oracle.head_dim)
            mixed = torch.einsum('nth,nthd->nhd', scores.softmax(1), values)
            x = oracle._residual(block, x, mixed.flatten(1))
            grown += both
        return torch.stack(grown, 1), oracle.model.transformer.ln_f(x)

    def _trimmed(self, kv: torch.Tensor) -> torch.Tensor:
        while kv.shape[2] > self._oracle.kept:
            kv = kv[:, :, 2:]
            moved = self._oracle.moved(torch.zeros_like(kv[0]).flatten(2))
            kv = kv + moved.unflatten(-1, kv.shape[-2:])
        return kv
