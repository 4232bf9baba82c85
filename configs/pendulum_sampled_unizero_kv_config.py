"""Sampled UniZero on Pendulum with lzero_kv's cache: continuous actions.

    python configs/pendulum_sampled_unizero_kv_config.py --seed 0

Is it on? One line of the log says so: 'lzero_kv ...: on: ...'. Without it LightZero trains with its own
cache. Before a training: lzero-kv doctor FILE.

The settings are those of LightZero's
    zoo/classic_control/pendulum/config/pendulum_cont_sampled_unizero_config.py
What turns the cache on: `use_new_cache_manager` and `kv_cache` in world_model_cfg, and 'lzero_kv.plugin' in
import_names.
"""

from __future__ import annotations

from easydict import EasyDict

from lzero_kv.configs.command_line import parse_arguments, require_known

ENVIRONMENTS = ('Pendulum-v1',)  # the one that LightZero's wrapper makes

# ==============================================================
# the most frequently changed settings
# ==============================================================
FULL = EasyDict(
    num_of_sampled_actions=20,
    collector_env_num=8,
    evaluator_env_num=3,
    num_simulations=25,
    replay_ratio=0.25,
    max_env_step=int(5e5),
    batch_size=64,
    num_unroll_steps=10,
    infer_context_length=4,
    num_heads=8,
    embed_dim=256,
    reanalyze_ratio=0,
    eval_freq=int(1e3),  # training iterations
    env_manager='subprocess',
)
SMOKE = EasyDict(
    num_of_sampled_actions=5,
    collector_env_num=2,
    evaluator_env_num=2,
    num_simulations=8,  # more than sampled actions, so that the search goes below the first level
    replay_ratio=0.02,
    max_env_step=200,
    batch_size=8,
    num_unroll_steps=5,
    infer_context_length=4,
    num_heads=2,
    embed_dim=32,
    reanalyze_ratio=0,
    eval_freq=int(1e3),
    env_manager='base',
)


def make_config(
    env_id: str, seed: int, smoke: bool = False, kv: bool = True, size: EasyDict | None = None
) -> tuple[EasyDict, EasyDict]:
    """The two configs that `train_unizero` takes: (main_config, create_config).

    size: settings in the place of FULL (or, with smoke, of SMOKE). Raises ValueError for an unknown env_id.
    """
    require_known(env_id, ENVIRONMENTS)
    size = size or (SMOKE if smoke else FULL)

    pendulum_sampled_unizero_kv_config = dict(
        exp_name=(
            f'data_lz/data_sampled_unizero_kv/pendulum/pendulum_suz_kv-{"on" if kv else "off"}'
            f'{"_smoke" if smoke else ""}_K{size.num_of_sampled_actions}_ns{size.num_simulations}'
            f'_rr{size.replay_ratio}_rer{size.reanalyze_ratio}_H{size.num_unroll_steps}_bs{size.batch_size}_seed{seed}'
        ),
        env=dict(
            env_id=env_id,
            continuous=True,
            manually_discretization=False,
            each_dim_disc_size=1,
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
            n_evaluator_episode=size.evaluator_env_num,
            manager=dict(shared_memory=False),
        ),
        policy=dict(
            model=dict(
                observation_shape=3,
                action_space_size=1,
                continuous_action_space=True,
                num_of_sampled_actions=size.num_of_sampled_actions,
                model_type='mlp',
                world_model_cfg=dict(
                    obs_type='vector',
                    num_unroll_steps=size.num_unroll_steps,
                    policy_entropy_weight=1e-4,
                    continuous_action_space=True,
                    num_of_sampled_actions=size.num_of_sampled_actions,
                    sigma_type='conditioned',
                    bound_type=None,
                    model_type='mlp',
                    norm_type='LN',
                    max_blocks=size.num_unroll_steps,
                    max_tokens=2 * size.num_unroll_steps,  # a step has two tokens: observation and action
                    context_length=2 * size.infer_context_length,
                    device='cuda',  # LightZero takes the CPU where there is no GPU
                    action_space_size=1,
                    num_layers=2,
                    num_heads=size.num_heads,
                    embed_dim=size.embed_dim,
                    env_num=max(size.collector_env_num, size.evaluator_env_num),
                    collector_env_num=size.collector_env_num,
                    evaluator_env_num=size.evaluator_env_num,
                    use_new_cache_manager=kv,
                    kv_cache=dict(),  # every field has a default
                ),
            ),
            model_path=None,
            num_unroll_steps=size.num_unroll_steps,
            cuda=True,
            use_augmentation=False,
            env_type='not_board_games',
            game_segment_length=50,
            replay_ratio=size.replay_ratio,
            batch_size=size.batch_size,
            optim_type='AdamW',
            piecewise_decay_lr_scheduler=False,
            learning_rate=0.0001,
            num_simulations=size.num_simulations,
            reanalyze_ratio=size.reanalyze_ratio,
            n_episode=size.collector_env_num,
            eval_freq=size.eval_freq,
            replay_buffer_size=int(1e6),
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
        ),
    )
    pendulum_sampled_unizero_kv_create_config = dict(
        env=dict(
            type='pendulum_lightzero',
            import_names=['zoo.classic_control.pendulum.envs.pendulum_lightzero_env'],
        ),
        env_manager=dict(type=size.env_manager),
        policy=dict(
            type='sampled_unizero',
            import_names=['lzero.policy.sampled_unizero', 'lzero_kv.plugin'],
        ),
    )
    return EasyDict(pendulum_sampled_unizero_kv_config), EasyDict(pendulum_sampled_unizero_kv_create_config)


def main(
    env_id: str = 'Pendulum-v1',
    seed: int = 0,
    smoke: bool = False,
    kv: bool = True,
    model_path: str | None = None,
) -> None:
    """Train until the size's max_env_step, from a checkpoint where one is given."""
    main_config, create_config = make_config(env_id, seed, smoke, kv)
    from lzero.entry import train_unizero

    train_unizero(
        [main_config, create_config],
        seed=seed,
        model_path=model_path,
        max_env_step=(SMOKE if smoke else FULL).max_env_step,
    )


if __name__ == '__main__':
    args = parse_arguments('Sampled UniZero on Pendulum.', 'Pendulum-v1', ENVIRONMENTS)
    main(args.env, args.seed, smoke=args.smoke, kv=args.kv, model_path=args.model_path)
