"""Trains the model that the study looks at, in lessons, until it remembers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from easydict import EasyDict
from memory_recall_unizero_kv_config import DISTRACTOR_FRAMES, FULL, make_config

from studies.budget.plays import CUES, play
from studies.budget.subject import load_checkpoint, make_subject


class Lesson(NamedTuple):
    """A part of the training, which goes on with the weights of the one before."""

    name: str
    memory_length: int
    """Frames between cue and doors, at most."""
    learning_rate: float
    max_env_step: int


LESSONS = (
    Lesson('short', 4, 1e-3, 2_500),
    Lesson('long', DISTRACTOR_FRAMES, 1e-3, 17_000),
    Lesson('fine', DISTRACTOR_FRAMES, 3e-4, 6_200),
)
"""Over few frames the model finds out within minutes what the cue is for, and then keeps it over more frames;
over many frames from the beginning it did not."""
MORE = (
    Lesson('more', DISTRACTOR_FRAMES, 1e-3, 6_200),
    Lesson('more_fine', DISTRACTOR_FRAMES, 3e-4, 6_200),
)
"""For a model that does not remember yet: no training repeats, because LightZero's tree breaks ties by the
clock, and some need longer."""
MOST_REPEATS = 3
ENOUGH = 0.7
"""Right doors with either cue, of :data:`EXAMINED` episodes each."""
EXAMINED = 48
EXAMINATION = 900_000
"""Seed of the first of these episodes, which the study does not show again."""


def train(seed: int, folder: Path) -> Path:
    """Train by LightZero's own entry, lesson by lesson, and further while the model forgets; its last
    checkpoint."""
    checkpoint = None
    for lesson in LESSONS:
        checkpoint = _learn(lesson, seed, folder / lesson.name, checkpoint)
    for repeat in range(MOST_REPEATS):
        right = right_doors(checkpoint)
        told = ', '.join(f'{share:.0%} with the cue at {cue}' for cue, share in right.items())
        print(f'budget study: the trained model takes the right door in {told}', flush=True)
        if min(right.values()) >= ENOUGH:
            break
        for lesson in MORE:
            checkpoint = _learn(lesson, seed, folder / f'{lesson.name}_{repeat}', checkpoint)
    return checkpoint


def right_doors(checkpoint: Path, episodes: int = EXAMINED) -> dict[str, float]:
    """Part of the episodes in which the full cache finds the right door, for each kind of cue."""
    subject = make_subject(load_checkpoint(checkpoint), episodes, budget=None)
    seeds = range(EXAMINATION, EXAMINATION + episodes)
    return {cue: float(play(subject, cue, seeds).successes.mean()) for cue in CUES}


def _learn(lesson: Lesson, seed: int, folder: Path, checkpoint: Path | None) -> Path:
    from lzero.entry import train_unizero

    size = EasyDict(FULL, memory_length=lesson.memory_length)
    main_config, create_config = make_config('memory_recall', seed, size=size)
    main_config.policy.learning_rate = lesson.learning_rate
    main_config.exp_name = os.path.relpath(folder)  # the host puts ./ in front of it
    train_unizero(
        [main_config, create_config], seed=seed, model_path=checkpoint, max_env_step=lesson.max_env_step
    )
    return max(folder.glob('ckpt/iteration_*.pth.tar'), key=_iteration)


def _iteration(path: Path) -> int:
    return int(path.name.removeprefix('iteration_').removesuffix('.pth.tar'))
