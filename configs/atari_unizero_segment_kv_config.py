"""UniZero on Atari with lzero_kv's cache, collecting segments and reanalysing the buffer.

    python configs/atari_unizero_segment_kv_config.py --env PongNoFrameskip-v4 --seed 0

Is it on? One line of the log says so: 'lzero_kv ...: on: ...'. Without it LightZero trains with its own
cache. Before a training: lzero-kv doctor FILE.

The settings are those of LightZero's
    zoo/atari/config/atari_unizero_segment_config.py
What turns the cache on: `use_new_cache_manager` and `kv_cache` in world_model_cfg, and 'lzero_kv.plugin' in
import_names.
"""

from __future__ import annotations

from easydict import EasyDict
from zoo.atari.config.atari_env_action_space_map import atari_env_action_space_map

from lzero_kv.configs.command_line import parse_arguments, require_known

# ==============================================================
# the most frequently changed settings
# ==============================================================
FULL = EasyDict(
    collector_env_num=8,
    num_segments=8,
    game_segment_length=20,
    evaluator_env_num=10,
    num_simulations=50,
    max_env_step=int(5e5),
    batch_size=64,
    num_layers=2,
    num_heads=8,
    embed_dim=768,
    replay_ratio=0.25,
    num_unroll_steps=10,
    infer_context_length=4,
    # How often the buffer is reanalysed: n >= 1 times an epoch, or once every 1/n epochs.
    buffer_reanalyze_freq=1 / 50,
    # Sequences of num_unroll_steps transitions that one reanalysis takes.
    reanalyze_batch_size=160,
    # The older part of the buffer that reanalysis draws from; 1 is all of it.
    reanalyze_partition=0.75,
    eval_freq=int(5e3),  # training iterations
    max_episode_steps=int(1.08e5),
    env_manager='subprocess',
)
SMOKE = EasyDict(
    collector_env_num=2,
    num_segments=2,
    game_segment_length=20,
    evaluator_env_num=2,
    num_simulations=8,
    max_env_step=100,  # two collections: the evaluation stands between them
    batch_size=8,
    num_layers=2,
    num_heads=4,
    embed_dim=64,
    replay_ratio=0.1,
    num_unroll_steps=5,
    infer_context_length=4,
    buffer_reanalyze_freq=1,
    reanalyze_batch_size=4,
    reanalyze_partition=0.75,
    eval_freq=1,
    max_episode_steps=50,
    env_manager='base',
)


def make_config(
    env_id: str, seed: int, smoke: bool = False, kv: bool = True, size: EasyDict | None = None
) -> tuple[EasyDict, EasyDict]:
    """The two configs that `train_unizero_segment` takes: (main_config, create_config).

    size: settings in the place of FULL (or, with smoke, of SMOKE). Raises ValueError for an unknown env_id.
    """
    require_known(env_id, atari_env_action_space_map)
    action_space_size = atari_env_action_space_map[env_id]
    size = size or (SMOKE if smoke else FULL)
    game = env_id.removesuffix('NoFrameskip-v4')

    atari_unizero_segment_kv_config = dict(
        exp_name=(
            f'data_lz/data_unizero_kv/{game}/{game}_uz-segment_kv-{"on" if kv else "off"}'
            f'{"_smoke" if smoke else ""}_brf{size.buffer_reanalyze_freq}-rbs{size.reanalyze_batch_size}'
            f'-rp{size.reanalyze_partition}_nlayer{size.num_layers}_numsegments-{size.num_segments}'
            f'_gsl{size.game_segment_length}_rr{size.replay_ratio}'
            f'_Htrain{size.num_unroll_steps}-Hinfer{size.infer_context_length}'
            f'_sim{size.num_simulations}_bs{size.batch_size}_seed{seed}'
        ),
        env=dict(
            stop_value=int(1e6),
            env_id=env_id,
            observation_shape=(3, 64, 64),
            gray_scale=False,
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
            n_evaluator_episode=size.evaluator_env_num,
            manager=dict(shared_memory=False),
            collect_max_episode_steps=size.max_episode_steps,
            eval_max_episode_steps=size.max_episode_steps,
        ),
        policy=dict(
            learn=dict(learner=dict(hook=dict(save_ckpt_after_iter=1000000))),
            model=dict(
                observation_shape=(3, 64, 64),
                action_space_size=action_space_size,
                support_scale=300,
                value_support_range=(-300.0, 301.0, 1.0),  # what git main reads in the place of support_scale
                reward_support_range=(-300.0, 301.0, 1.0),
                world_model_cfg=dict(
                    support_size=601,
                    policy_entropy_weight=5e-3,
                    continuous_action_space=False,
                    max_blocks=size.num_unroll_steps,
                    max_tokens=2 * size.num_unroll_steps,  # a step has two tokens: observation and action
                    context_length=2 * size.infer_context_length,
                    device='cuda',  # LightZero takes the CPU where there is no GPU
                    action_space_size=action_space_size,
                    num_layers=size.num_layers,
                    num_heads=size.num_heads,
                    embed_dim=size.embed_dim,
                    obs_type='image',
                    env_num=max(size.collector_env_num, size.evaluator_env_num),
                    num_simulations=size.num_simulations,  # the world model does not see the policy's
                    rotary_emb=False,
                    use_new_cache_manager=kv,
                    kv_cache=dict(),  # every field has a default
                ),
            ),
            model_path=None,
            use_augmentation=False,
            manual_temperature_decay=False,
            threshold_training_steps_for_final_temperature=int(2.5e4),
            use_priority=False,
            num_unroll_steps=size.num_unroll_steps,
            update_per_collect=None,
            replay_ratio=size.replay_ratio,
            batch_size=size.batch_size,
            optim_type='AdamW',
            learning_rate=0.0001,
            num_simulations=size.num_simulations,
            num_segments=size.num_segments,
            td_steps=5,
            train_start_after_envsteps=0,
            game_segment_length=size.game_segment_length,
            grad_clip_value=5,
            replay_buffer_size=int(1e6),
            eval_freq=size.eval_freq,
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
            buffer_reanalyze_freq=size.buffer_reanalyze_freq,
            reanalyze_batch_size=size.reanalyze_batch_size,
            reanalyze_partition=size.reanalyze_partition,
        ),
    )
    atari_unizero_segment_kv_create_config = dict(
        env=dict(
            type='atari_lightzero',
            import_names=['zoo.atari.envs.atari_lightzero_env'],
        ),
        env_manager=dict(type=size.env_manager),
        policy=dict(
            type='unizero',
            import_names=['lzero.policy.unizero', 'lzero_kv.plugin'],
        ),
    )
    return EasyDict(atari_unizero_segment_kv_config), EasyDict(atari_unizero_segment_kv_create_config)


def main(
    env_id: str = 'PongNoFrameskip-v4',
    seed: int = 0,
    smoke: bool = False,
    kv: bool = True,
    model_path: str | None = None,
) -> None:
    """Train until the size's max_env_step, from a checkpoint where one is given."""
    main_config, create_config = make_config(env_id, seed, smoke, kv)
    from lzero.entry import train_unizero_segment

    train_unizero_segment(
        [main_config, create_config],
        seed=seed,
        model_path=model_path,
        max_env_step=(SMOKE if smoke else FULL).max_env_step,
    )


if __name__ == '__main__':
    args = parse_arguments('UniZero on Atari, by segments.', 'PongNoFrameskip-v4', atari_env_action_space_map)
    main(args.env, args.seed, smoke=args.smoke, kv=args.kv, model_path=args.model_path)
