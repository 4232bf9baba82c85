"""UniZero on CartPole with lzero_kv's cache: vector observations and rotary positions.

    python configs/cartpole_unizero_kv_config.py --seed 0

Is it on? One line of the log says so: 'lzero_kv ...: on: ...'. Without it LightZero trains with its own
cache. Before a training: lzero-kv doctor FILE.

The settings are those of LightZero's
    zoo/classic_control/cartpole/config/cartpole_unizero_config.py
What turns the cache on: `use_new_cache_manager` and `kv_cache` in world_model_cfg, and 'lzero_kv.plugin' in
import_names.
"""

from __future__ import annotations

from easydict import EasyDict

from lzero_kv.configs.command_line import parse_arguments, require_known

ENVIRONMENTS = ('CartPole-v0',)  # the one that LightZero's wrapper makes

# ==============================================================
# the most frequently changed settings
# ==============================================================
FULL = EasyDict(
    collector_env_num=8,
    evaluator_env_num=3,
    num_simulations=25,
    replay_ratio=0.25,
    max_env_step=int(2e5),
    batch_size=256,
    num_unroll_steps=5,
    embed_dim=64,
    reanalyze_ratio=0.0,
    eval_freq=int(1e3),  # training iterations
    env_manager='subprocess',
)
SMOKE = EasyDict(
    collector_env_num=2,
    evaluator_env_num=2,
    num_simulations=8,
    replay_ratio=0.25,
    max_env_step=100,  # two collections and more: a chart is a line
    batch_size=8,
    num_unroll_steps=5,
    embed_dim=32,
    reanalyze_ratio=0.25,
    eval_freq=1,
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

    cartpole_unizero_kv_config = dict(
        exp_name=(
            f'data_lz/data_unizero_kv/cartpole/cartpole_uz_kv-{"on" if kv else "off"}'
            f'{"_smoke" if smoke else ""}_ns{size.num_simulations}_rr{size.replay_ratio}'
            f'_rer{size.reanalyze_ratio}_H{size.num_unroll_steps}_bs{size.batch_size}_seed{seed}'
        ),
        env=dict(
            env_id=env_id,
            continuous=False,
            manually_discretization=False,
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
            n_evaluator_episode=size.evaluator_env_num,
            manager=dict(shared_memory=False),
        ),
        policy=dict(
            model=dict(
                observation_shape=4,
                action_space_size=2,
                self_supervised_learning_loss=True,
                discrete_action_encoding_type='one_hot',
                norm_type='BN',
                model_type='mlp',
                world_model_cfg=dict(
                    max_blocks=10,
                    max_tokens=2 * 10,
                    context_length=2 * 4,
                    context_length_for_recurrent=2 * 4,
                    device='cuda',  # LightZero takes the CPU where there is no GPU
                    action_space_size=2,
                    num_layers=2,
                    num_heads=2,
                    embed_dim=size.embed_dim,
                    env_num=max(size.collector_env_num, size.evaluator_env_num),
                    collector_env_num=size.collector_env_num,
                    evaluator_env_num=size.evaluator_env_num,
                    obs_type='vector',
                    norm_type='BN',
                    rotary_emb=True,
                    use_new_cache_manager=kv,
                    kv_cache=dict(),  # every field has a default
                ),
            ),
            use_wandb=False,
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
            target_update_freq=100,
            grad_clip_value=5,
            num_simulations=size.num_simulations,
            reanalyze_ratio=size.reanalyze_ratio,
            n_episode=size.collector_env_num,
            eval_freq=size.eval_freq,
            replay_buffer_size=int(1e6),
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
        ),
    )
    cartpole_unizero_kv_create_config = dict(
        env=dict(
            type='cartpole_lightzero',
            import_names=['zoo.classic_control.cartpole.envs.cartpole_lightzero_env'],
        ),
        env_manager=dict(type=size.env_manager),
        policy=dict(
            type='unizero',
            import_names=['lzero.policy.unizero', 'lzero_kv.plugin'],
        ),
    )
    return EasyDict(cartpole_unizero_kv_config), EasyDict(cartpole_unizero_kv_create_config)


def main(
    env_id: str = 'CartPole-v0',
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
    args = parse_arguments('UniZero on CartPole.', 'CartPole-v0', ENVIRONMENTS)
    main(args.env, args.seed, smoke=args.smoke, kv=args.kv, model_path=args.model_path)
