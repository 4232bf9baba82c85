"""Drives a world model without policy and tree: random searches, over environments that come and go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.lightzero.inference.expand import Search
from lzero_kv.lightzero.inference.heads import StepOutputs
from testing.precision import precision


@dataclass(frozen=True)
class Step:
    """One environment step of those that are ready."""

    ready: tuple[int, ...]
    """Environments, in the order of the batch."""
    ends: tuple[int, ...] = ()
    """Environments whose episode ends after it."""
    before: Callable[[Any], object] = lambda model: None
    """What happens to the model first."""


class Drive:
    """Plays steps and keeps every answer. What is observed and chosen depends on the seed, the environment
    and its step alone; two drives of the same seed see the same, whatever serves them.

    Args:
        model: the host's model over a caching world model.
        simulations: of each search.
        observation: its shape.
    """

    def __init__(
        self,
        model: Any,
        environments: int,
        simulations: int,
        seed: int = 0,
        observation: int | tuple[int, ...] = 7,
    ) -> None:
        self.model = model
        self.world_model = model.world_model
        self.simulations = simulations
        self.seed = seed
        self.observation = observation
        self.taken = [0] * environments
        self.episode_steps = [0] * environments
        self.answers: list[torch.Tensor] = []
        """Each ``[B, ...]`` on the CPU in float64: roots, then children, step by step."""
        self.searches: list[Search] = []
        weight = self.world_model.transformer.ln_f.weight
        self.dtype, self.device = weight.dtype, weight.device

    def play(self, steps: Sequence[Step]) -> list[torch.Tensor]:
        """Play on; all answers so far."""
        for step in steps:
            step.before(self.model)
            with precision(self.dtype):
                self._play(step)
            for env in step.ready:
                self.taken[env] += 1
                self.episode_steps[env] += 1
            for env in step.ends:
                self.episode_steps[env] = 0
            self.world_model.end_episodes(step.ends)
        return self.answers

    def _play(self, step: Step) -> None:
        world_model, rows = self.world_model, step.ready
        first = [self.episode_steps[env] == 0 for env in rows]
        actions = [
            -1 if new else self._action(env, self.taken[env] - 1, 0)
            for env, new in zip(rows, first, strict=True)
        ]
        last, now = (torch.stack([self._observation(env, at) for env in rows]) for at in (-1, 0))
        timesteps = [np.array(self.episode_steps[env]) for env in rows]
        with world_model.serving(rows):
            root = self.model.initial_inference(last, actions, now, timesteps)
        self._keep(root.policy_logits, root.value)
        latents = world_model.latent_state.detach().cpu().numpy()
        nodes = world_model.begin_search(latents, timesteps, self.simulations)
        self.searches.append(nodes)
        for simulation in range(self.simulations):
            draws = [self._draw(env, self.taken[env], simulation + 1) for env in rows]
            # two times out of three the newest node, so that paths get longer than a window
            parents = [simulation if d.random() < 2 / 3 else d.integers(simulation + 1) for d in draws]
            chosen = [self._action(env, self.taken[env], simulation + 1) for env in rows]
            given = torch.from_numpy(np.array(chosen)).to(self.device)
            with torch.no_grad():
                self._keep(*_parts(nodes.expand(np.array(parents, dtype=np.int64), given)))

    def _keep(self, *parts: torch.Tensor) -> None:
        self.answers.append(torch.cat([part.detach().cpu().double().flatten(1) for part in parts], dim=1))

    def _observation(self, env: int, at: int) -> torch.Tensor:
        draw = self._draw(env, self.taken[env] + at, 0).standard_normal(self.observation)
        return torch.from_numpy(draw).to(self.device, self.dtype)

    def _action(self, env: int, step: int, purpose: int) -> Any:
        size, draw = self.world_model.action_space_size, self._draw(env, step, 1000 + purpose)
        if self.world_model.continuous_action_space:
            return draw.uniform(-1, 1, size).astype(np.float32)
        return int(draw.integers(size))

    def _draw(self, env: int, step: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, env, step + 1, purpose])


def _parts(outputs: StepOutputs) -> list[torch.Tensor]:
    return [part for part in outputs if part is not None]


def largest_difference(answers: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Of two drives with the same steps, in parts of the largest number."""
    assert [part.shape for part in answers] == [part.shape for part in expected]
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (answers, expected))
    return float((one - other).abs().max() / other.abs().max())
