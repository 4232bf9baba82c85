"""Episodes that a subject plays by itself, or that it is shown as another subject played them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lzero.policy import InverseScalarTransform, unizero
from measuring.instruments import clock
from memory_recall_unizero_kv_config import DISTRACTOR_FRAMES

from lzero_kv.configs.memory_recall_env import MemoryRecallEnv, shows_door
from lzero_kv.lightzero.inference.heads import expected_scalars
from testing.models import world_model_of
from testing.recorder import replaced
from testing.repeatable_tree import host_trees, repeatable

UNROLLED = 5
"""Recurrent steps that are compared after each root."""
CUES = {'start': [0], 'random': list(range(DISTRACTOR_FRAMES + 1))}
"""Frames of which the cue's is drawn."""
DOORS = 1 + DISTRACTOR_FRAMES
"""The first frame between the doors."""
STRIDE = 4
"""One frame in so many of those before is asked about."""
FEWEST = 1
"""Simulations where nobody looks at the search."""


@dataclass(frozen=True)
class Recording:
    """T frames of B episodes of equal length."""

    seeds: tuple[int, ...]
    """Of the environments, B."""
    cue: str
    observations: np.ndarray
    """float32 [T, B, 3, 5, 5]."""
    actions: np.ndarray
    """int64 [T, B]."""
    decisive: np.ndarray
    """bool [T, B]: the agent stands between the doors and has not taken one yet."""
    successes: np.ndarray
    """bool [B]: the right door was taken."""


@dataclass(frozen=True)
class Answers:
    """What a subject says at F frames of B episodes: at the root (one node) and along K steps from it."""

    policy: np.ndarray
    """Logits [F, B, 1 + K, actions]."""
    value: np.ndarray
    """Scalars [F, B, 1 + K]."""
    reward: np.ndarray
    """Scalars [F, B, K]."""
    latent: np.ndarray
    """[F, B, K, embed]."""
    visits: np.ndarray
    """Visit counts of the root's actions, [F, B, actions]."""
    seconds: np.ndarray
    """Processor time of one root inference and search of all B rows, [F]."""


def play(subject: Any, cue: str, seeds: Sequence[int], past: Recording | None = None) -> Recording:
    """Episodes of the task as the subject plays them, one for each seed; nothing is drawn by the subject.

    past: the same episodes, whose actions are taken before the doors are there, where they decide nothing;
    the subject sees these frames, and does not search there.
    """
    environments = [_environment(cue) for _ in seeds]
    for environment, seed in zip(environments, seeds, strict=True):
        environment.seed(seed, dynamic_seed=False)
    frames = [environment.reset()['observation'] for environment in environments]
    observations, actions, decisive, step = [], [], [], None
    with _repeatable_searches(), _simulations(subject) as simulate:
        _forget(subject, len(seeds))
        while step is None or not step[0].done:
            observations.append(np.stack(frames).astype(np.float32))
            at_doors = len(observations) > DOORS
            decisive.append([at_doors and shows_door(frame) for frame in frames])
            forced = None if past is None or at_doors else past.actions[len(actions)]
            simulate(FEWEST if forced is not None else None)
            output = _forward(subject, observations[-1], forced)
            actions.append([int(output[row]['action']) for row in range(len(seeds))])
            step = [one.step(action) for one, action in zip(environments, actions[-1], strict=True)]
            frames = [one.obs['observation'] for one in step]
    successes = np.array([bool(one.info['success']) for one in step])
    played = np.stack(observations), np.array(actions), np.array(decisive), successes
    return Recording(tuple(seeds), cue, *played)


def asked_frames(recording: Recording) -> np.ndarray:
    """Frames at which answers are compared, int64 [F]: all between the doors, and some before."""
    return np.array([t for t in range(len(recording.actions)) if t >= DOORS or t % STRIDE == 0])


@torch.no_grad()
def answers(subject: Any, recording: Recording, seed: int) -> Answers:
    """The subject's answers at the asked frames of a recording, all of whose frames it sees and whose actions
    it is made to take.

    seed: of the actions along which the model is unrolled; the same for all subjects.
    """
    frames, rows = recording.actions.shape
    branches = np.random.default_rng(seed).integers(0, 4, size=(frames, UNROLLED, rows))
    asked, collected = set(asked_frames(recording).tolist()), []
    with _repeatable_searches(), _simulations(subject) as simulate:
        _forget(subject, rows)
        for frame in range(frames):
            simulate(None if frame in asked else FEWEST)
            begun = clock()
            output = _forward(subject, recording.observations[frame], recording.actions[frame])
            seconds = clock() - begun
            if frame in asked:
                collected.append((*_unrolled(subject, output, branches[frame]), np.float64(seconds)))
    return Answers(*(np.stack(part) for part in zip(*collected, strict=True)))


def _unrolled(
    subject: Any, output: dict[int, dict[str, Any]], branches: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The root's answers and those along actions `branches` [K, B]; the fields of Answers but the last."""
    world_model, rows = world_model_of(subject), branches.shape[1]
    transform = InverseScalarTransform(subject._cfg.model.support_scale, 'cpu', True)
    search = world_model.begin_search(world_model.latent_state.numpy(), [-1] * rows, len(branches))
    policy = [np.array([output[row]['predicted_policy_logits'] for row in range(rows)])]
    value = [np.array([np.asarray(output[row]['predicted_value']).item() for row in range(rows)])]
    reward, latent = [], []
    for depth, actions in enumerate(branches):
        step = search.expand(np.full(rows, depth), torch.from_numpy(actions))
        scalars = expected_scalars((transform, transform), (step.value, step.reward))
        policy.append(step.policy[:, 0].numpy())
        value.append(scalars[0])
        reward.append(scalars[1])
        latent.append(step.latent[:, 0].numpy().copy())
    visits = np.array([output[row]['visit_count_distributions'] for row in range(rows)])
    return *(np.stack(part, axis=1) for part in (policy, value, reward, latent)), visits


def _environment(cue: str) -> MemoryRecallEnv:
    config = MemoryRecallEnv.default_config()
    config.update(cue_frames=CUES[cue], flatten_observation=False)
    return MemoryRecallEnv(config)


def _forward(
    subject: Any, observations: np.ndarray, forced: np.ndarray | None = None
) -> dict[int, dict[str, Any]]:
    """One call of the policy; `forced` are the actions it then takes, int64 [B]."""
    rows = len(observations)
    masks = [np.ones(subject._cfg.model.action_space_size, dtype=np.int8)] * rows
    players = [np.array(-1)] * rows
    taken = iter(() if forced is None else forced)

    def select_action(*args: Any, **kwargs: Any) -> tuple[int, float]:
        return int(next(taken)), 0.0

    with nullcontext() if forced is None else replaced(unizero, 'select_action', select_action):
        return subject.eval_mode.forward(
            torch.from_numpy(observations), masks, players,
            ready_env_id=set(range(rows)), timestep=[-1] * rows,
        )  # fmt: skip


@contextmanager
def _simulations(subject: Any) -> Iterator[Callable[[int | None], None]]:
    """A function that sets the simulations of the next search; None: as many as are configured."""
    config, number = subject._mcts_eval._cfg, subject._mcts_eval._cfg.num_simulations

    def simulate(simulations: int | None) -> None:
        config.num_simulations = simulations or number

    try:
        yield simulate
    finally:
        config.num_simulations = number


def _forget(subject: Any, rows: int) -> None:
    subject.eval_mode.reset(list(range(rows)))


def _repeatable_searches() -> AbstractContextManager[None]:
    return repeatable(*host_trees())
