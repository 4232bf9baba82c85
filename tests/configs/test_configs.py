"""The configs build what LightZero's own configs build, and the cache's settings beside it."""

from __future__ import annotations

import copy
import importlib
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from easydict import EasyDict
from zoo.atari.config.atari_env_action_space_map import atari_env_action_space_map

from lzero_kv import KVCacheConfig
from lzero_kv.cli.training_call import training_call

from .stock import flat, stock_call

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
ATARI = ('atari_unizero_kv_config', 'atari_unizero_segment_kv_config')
ENVIRONMENTS = {
    **dict.fromkeys((*ATARI, 'atari_unizero_ddp_kv_config'), 'PongNoFrameskip-v4'),
    'cartpole_unizero_kv_config': 'CartPole-v0',
    'memory_recall_unizero_kv_config': 'memory_recall',
    'memory_unizero_kv_config': 'visual_match',
    'pendulum_sampled_unizero_kv_config': 'Pendulum-v1',
}
STOCK = {
    'atari_unizero_kv_config': 'atari/config/atari_unizero_config.py',
    'atari_unizero_segment_kv_config': 'atari/config/atari_unizero_segment_config.py',
    'cartpole_unizero_kv_config': 'classic_control/cartpole/config/cartpole_unizero_config.py',
    'memory_unizero_kv_config': 'memory/config/memory_unizero_config.py',
    'pendulum_sampled_unizero_kv_config': (
        'classic_control/pendulum/config/pendulum_cont_sampled_unizero_config.py'
    ),
}
CACHE = {
    'policy.model.world_model_cfg.use_new_cache_manager': True,
    'policy.model.world_model_cfg.kv_cache': {},
}
WRITTEN_OUT_DEFAULTS = {
    'env.collect_max_episode_steps': int(1.08e5),
    'env.eval_max_episode_steps': int(1.08e5),
    'env.env_id': 'CartPole-v0',
    'policy.n_episode': 8,
    'policy.eval_freq': int(5e3),
    'policy.learn.learner.hook.save_ckpt_after_iter': int(1e6),
    # git main's names of support_scale=300, which the release does not read
    'policy.model.value_support_range': (-300.0, 301.0, 1.0),
    'policy.model.reward_support_range': (-300.0, 301.0, 1.0),
}


