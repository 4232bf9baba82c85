"""LightZero's memory tasks run with the repairs, and do not without them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from memory_unizero_kv_config import make_config

from lzero_kv.configs.memory_repairs import ascii_codes, repair_memory_tasks

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'

PLAY = """
import sys
from easydict import EasyDict
from zoo.memory.envs.memory_lightzero_env import MemoryEnvLightZero
{repairs}
env = MemoryEnvLightZero(EasyDict({{**MemoryEnvLightZero.default_config(), 'flatten_observation': False,
    'env_id': {env_id!r}, 'max_frames': {{'explore': 1, 'distractor': 2, 'reward': 15}}}}))
env.seed(0, dynamic_seed=False)
observation = env.reset()['observation']
done, steps = False, 0
while not done:
    observation, reward, done, info = env.step(0)
    steps += 1
print(observation['observation'].shape, steps, 'eval_episode_return' in info, file=sys.stderr)
"""
REPAIR = 'from memory_repairs import repair_memory_tasks; repair_memory_tasks()'


def play(python: str, env_id: str, repairs: str) -> subprocess.CompletedProcess[str]:
    """One episode of a memory task in a process of its own."""
    code = PLAY.format(repairs=repairs, env_id=env_id)
    return subprocess.run([python, '-c', code], cwd=CONFIGS, capture_output=True, text=True)


@pytest.mark.parametrize('env_id', ['visual_match', 'key_to_door'])
def test_an_episode_runs_to_its_end(env_id: str, warm_python: str) -> None:
    run = play(warm_python, env_id, REPAIR)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1] == '(3, 5, 5) 18 True'


def test_without_the_repairs_it_does_not(warm_python: str) -> None:
    run = play(warm_python, 'visual_match', '')
    assert run.returncode != 0
    assert "module 'collections' has no attribute 'Mapping'" in run.stderr


def test_the_model_of_the_memory_tasks_can_be_built() -> None:
    from lzero.model.unizero_model import UniZeroModel
    from lzero.policy.unizero import UniZeroPolicy

    main_config, _ = make_config('visual_match', 0, smoke=True, kv=False)
    repair_memory_tasks()
    defaults = UniZeroPolicy.default_config().model
    world_model_cfg = {**defaults.world_model_cfg, **main_config.policy.model.pop('world_model_cfg')}
    settings = {**defaults, **main_config.policy.model, 'world_model_cfg': type(defaults)(world_model_cfg)}
    model = UniZeroModel(**settings)
    assert not any('lpips' in name for name in model.state_dict())


def test_drawings_become_character_codes() -> None:
    codes = ascii_codes(['ab ', '#.!'])
    assert codes.dtype == np.uint8
    assert codes.tolist() == [[97, 98, 32], [35, 46, 33]]


def test_drawings_of_other_forms_are_refused() -> None:
    with pytest.raises(ValueError, match='rows of one length'):
        ascii_codes(['ab', 'c'])
    with pytest.raises(ValueError, match='ascii'):
        ascii_codes(['é'])
    with pytest.raises(TypeError, match='a row of type list'):
        ascii_codes([['a', 'b']])  # type: ignore[list-item]
