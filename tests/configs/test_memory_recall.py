"""The small memory task shows its cue exactly when it says, and pays for the right door alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lzero_kv.configs.memory_recall_env import DOORS, STEPS_TO_DOOR, MemoryRecallEnv, RecallGame, shows_door

DISTRACTOR, REWARD = 9, 5
NORTH, SOUTH, WEST, EAST = range(4)
WAYS = {'b': WEST, 'c': NORTH, 'e': EAST}
COLOURS = {'b': 2, 'c': 1, 'e': 0}  # the channel of the colour


def make_env(cue_frames: list[int], seed: int) -> MemoryRecallEnv:
    config = MemoryRecallEnv.default_config()
    config.update(cue_frames=cue_frames, flatten_observation=False)
    config.max_frames = dict(explore=1, distractor=DISTRACTOR, reward=REWARD)
    env = MemoryRecallEnv(config)
    env.seed(seed, dynamic_seed=False)
    return env


def episode(env: MemoryRecallEnv, ways: list[int]) -> tuple[list[np.ndarray], list[float], dict[str, Any]]:
    """Observations, rewards and the last info of an episode: south, then `ways` between the doors."""
    observations, rewards = [env.reset()['observation']], []
    for action in [SOUTH] * (DISTRACTOR + 1) + ways + [SOUTH] * (REWARD - len(ways)):
        step = env.step(action)
        observations.append(step.obs['observation'])
        rewards.append(float(step.reward))
    assert step.done
    return observations, rewards, step.info


@pytest.mark.parametrize('cue', [0, 1, 4, DISTRACTOR])
@pytest.mark.parametrize('seed', range(5))
def test_the_cue_is_shown_at_its_frame_and_at_no_other(cue: int, seed: int) -> None:
    env = make_env([cue], seed)
    observations, _, _ = episode(env, [])
    assert env.game.cue_frame == cue
    shown = [frame for frame in range(DISTRACTOR + 1) if shows_door(observations[frame])]
    assert shown == [cue]
    colour = np.argwhere((observations[cue] > 0).sum(axis=0) == 1)
    channels = {int(observations[cue][:, row, column].argmax()) for row, column in colour}
    assert channels == {COLOURS[env.game.target]}


def test_the_frames_of_a_seeded_episode() -> None:
    kinds = []
    observations, _, _ = episode(make_env([2], 3), [NORTH, NORTH])
    for frame in observations:
        doors = ((frame > 0).sum(axis=0) == 1).sum()
        kinds.append({0: '.', 1: 'cue', 3: 'three'}[int(doors)])
    # All doors are in sight until one is taken.
    assert kinds == ['.', '.', 'cue', *['.'] * (DISTRACTOR - 2), 'three', 'three', '.', '.', '.', '.']


@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('seed', range(6))
def test_the_right_door_alone_pays(door: str, seed: int) -> None:
    env = make_env([0], seed)
    observations, rewards, info = episode(env, [WAYS[door]] * STEPS_TO_DOOR)
    right = door == env.game.target
    first = DISTRACTOR + STEPS_TO_DOOR  # the reward of the action that reaches the door
    assert rewards == [10.0 * right if frame == first else 0.0 for frame in range(len(rewards))]
    assert info['success'] == right
    assert shows_door(observations[first]) and not shows_door(observations[first + 1])


def test_nothing_but_the_first_door_counts() -> None:
    env = make_env([0], 1)
    env.reset()
    wrong = next(door for door in DOORS if door != env.game.target)
    there = [WAYS[wrong]] * STEPS_TO_DOOR
    _, rewards, info = episode(env, [*there, {WEST: EAST, EAST: WEST, NORTH: SOUTH}[there[0]]])
    assert sum(rewards) == 0 and info['success'] == 0


def test_all_given_frames_and_colours_are_drawn_and_no_others() -> None:
    env = make_env([0, 5, 5, 5], 7)
    env.seed(7, dynamic_seed=True)
    drawn: Counter[tuple[int, str]] = Counter()
    for _ in range(200):
        env.reset()
        drawn[env.game.cue_frame, env.game.target] += 1
    assert {frame for frame, _ in drawn} == {0, 5}
    assert {colour for _, colour in drawn} == set(DOORS)
    assert sum(count for (frame, _), count in drawn.items() if frame == 5) > 110  # of 150 expected


def test_a_seed_names_one_episode() -> None:
    plays = [episode(make_env([0, 3, 8], 11), [EAST])[0] for _ in range(2)]
    assert all(np.array_equal(one, other) for one, other in zip(*plays, strict=True))


def test_impossible_frames_are_refused() -> None:
    frames = dict(explore=1, distractor=DISTRACTOR, reward=REWARD)
    rng = np.random.RandomState(0)
    for wrong in ([], [DISTRACTOR + 1], [-1]):
        with pytest.raises(ValueError, match=r'cue_frames: expected frames from 0 to 9, got'):
            RecallGame(rng, wrong, max_frames=frames)
    with pytest.raises(ValueError, match=r'max_frames\.explore: expected 1, got 2'):
        RecallGame(rng, [0], max_frames=frames | dict(explore=2))
