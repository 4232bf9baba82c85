"""UniZero with lzero_kv's cache on a memory task that one CPU core learns: a cue at any frame.

    python configs/memory_recall_unizero_kv_config.py --seed 0

Is it on? One line of the log says so: 'lzero_kv ...: on: ...'. Without it LightZero trains with its own
cache. Before a training: lzero-kv doctor FILE.

The task is memory_recall_env.py's; the settings follow memory_unizero_kv_config.py, smaller, and with more
updates for a frame collected. The study of layer budgets (studies/budget/study.py) trains this model,
with shorter episodes first.
"""

from __future__ import annotations

from easydict import EasyDict

from lzero_kv.configs.command_line import parse_arguments, require_known
from lzero_kv.configs.memory_unizero_kv_config import make_config as make_memory_config

ENVIRONMENTS = ('memory_recall',)
DISTRACTOR_FRAMES = 20
REWARD_FRAMES = 6
CONTEXT_STEPS = 1 + DISTRACTOR_FRAMES + REWARD_FRAMES + 5  # the search looks past the last frame

# ==============================================================
# the most frequently changed settings
# ==============================================================
FULL = EasyDict(
    memory_length=DISTRACTOR_FRAMES,
    reward_frames=REWARD_FRAMES,
    max_env_step=int(1e5),
    num_layers=4,
    num_heads=4,
    embed_dim=64,
    collector_env_num=8,
    evaluator_env_num=8,
    num_simulations=16,
    n_episode=8,
    update_per_collect=40,
    batch_size=32,
    replay_ratio=0.1,
    reanalyze_ratio=0.0,
    eval_freq=int(1e3),
    env_manager='base',
)
SMOKE = EasyDict(
    FULL,
    max_env_step=80,
    embed_dim=32,
    collector_env_num=4,
    evaluator_env_num=2,
    num_simulations=6,
    n_episode=4,
    update_per_collect=3,
    batch_size=3,
    eval_freq=1,
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

    size: settings in the place of FULL (or, with smoke, of SMOKE). budget: the part of all tokens that layers
    keep, None for all. Raises ValueError for an unknown env_id.
    """
    require_known(env_id, ENVIRONMENTS)
    size = size or (SMOKE if smoke else FULL)
    main_config, create_config = make_memory_config('visual_match', seed, smoke, kv, size, budget)
    main_config.exp_name = main_config.exp_name.replace('visual_match', env_id)
    # Half of the episodes show the cue first, where it has to be kept longest.
    anywhere = list(range(size.memory_length + 1))
    main_config.env.cue_frames = [0] * len(anywhere) + anywhere
    main_config.env.num_apples = 0
    policy, world_model = main_config.policy, main_config.policy.model.world_model_cfg
    policy.learning_rate = 1e-3
    policy.fixed_temperature_value = 0.5
    policy.n_episode = size.n_episode
    policy.learn.learner.hook.save_ckpt_after_iter = 500
    # Of shorter episodes, too, so that their weights fit.
    world_model.max_blocks, world_model.max_tokens = CONTEXT_STEPS, 2 * CONTEXT_STEPS
    world_model.context_length = 2 * CONTEXT_STEPS
    world_model.embed_pdrop = world_model.resid_pdrop = world_model.attn_pdrop = 0.0
    create_config.env = EasyDict(type=env_id, import_names=['lzero_kv.configs.memory_recall_env'])
    return main_config, create_config


def main(
    env_id: str = 'memory_recall',
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
    args = parse_arguments('UniZero on a small memory task.', 'memory_recall', ENVIRONMENTS, budget=True)
    main(
        args.env,
        args.seed,
        smoke=args.smoke,
        kv=args.kv,
        model_path=args.model_path,
        budget=args.budget,
    )
