"""A memory task small enough to be learned on a CPU: LightZero's visual_match, its cue at a frame of choice.

One frame, the cue, shows a colour. All other frames before the reward phase show an empty room, in which
nothing that the agent does matters. In the reward phase it stands between three doors, two steps from each,
and the one of the cue's colour pays; the first door that it reaches is its choice. visual_match as shipped
shows the cue first and puts the doors four and seven steps away.
"""

from __future__ import annotations

import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from ding.envs import BaseEnvTimestep
from ding.utils import ENV_REGISTRY

from lzero_kv.configs.memory_repairs import repair_memory_tasks

repair_memory_tasks()

from pycolab import storytelling  # noqa: E402  (it reads what the repair puts back)
from zoo.memory.envs.memory_lightzero_env import MemoryEnvLightZero  # noqa: E402
from zoo.memory.envs.pycolab_tvt import common, visual_match  # noqa: E402

DOORS = ('b', 'c', 'e')  # to the west, to the north, to the east
STEPS_TO_DOOR = 2
REWARD_ROOM = [
    '###########',
    '#####c#####',
    '##### #####',
    '###b + e###',
    '###########',
    '###########',
    '###########',
]


class RecallGame(visual_match.Game):
    """visual_match with the cue at one of the given frames, and a smaller room of doors.

    cue_frames: frames of which one is drawn for an episode, all equally likely; one that is written twice is
    twice as likely. Raises ValueError for a frame outside 0 (first) to max_frames['distractor'] (last before
    the doors), and for another number of cue frames than 1.
    """

    def __init__(self, rng: np.random.RandomState, cue_frames: Sequence[int], **settings: Any) -> None:
        super().__init__(rng, **settings)
        last = self._max_frames['distractor']
        if self._max_frames['explore'] != 1:
            raise ValueError(f'max_frames.explore: expected 1, got {self._max_frames["explore"]}')
        if not cue_frames or not all(0 <= frame <= last for frame in cue_frames):
            raise ValueError(f'cue_frames: expected frames from 0 to {last}, got {list(cue_frames)}')
        self._cue_frames = list(cue_frames)
        self.cue_frame: int | None = None
        self.target: str | None = None

    def make_episode(self) -> storytelling.Story:
        """Draw the frame of the cue and its colour: `cue_frame` and `target` tell which."""
        self.cue_frame = cue = int(self._rng.choice(self._cue_frames))
        self.target = target = str(self._rng.choice(DOORS))
        rest = self._max_frames['distractor'] - cue
        chapters = [functools.partial(self._distract, cue)] if cue else []
        chapters += [functools.partial(self._make_explore_phase, target)]
        chapters += [functools.partial(self._distract, rest)] if rest else []
        chapters += [functools.partial(self._make_reward_phase, target)]
        return storytelling.Story(chapters, croppers=common.get_cropper())

    def _distract(self, frames: int) -> Any:
        with patch.dict(self._max_frames, distractor=frames):
            return self._make_distractor_phase()

    def _make_reward_phase(self, target_char: str) -> Any:
        with patch.object(visual_match, 'REWARD_GRID', REWARD_ROOM):
            return super()._make_reward_phase(target_char)


@ENV_REGISTRY.register('memory_recall')
class MemoryRecallEnv(MemoryEnvLightZero):
    """LightZero's environment of the memory tasks around a RecallGame; nothing is printed."""

    config = MemoryEnvLightZero.config | dict(
        cue_frames=[0],  # one of them is drawn for an episode
        num_apples=0,  # nothing to see in the frames that do not matter
        final_reward=10.0,  # the bins of a categorical reward tell 10 from 0 better than 1
        max_frames=dict(explore=1, distractor=20, reward=6),
    )

    @property
    def game(self) -> RecallGame:
        """The game of this episode."""
        assert isinstance(self._game, RecallGame)
        return self._game

    def reset(self) -> dict[str, Any]:
        """Begin an episode; the observation of frame 0."""
        game = functools.partial(RecallGame, cue_frames=self._cfg.cue_frames)
        with patch.object(visual_match, 'Game', game), _quiet():
            return super().reset()  # pyright: ignore[reportReturnType]  # the host says ndarray

    def step(self, action: np.ndarray) -> BaseEnvTimestep:
        """Play an action; the next frame."""
        with _quiet():
            return super().step(action)

    def __repr__(self) -> str:
        return 'LightZero environment of a memory task with its cue at a frame of choice'


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The host prints at the ends of episodes, and warns of colours that NumPy wraps to bytes."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)
        yield


def shows_door(observation: np.ndarray) -> bool:
    """Whether an observation [3, 5, 5] shows a colour of a door; a door that is taken takes all from sight.

    The cue's frame shows one, too.
    """
    return bool(((observation > 0).sum(axis=0) == 1).any())