@pytest.fixture(params=sorted(ENVIRONMENTS))
def config(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def env_of(config: ModuleType) -> str:
    return ENVIRONMENTS[config.__name__]


@pytest.mark.parametrize('smoke', [False, True])
@pytest.mark.parametrize('name', ATARI)
@pytest.mark.parametrize('env_id', sorted(atari_env_action_space_map))
def test_every_atari_game_has_a_config(name: str, env_id: str, smoke: bool) -> None:
    main_config, create_config = importlib.import_module(name).make_config(env_id, 3, smoke)
    actions = atari_env_action_space_map[env_id]
    assert isinstance(main_config, EasyDict)
    assert isinstance(create_config, EasyDict)
    assert main_config.env.env_id == env_id
    assert main_config.policy.model.action_space_size == actions
    assert main_config.policy.model.world_model_cfg.action_space_size == actions
    assert env_id.removesuffix('NoFrameskip-v4') in main_config.exp_name


def test_all_26_games_are_there() -> None:
    assert len(atari_env_action_space_map) == 26


@pytest.mark.parametrize('smoke', [False, True])
def test_the_world_model_is_told_what_the_policy_knows(config: ModuleType, smoke: bool) -> None:
    main_config, create_config = config.make_config(env_of(config), 0, smoke)
    policy, world_model = main_config.policy, main_config.policy.model.world_model_cfg
    assert world_model.env_num == max(policy.collector_env_num, policy.evaluator_env_num)
    assert world_model.embed_dim % world_model.num_heads == 0
    assert main_config.env.collector_env_num == policy.collector_env_num
    assert main_config.env.evaluator_env_num == policy.evaluator_env_num
    assert create_config.policy.import_names[-1] == 'lzero_kv.plugin'
    assert KVCacheConfig.from_world_model_cfg(world_model) == KVCacheConfig()


def test_the_cache_can_be_left_off(config: ModuleType) -> None:
    on, create_on = config.make_config(env_of(config), 0)
    off, create_off = config.make_config(env_of(config), 0, kv=False)
    assert on.policy.model.world_model_cfg.use_new_cache_manager is True
    assert off.policy.model.world_model_cfg.use_new_cache_manager is False
    differing = {key for key in flat(on) if flat(on)[key] != flat(off)[key]}
    assert differing == {'exp_name', 'policy.model.world_model_cfg.use_new_cache_manager'}
    assert create_on == create_off


def test_names_of_experiments_differ(config: ModuleType) -> None:
    choices = [(seed, smoke, kv) for seed in (0, 1) for smoke in (False, True) for kv in (False, True)]
    names = {config.make_config(env_of(config), *choice)[0].exp_name for choice in choices}
    assert len(names) == len(choices)


def test_names_differ_between_configs() -> None:
    modules = {name: importlib.import_module(name) for name in ENVIRONMENTS}
    names = {module.make_config(ENVIRONMENTS[name], 0)[0].exp_name for name, module in modules.items()}
    assert len(names) == len(modules)


def test_several_gpus_share_the_settings_of_one() -> None:
    ours, one = (
        flat(
            importlib.import_module(f'atari_unizero{name}_kv_config').make_config('PongNoFrameskip-v4', 0)[0]
        )
        for name in ('_ddp', '')
    )
    differing = {name: value for name, value in ours.items() if one.get(name) != value}
    assert differing.pop('exp_name') == one['exp_name'].replace('_uz_', '_uz_ddp_')
    assert differing == {'policy.multi_gpu': True}
    stock = flat(stock_call('atari/config/atari_unizero_ddp_config.py').config)
    assert stock['policy.multi_gpu'] is True


def test_an_unknown_environment_is_refused(config: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"env_id: expected one of .*; found 'Pong'"):
        config.make_config('Pong', 0)


def test_other_sizes_are_taken_and_left_alone(config: ModuleType) -> None:
    size = EasyDict({**config.SMOKE, 'num_simulations': 3})
    before = copy.deepcopy(size)
    main_config, _ = config.make_config(env_of(config), 0, size=size)
    main_config.policy.num_simulations = 99
    assert size == before


@pytest.mark.parametrize('name', sorted(STOCK))
def test_nothing_but_the_cache_differs_from_the_stock_config(name: str) -> None:
    main_config, create_config = importlib.import_module(name).make_config(ENVIRONMENTS[name], 0)
    call = stock_call(STOCK[name])
    ours, stock = flat(main_config), flat(call.config)
    for key in ('exp_name', 'env.env_name'):  # the host's CartPole reads env_id, its config writes env_name
        ours.pop(key, None), stock.pop(key, None)
    added = {key: value for key, value in ours.items() if stock.get(key, '(none)') != value}
    assert {key: value for key, value in stock.items() if key not in ours} == {}
    expected = {**CACHE, **WRITTEN_OUT_DEFAULTS}
    assert added == {key: value for key, value in expected.items() if key in added}
    assert added.keys() >= CACHE.keys()
    assert create_config.policy.pop('import_names') == [
        *call.create_config.policy.pop('import_names'),
        'lzero_kv.plugin',
    ]
    assert create_config == call.create_config


@pytest.mark.parametrize('name', sorted(ENVIRONMENTS))
def test_the_file_starts_the_training_of_its_config(name: str) -> None:
    call = training_call(CONFIGS / f'{name}.py')
    assert call.entry == ('train_unizero_segment' if 'segment' in name else 'train_unizero')
    assert call.config == importlib.import_module(name).make_config(ENVIRONMENTS[name], 0)[0]


@pytest.mark.parametrize('name', sorted(ENVIRONMENTS))
def test_the_command_line_explains_itself(name: str, warm_python: str) -> None:
    run = subprocess.run([warm_python, f'{name}.py', '--help'], cwd=CONFIGS, capture_output=True, text=True)
    assert run.returncode == 0
    for option in ('--env', '--seed', '--smoke', '--no-kv', '--model-path'):
        assert option in run.stdout
