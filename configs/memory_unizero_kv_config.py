"""UniZero on the memory tasks with lzero_kv's cache: long contexts, sampled by episode.

    python configs/memory_unizero_kv_config.py --env visual_match --seed 0

Is it on? One line of the log says so: 'lzero_kv ...: on: ...'. Without it LightZero trains with its own
cache. Before a training: lzero-kv doctor FILE.

The settings are those of LightZero's
    zoo/memory/config/memory_unizero_config.py
What turns the cache on: `use_new_cache_manager` and `kv_cache` in world_model_cfg, and 'lzero_kv.plugin' in
import_names.
"""

from __future__ import annotations

from easydict import EasyDict

from lzero_kv.configs.command_line import parse_arguments, require_known
from lzero_kv.configs.memory_repairs import repair_memory_tasks

# Frames of the first phase, in which the agent sees what it has to remember.
EXPLORE_FRAMES = {'visual_match': 1, 'key_to_door': 15}

# ==============================================================
# the most frequently changed settings
# ==============================================================
FULL = EasyDict(
    memory_length=60,  # frames between what is to be remembered and the question
    reward_frames=15,
    max_env_step=int(1e6),
    num_layers=4,
    num_heads=4,
    embed_dim=256,
    collector_env_num=8,
    evaluator_env_num=10,
    num_simulations=50,
    update_per_collect=50,
    batch_size=64,
    replay_ratio=0.1,
    reanalyze_ratio=0.0,
    eval_freq=int(5e3),  # training iterations
    env_manager='subprocess',
)
SMOKE = EasyDict(
    memory_length=5,
    reward_frames=15,
    max_env_step=80,
    num_layers=2,
    num_heads=2,
    embed_dim=32,
    collector_env_num=4,
    evaluator_env_num=2,
    num_simulations=6,
    update_per_collect=5,
    batch_size=3,
    replay_ratio=0.1,
    reanalyze_ratio=0.0,
    eval_freq=1,
    env_manager='base',
)


def make_config(
    env_id: str,
    seed: int,
    smoke: bool = False,
    kv: bool = True,
    size: EasyDict | None = None,
    budget: float | None = None,
) -> tuple[EasyDict, EasyDict]:
    """The two configs that `train_unizero` takes: (main_config, create_config).

    Repairs pycolab and the host's model first, so that environment workers inherit the repairs.
    size: settings in the place of FULL (or, with smoke, of SMOKE). budget: the part of all tokens that layers
    keep, None for all. Raises ValueError for an unknown env_id.
    """
    require_known(env_id, EXPLORE_FRAMES)
    repair_memory_tasks()
    size = size or (SMOKE if smoke else FULL)
    episode_length = EXPLORE_FRAMES[env_id] + size.memory_length + size.reward_frames
    # The search looks past the last frame: five more steps keep the first frame in the context until then.
    context_steps = episode_length + 5

    memory_unizero_kv_config = dict(
        exp_name=(
            f'data_lz/data_unizero_kv/{env_id}/{env_id}_memlen-{size.memory_length}_uz'
            f'_kv-{"on" if kv else "off"}{"" if budget is None else f"-{budget}"}{"_smoke" if smoke else ""}'
            f'_layer{size.num_layers}-head{size.num_heads}_edim{size.embed_dim}_H{episode_length}'
            f'_sim{size.num_simulations}_bs{size.batch_size}_upc{size.update_per_collect}_seed{seed}'
        ),
        env=dict(
            stop_value=int(1e6),
            env_id=env_id,
            flatten_observation=False,
            max_frames=dict(
                explore=EXPLORE_FRAMES[env_id],
                distractor=size.memory_length,
                reward=size.reward_frames,
            ),
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
            n_evaluator_episode=size.evaluator_env_num,
            manager=dict(shared_memory=False),
        ),
        policy=dict(
            learn=dict(learner=dict(hook=dict(save_ckpt_after_iter=1000000))),
            sample_type='episode',  # a sample that starts after the first frame has nothing to remember
            model=dict(
                observation_shape=(3, 5, 5),
                action_space_size=4,
                world_model_cfg=dict(
                    max_blocks=context_steps,
                    max_tokens=2 * context_steps,
                    context_length=2 * context_steps,
                    device='cuda',  # LightZero takes the CPU where there is no GPU
                    action_space_size=4,
                    num_layers=size.num_layers,
                    num_heads=size.num_heads,
                    embed_dim=size.embed_dim,
                    env_num=max(size.collector_env_num, size.evaluator_env_num),
                    obs_type='image_memory',
                    policy_entropy_weight=5e-3,
                    use_new_cache_manager=kv,
                    # every field has a default
                    kv_cache=dict() if budget is None else dict(budget=dict(ratio=budget)),
                ),
            ),
            model_path=None,
            num_unroll_steps=episode_length,
            td_steps=episode_length,
            discount_factor=0.99,
            game_segment_length=episode_length,
            replay_ratio=size.replay_ratio,
            update_per_collect=size.update_per_collect,
            batch_size=size.batch_size,
            optim_type='AdamW',
            learning_rate=1e-4,
            num_simulations=size.num_simulations,
            reanalyze_ratio=size.reanalyze_ratio,
            n_episode=size.collector_env_num,
            eval_freq=size.eval_freq,
            replay_buffer_size=int(1e6),
            collector_env_num=size.collector_env_num,
            evaluator_env_num=size.evaluator_env_num,
        ),
    )
    memory_unizero_kv_create_config = dict(
        env=dict(
            type='memory_lightzero',
            import_names=['zoo.memory.envs.memory_lightzero_env'],
        ),
        env_manager=dict(type=size.env_manager),
        policy=dict(
            type='unizero',
            import_names=['lzero.policy.unizero', 'lzero_kv.plugin'],
        ),
    )
    return EasyDict(memory_unizero_kv_config), EasyDict(memory_unizero_kv_create_config)


def main(
    env_id: str = 'visual_match',
    seed: int = 0,
    smoke: bool = False,
    kv: bool = True,
    model_path: str | None = None,
    budget: float | None = None,
) -> None:
    """Train until the size's max_env_step, from a checkpoint where one is given."""
    main_config, create_config = make_config(env_id, seed, smoke, kv, budget=budget)
    from lzero.entry import train_unizero

    train_unizero(
        [main_config, create_config],
        seed=seed,
        model_path=model_path,
        max_env_step=(SMOKE if smoke else FULL).max_env_step,
    )


if __name__ == '__main__':
    args = parse_arguments('UniZero on the memory tasks.', 'visual_match', EXPLORE_FRAMES, budget=True)
    main(
        args.env,
        args.seed,
        smoke=args.smoke,
        kv=args.kv,
        model_path=args.model_path,
        budget=args.budget,
    )
