"""UniZero on Atari on several GPUs with lzero_kv's cache, one process for each GPU.

    torchrun --nproc_per_node=2 configs/atari_unizero_ddp_kv_config.py --env PongNoFrameskip-v4 --seed 0

Is it on? One line of the log says so: 'lzero_kv ...: on: ...'. Without it LightZero trains with its own
cache. Before a training: lzero-kv doctor FILE.

The settings are those of atari_unizero_kv_config.py. What makes it several processes is what LightZero's
    zoo/atari/config/atari_unizero_ddp_config.py
has: `multi_gpu`, the episodes of all processes together, and `DDPContext` around the training.
"""

from __future__ import annotations

from ding.utils import DDPContext, get_world_size
from easydict import EasyDict
from zoo.atari.config.atari_env_action_space_map import atari_env_action_space_map

from lzero_kv.configs import atari_unizero_kv_config as one_gpu
from lzero_kv.configs.command_line import parse_arguments

FULL, SMOKE = one_gpu.FULL, one_gpu.SMOKE


def make_config(
    env_id: str, seed: int, smoke: bool = False, kv: bool = True, size: EasyDict | None = None
) -> tuple[EasyDict, EasyDict]:
    """The two configs that `train_unizero` takes in each process, before `lz_to_ddp_config` divides batch
    and episodes among the processes.

    size: as in atari_unizero_kv_config.py, environments for each process. Raises ValueError for an unknown
    env_id.
    """
    main_config, create_config = one_gpu.make_config(env_id, seed, smoke, kv, size)
    main_config.exp_name = main_config.exp_name.replace('_uz_kv-', '_uz_ddp_kv-')
    main_config.policy.multi_gpu = True
    main_config.policy.n_episode *= get_world_size()
    return main_config, create_config


def main(
    env_id: str = 'PongNoFrameskip-v4',
    seed: int = 0,
    smoke: bool = False,
    kv: bool = True,
    model_path: str | None = None,
) -> None:
    """Train until all processes together have made the size's max_env_step, from a checkpoint where one is
    given."""
    from lzero.config.utils import lz_to_ddp_config
    from lzero.entry import train_unizero

    with DDPContext():
        main_config, create_config = make_config(env_id, seed, smoke, kv)
        train_unizero(
            [lz_to_ddp_config(main_config), create_config],
            seed=seed,
            model_path=model_path,
            max_env_step=(SMOKE if smoke else FULL).max_env_step,
        )


if __name__ == '__main__':
    args = parse_arguments(
        'UniZero on Atari on several GPUs.', 'PongNoFrameskip-v4', atari_env_action_space_map
    )
    main(args.env, args.seed, smoke=args.smoke, kv=args.kv, model_path=args.model_path)
