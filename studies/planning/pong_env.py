"""Real Pong whose observation is where ball and paddles are: no frames to encode, so a CPU can learn it."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from ding.envs import BaseEnv, BaseEnvTimestep
from ding.utils import ENV_REGISTRY
from gymnasium.spaces import Box, Discrete

PLACES = (51, 50, 49, 54)
"""Bytes of the console's memory: y of the player's and the opponent's paddle, x and y of the ball (Anand et
al. 2019, arXiv 1906.08226, table 1)."""
ACTIONS = (0, 3, 4)
"""Of the emulator: stay, and the joystick to the right (up) and to the left (down)."""
FRAMES = 4
"""In which an action is repeated, and behind it none, so that the paddle comes to rest."""
WAVES = 2 * np.pi / np.array([512, 256, 128, 64], np.float32)
"""Angles of a pixel: places as sines and cosines of several wavelengths let a small model tell a few pixels
apart."""
MOST_WAITED = 30
"""Frames before an episode begins, at most."""


@ENV_REGISTRY.register('pong_positions')
class PongPositionsEnv(BaseEnv):
    """LightZero's form of an environment around the emulator.

    An observation is float32 ``[44]``: sines, then cosines of the four places of :data:`PLACES` and of the
    ball's y from the player's, for each of :data:`WAVES`; then how far each place moved since the last step,
    in units of 16 pixels and at most three of them. A point is a reward of 1 or -1; an episode ends at 21
    points of either side, or with ``max_episode_steps``.
    """

    config: ClassVar[dict[str, int]] = dict(max_episode_steps=10_000)
    size: ClassVar[int] = 2 * (len(PLACES) + 1) * len(WAVES) + len(PLACES)
    """Numbers of an observation."""

    def __init__(self, cfg: Any) -> None:
        from ale_py import ALEInterface, LoggerMode, roms

        ALEInterface.setLoggerMode(LoggerMode.Error)
        self._most = cfg.get('max_episode_steps', self.config['max_episode_steps'])
        self._console = ALEInterface()
        self._console.setFloat('repeat_action_probability', 0.0)
        self._console.loadROM(roms.Pong)
        self._random = np.random.default_rng()
        self.action_space = Discrete(len(ACTIONS))
        self.observation_space = Box(-3.0, 3.0, (self.size,), np.float32)
        self.reward_space = Box(-1.0, 1.0, (1,), np.float32)

    def seed(self, seed: int, dynamic_seed: bool = True) -> None:
        """Take the seed of the frames that an episode waits."""
        self._random = np.random.default_rng(seed)

    def reset(self) -> dict[str, Any]:
        """Begin an episode."""
        self._console.reset_game()
        for _ in range(self._random.integers(MOST_WAITED + 1)):
            self._console.act(0)
        self._steps, self._return, self._places = 0, 0.0, self._read()
        return self._seen(self._places)

    def step(self, action: Any) -> BaseEnvTimestep:
        """Play an action for :data:`FRAMES` frames, and none for as many."""
        pressed, before = ACTIONS[int(action)], self._places
        reward = float(sum(map(self._console.act, [pressed] * FRAMES + [ACTIONS[0]] * FRAMES)))
        self._steps += 1
        self._return += reward
        self._places = self._read()
        done = self._console.game_over() or self._steps == self._most
        info = dict(eval_episode_return=self._return) if done else {}
        return BaseEnvTimestep(self._seen(before), np.array(reward, np.float32), done, info)

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self) -> np.ndarray:
        return self._console.getRAM()[list(PLACES)].astype(np.float32)

    def _seen(self, before: np.ndarray) -> dict[str, Any]:
        now = self._places
        angles = np.outer(np.append(now, now[3] - now[0]), WAVES).ravel()
        moved = np.clip((now - before) / 16, -3, 3)
        seen = np.concatenate([np.sin(angles), np.cos(angles), moved]).astype(np.float32)
        mask = np.ones(len(ACTIONS), np.int8)
        return dict(observation=seen, action_mask=mask, to_play=-1, timestep=self._steps)

    def __repr__(self) -> str:
        return 'Pong, seen as positions'
