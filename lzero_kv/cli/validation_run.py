"""One training in one mode of validation, in a process of its own: `python -m lzero_kv.cli.validation_run`.

It is given the number of an open file descriptor, on which it reports, and what to do, as JSON. It reports
in lines of JSON: some with `progress`, at the end one with `run` or with `error`. All other output is the
host's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lzero_kv.cli.bounded_training import EnoughSteps, Progress, bounded, every
from lzero_kv.cli.engagement import ENTRIES, PLUGIN, POLICIES
from lzero_kv.cli.training_call import ConfigError, TrainingCall, training_call
from lzero_kv.config import KVCacheConfig
from lzero_kv.telemetry.counters import ValidationCounters
from lzero_kv.validation.findings import load_finding
from lzero_kv.validation.report import Failure, ModeRun

PROGRESS_SECONDS = 0.25
UNBOUNDED = 10**10  # of the entry's own bounds; the number of environment steps is what ends the training


@dataclass(frozen=True)
class Request:
    """What is to run.

    Attributes:
        config: the config file.
        arguments: of the config file's command line.
        mode: 'store' or 'model'.
        env_steps: environment steps of collection and evaluation after which the training ends.
        rate: fraction of searches whose nodes are compared; roots always are.
        simulations: of a search; None for the config's own number.
        folder: where findings and what the host writes go.
    """

    config: str
    arguments: tuple[str, ...]
    mode: str
    env_steps: int
    rate: float
    simulations: int | None
    folder: str


def run(request: Request, report: TextIO) -> ModeRun:
    """Train, and return what validation counted.

    Raises:
        ConfigError: the config is none that can be validated.
        RuntimeError: the training ran, and validation did not engage or compared nothing.
    """
    folder = Path(request.folder)
    call, notes = prepared(training_call(Path(request.config), request.arguments), request)
    sys.path.insert(0, str(Path(request.config).resolve().parent))  # as `python CONFIG` has it
    import lzero.entry

    progress = Progress(
        request.env_steps, every(PROGRESS_SECONDS, lambda progress: _tell_progress(progress, report))
    )
    begun, wall = time.monotonic(), time.time()
    options = {**call.options, 'max_env_step': UNBOUNDED, 'max_train_iter': UNBOUNDED}
    with bounded(progress):
        try:
            getattr(lzero.entry, call.entry)([call.config, call.create_config], **options)
        except EnoughSteps:
            pass
        else:
            notes.append(f'the training ended by itself after {progress.steps:,} environment steps')
    counters = compared(counters_of(progress), progress, request)
    return ModeRun(
        mode=request.mode,
        counters=counters,
        collected=progress.collected,
        evaluated=progress.evaluated,
        iterations=progress.iterations,
        simulations=int(progress.policy._cfg.num_simulations),
        seconds=time.monotonic() - begun,
        failures=failures_in(findings_of(folder, request.mode), since=wall),
        notes=tuple(notes),
    )


def compared(counters: ValidationCounters | None, progress: Progress, request: Request) -> ValidationCounters:
    """Counters, where rows were compared.

    Raises:
        RuntimeError: validation did not engage, or nothing was compared.
    """
    if counters is None:
        raise RuntimeError(
            f'validation did not engage: the training ended after {progress.steps:,} environment steps and '
            'no policy with the cache manager acted; look at the config with lzero-kv doctor'
        )
    if not counters.total.compared:
        raise RuntimeError(
            f'nothing was compared in {progress.steps:,} environment steps and {counters.searches:,} '
            f'searches; write a larger --env-steps than {request.env_steps:,} or a --rate above '
            f'{request.rate:g}'
        )
    return counters


def prepared(call: TrainingCall, request: Request) -> tuple[TrainingCall, list[str]]:
    """The call with the plugin and validation on, one process, and a log folder of its own; and what had to
    be changed for that, in words.

    Raises:
        ConfigError: the entry or the policy is none that the plugin knows, or `kv_cache` is impossible.
    """
    kind = call.create_config.get('policy', {}).get('type')
    if call.entry not in ENTRIES or kind not in POLICIES:
        raise ConfigError(
            f'{request.config} calls {call.entry} with the policy {kind!r}, for which there is no plugin; '
            f'give a config of {" or ".join(ENTRIES)} with {" or ".join(POLICIES)}'
        )
    config: Any = copy.deepcopy(call.config)
    create_config: Any = copy.deepcopy(call.create_config)
    policy, notes = config['policy'], []
    world_model = policy['model']['world_model_cfg']
    if world_model.get('use_new_cache_manager') is not True:
        world_model['use_new_cache_manager'] = True
        notes.append('use_new_cache_manager is not True in the config and was switched on for this run')
    names = list(create_config['policy'].get('import_names') or [f'lzero.policy.{kind}'])
    if PLUGIN not in names:
        create_config['policy']['import_names'] = [*names, PLUGIN]
        notes.append(f"'{PLUGIN}' is not in the config's import_names and was added for this run")
    world_model['cache_validation_mode'] = request.mode
    world_model['kv_cache'] = {
        **_cache_choices(world_model),
        'validation_rate': request.rate,
        'validation_on_failure': 'log',
        'validation_folder': str(findings_of(Path(request.folder), request.mode)),
    }
    if request.simulations is not None:
        policy['num_simulations'] = request.simulations
        if 'num_simulations' in world_model:  # where it is not, the host's own caches are made for 50
            world_model['num_simulations'] = request.simulations
    if create_config['env_manager'].get('type') != 'base':
        notes.append("the environments ran in the training's process: env_manager.type='base'")
    create_config['env_manager'] = {'type': 'base'}
    policy['use_wandb'] = False
    # relative: the host puts './' in front of it
    config['exp_name'] = os.path.relpath(Path(request.folder) / 'training' / request.mode)
    try:
        KVCacheConfig.from_world_model_cfg(world_model)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'{request.config}: {error}') from error
    return dataclasses.replace(call, config=config, create_config=create_config), notes


def _cache_choices(world_model: Mapping[str, Any]) -> dict[str, Any]:
    given = world_model.get('kv_cache') or {}
    return given.model_dump(exclude_unset=True) if isinstance(given, KVCacheConfig) else dict(given)


def findings_of(folder: Path, mode: str) -> Path:
    """Where a run in this mode saves its findings."""
    return folder / 'findings' / mode


def failures_in(folder: Path, since: float) -> tuple[Failure, ...]:
    """The findings that were saved in ``folder`` at ``since`` (seconds of the epoch) or later."""
    files = [
        path for path in sorted(folder.rglob('*')) if path.is_file() and path.stat().st_mtime >= since - 1
    ]
    return tuple(Failure(str(path), str(load_finding(path)).splitlines()[0]) for path in files)


def counters_of(progress: Progress) -> ValidationCounters | None:
    """What validation counted so far; None where it did not engage."""
    from lzero_kv.lightzero.reporting import run_counters

    return None if progress.policy is None else run_counters(progress.policy.kv_world_models)


def _tell_progress(progress: Progress, report: TextIO) -> None:
    counters = counters_of(progress)
    total = (counters or ValidationCounters()).total
    numbers = {
        'steps': progress.steps,
        'iterations': progress.iterations,
        'compared': total.compared,
        'different': total.different,
        'failures': total.failures,
    }
    print(json.dumps({'progress': numbers}), file=report, flush=True)


def main(descriptor: int, asked: str) -> int:
    """Entry point: 0, or 1 when an error was reported."""
    request = Request(**json.loads(asked))
    with os.fdopen(descriptor, 'w', encoding='utf-8') as report:
        try:
            answer = {'run': run(request, report).as_dict()}
        except Exception as error:
            traceback.print_exc()
            kind = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
            answer = {'error': f'{kind}{error}'}
        print(json.dumps(answer), file=report, flush=True)
    return 1 if 'error' in answer else 0


if __name__ == '__main__':
    sys.exit(main(int(sys.argv[1]), sys.argv[2]))
