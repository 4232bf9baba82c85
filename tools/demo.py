"""Train UniZero on real Pong for a few minutes, then show what lzero_kv's cache did: `make demo`.

The size is small enough for two CPU cores; nothing is learnt in minutes, but every part of a training runs:
evaluation, collection with the compiled tree search, and updates of the network. At the end the last searches
are made once more, with LightZero's own cache: how long they take, and how many of its lookups are wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Several threads on two cores wait for each other. It has to be set before torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from demonstration.display import Display, show_failure, show_result
from demonstration.quiet import output_into

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path('data_lz') / 'demo'
ENV_ID = 'PongNoFrameskip-v4'
SEED = 0
SIZE = {
    'collector_env_num': 4,
    'evaluator_env_num': 2,
    'num_simulations': 25,
    'max_env_step': 960,  # three collections of four episodes: three points in every chart
    'max_episode_steps': 80,
    'batch_size': 16,
    'num_unroll_steps': 10,
    'num_heads': 8,
    'embed_dim': 256,
    'replay_ratio': 0.025,
    'eval_freq': 12,  # training iterations: at the start and before the last collection
}


def train(folder: Path, display: Display) -> None:
    """Run the training of the Atari config in the demo's size, its log under `folder`."""
    # Imported here: torch and the host take seconds to load, and say much while they do.
    sys.path.insert(0, str(ROOT / 'configs'))
    import atari_unizero_kv_config as config
    from demonstration.stock import compare
    from demonstration.watch import watching
    from easydict import EasyDict
    from lzero.entry import train_unizero

    size = EasyDict({**config.SMOKE, **SIZE})
    main_config, create_config = config.make_config(ENV_ID, SEED, size=size)
    main_config.exp_name = str(folder / 'pong')
    with watching(display.progress):
        train_unizero((main_config, create_config), seed=SEED, max_env_step=size['max_env_step'])
    progress = display.progress
    progress.phase = 'comparing'
    progress.beside = compare(progress.policy, progress.searches, SEED, progress.searched)


def main() -> int:
    """Entry point: 0 when the training ran with the cache in use, 1 when it failed, 130 when interrupted."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # no options: words are refused, --help helps
    os.chdir(ROOT)
    folder = RUNS / time.strftime('%Y%m%d-%H%M%S')
    folder.mkdir(parents=True)
    log = folder / 'host.log'
    with output_into(log) as screen:
        display = Display(screen, SIZE)
        try:
            with display.running(f'UniZero on Pong, lzero_kv cache on; the host writes to {log}'):
                train(folder, display)
        except KeyboardInterrupt:
            display.console.print(f'\ninterrupted; what the host wrote is in {log}')
            return 130
        except Exception as error:
            show_failure(display.console, error, log)
            return 1
        return show_result(display, folder / 'pong' / 'log' / 'serial')


if __name__ == '__main__':
    sys.exit(main())
