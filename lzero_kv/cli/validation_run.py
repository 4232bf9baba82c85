"""One training in one mode of validation, in a process of its own: `python -m lzero_kv.cli.validation_run`.

It is given the number of an open file descriptor, on which it reports, and what to do, as JSON. It reports
in lines of JSON: some with `progress`, at the end one with `run` or with `error`. All other output is the
host's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lzero_kv.cli.bounded_training import EnoughSteps, Progress, bounded, every
from lzero_kv.cli.child import serve, tell
from lzero_kv.cli.engagement import alone
from lzero_kv.cli.training_call import ConfigError, TrainingCall, training_call
from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero.settings import FLAG
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
    given = call.config.get('policy', {}).get('model', {}).get('world_model_cfg', {})
    folder = Path(request.folder) / 'training' / request.mode
    call, notes = alone(call, request.config, folder, flag=True)
    if given.get(FLAG) is not True:
        notes.insert(0, f'{FLAG} is not True in the config and was switched on for this run')
    policy = call.config['policy']
    world_model = policy['model']['world_model_cfg']
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
    try:
        KVCacheConfig.from_world_model_cfg(world_model)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'{request.config}: {error}') from error
    return call, notes


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
    tell(report, numbers)


if __name__ == '__main__':
    sys.exit(serve(lambda asked, report: run(Request(**asked), report).as_dict()))
