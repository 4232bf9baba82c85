"""Train UniZero on real Pong for half an hour with validation sampled; nothing may grow: `make soak`.

Collection, evaluation, training and reanalysis run as in every training, in a small size with a replay buffer
that is soon full. Ends with exit code 0 when memory and the time of a search are flat, no difference is
unexplained and the cache was never wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

# Several threads on two cores wait for each other. It has to be set before torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')

from demonstration.quiet import output_into
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'configs')]
RUNS = Path('data_lz') / 'soak'
ENV_ID = 'PongNoFrameskip-v4'
SIZE = {
    'collector_env_num': 4,
    'evaluator_env_num': 2,
    'num_simulations': 12,
    'max_env_step': 10**10,  # the time ends it
    'max_episode_steps': 60,
    'batch_size': 16,
    'num_unroll_steps': 5,
    'replay_ratio': 0.05,
    'eval_freq': 40,  # training iterations
}
REPLAY_TRANSITIONS = 600  # full after three collections, within the first minutes
REANALYZE_RATIO = 0.25
WIDTH = 120  # of what goes into a file or a pipe


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: a value is impossible; the message says which.
    """
    parser = argparse.ArgumentParser(description='A long training of real Pong with validation sampled.')
    parser.add_argument('--minutes', type=float, default=30.0, help='of training (default: 30)')
    parser.add_argument(
        '--mode', choices=('store', 'model'), default='model', help='of validation (default: model)'
    )
    parser.add_argument('--rate', type=float, default=0.05, help='of searches compared (default: 0.05)')
    parser.add_argument('--every', type=float, default=20.0, help='seconds between samples (default: 20)')
    args = parser.parse_args(arguments)
    if args.minutes <= 0 or args.every <= 0:
        parser.error(f'--minutes and --every: expected above 0, got {args.minutes:g} and {args.every:g}')
    if not 0 < args.rate <= 1:
        parser.error(f'--rate: expected a fraction above 0 and up to 1, got {args.rate:g}')
    return args


def train(folder: Path, args: argparse.Namespace) -> None:
    """Run the training of the Atari config in the soak's size, its log and findings under `folder`."""
    import atari_unizero_kv_config as config
    from easydict import EasyDict
    from lzero.entry import train_unizero

    size = EasyDict({**config.SMOKE, **SIZE})
    main_config, create_config = config.make_config(ENV_ID, 0, size=size)
    main_config['exp_name'] = str(folder / 'pong')
    policy = main_config['policy']
    policy['replay_buffer_size'], policy['reanalyze_ratio'] = REPLAY_TRANSITIONS, REANALYZE_RATIO
    world_model = policy['model']['world_model_cfg']
    world_model['cache_validation_mode'] = args.mode
    world_model['kv_cache'] = dict(
        validation_rate=args.rate,
        validation_on_failure='log',
        validation_folder=str(folder / 'findings'),
    )
    train_unizero((main_config, create_config), seed=0, max_env_step=size['max_env_step'])


def main() -> int:
    """Entry point: 0 when everything stayed flat and right, 1 when not or it failed, 130 when interrupted."""
    args = parse()
    # A shell lets what it runs in the background ignore the first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.chdir(ROOT)
    folder = RUNS / time.strftime('%Y%m%d-%H%M%S')
    folder.mkdir(parents=True)
    log = folder / 'host.log'
    with output_into(log) as screen:
        console = Console(file=screen, width=None if screen.isatty() else WIDTH)
        console.print(
            f'UniZero on Pong for {args.minutes:g} minutes, mode {args.mode}, {args.rate:g} of searches '
            f'compared; the host writes to {log}',
            highlight=False,
        )
        # Imported here: torch and the host take seconds to load, and say much while they do.
        from soaking.samples import Recorder, Sample, TimeIsUp

        def show(sample: Sample) -> None:
            console.print(line_of(sample), highlight=False)

        recorder, interrupted = Recorder(args.minutes, args.every, show), False
        try:
            with recorder.recording():
                train(folder, args)
        except TimeIsUp:
            pass
        except KeyboardInterrupt:
            interrupted = True
            console.print(f'interrupted; what the host wrote is in {log}')
        except Exception as error:
            traceback.print_exc()
            console.print(f'The soak failed: {type(error).__name__}: {error}\nSee {log}', markup=False)
            return 1
        code = conclude(recorder.samples, folder, console)
        return 130 if interrupted else code


def line_of(sample: object) -> str:
    """A sample in one line."""
    from lzero_kv.telemetry.table import format_bytes

    s = vars(sample)
    search = '     - ' if s['search_seconds'] is None else f'{1e3 * s["search_seconds"]:5.0f} ms'
    return (
        f'{s["seconds"] / 60:5.1f} min  {format_bytes(s["resident_bytes"])} resident, '
        f'{format_bytes(s["replay_bytes"])} of it replay, {format_bytes(s["pool_bytes"])} pools, '
        f'{search} a search, {s["env_steps"]:,} steps, '
        f'{s["train_iterations"]:,} iterations; {s["compared"]:,} compared, {s["different"]:,} explained, '
        f'{s["unexplained"] + s["cache_wrong"]:,} not'
    )


def conclude(samples: list, folder: Path, console: Console) -> int:
    """Show table, picture and numbers; 0, or 1 when something grew, failed or could not be judged."""
    from soaking.judging import judge, numbers, passed, plot_soak, soak_table

    with (folder / 'samples.jsonl').open('w', encoding='utf-8') as file:
        file.writelines(json.dumps(dataclasses.asdict(sample)) + '\n' for sample in samples)
    try:
        judgements = judge(samples)
    except ValueError as error:
        console.print(f'not judged: {error}', highlight=False, markup=False)
        return 1
    end = samples[-1]
    console.print(soak_table(judgements, end))
    console.print(f'picture: {plot_soak(samples, folder / "soak.png")}', highlight=False, soft_wrap=True)
    if end.unexplained or end.cache_wrong:
        console.print(f'findings, for lzero-kv explain: {folder / "findings"}', highlight=False)
    console.print(json.dumps(numbers(judgements, end)), highlight=False, soft_wrap=True, markup=False)
    return 0 if passed(judgements, end) else 1


if __name__ == '__main__':
    sys.exit(main())
