"""`lzero-kv validate`: a bounded training of any config with both caches side by side, and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lzero_kv.cli.console import Bar, show_line, show_table
from lzero_kv.cli.training import (
    UNBOUNDED,
    EnoughSteps,
    Hear,
    Progress,
    Request,
    answer_of,
    bounded,
    told_versions,
)
from lzero_kv.cli.training_call import ConfigError, OfConfig, TrainingCall, alone, training_call
from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero import host
from lzero_kv.lightzero.settings import FLAG
from lzero_kv.telemetry.counters import ValidationCounters
from lzero_kv.telemetry.table import validation_table
from lzero_kv.validation.findings import load_finding
from lzero_kv.validation.report import (
    MODE_RUN,
    Failure,
    ModeRun,
    ValidationReport,
    plot_validation,
    validation_page,
)

RECOMPUTE = 'recompute'
MODES = ('store', 'model')
PAGE, PICTURE, NUMBERS = 'validation.md', 'validation.png', 'validation.json'


def validate(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='CONFIG')],
    env_steps: int = 400,
    modes: tuple[Literal['recompute', 'store', 'model'], ...] = (),
    rate: float = 1.0,
    simulations: int | None = None,
    out: Annotated[Path, tyro.conf.arg(metavar='DIR')] = Path('data_lz/validation'),
    arguments: OfConfig = (),
    command: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = '',
) -> int:
    """Train with this cache and LightZero's own side by side, and account for each difference.

    CONFIG is a config in LightZero's form, with or without the plugin in it. Its code is executed: give
    only files that you trust. What follows `--` is its own
    command line: lzero-kv validate CONFIG.py --env-steps 200 -- --smoke. Each mode is a training of its
    own, in one process, that ends after --env-steps. DIR gets a page (validation.md, validation.png) that
    can go into a bug report, the same as validation.json, findings, and what LightZero wrote. An earlier
    report there is removed before the first training.

    Args:
        config: a config file that LightZero can run.
        env_steps: environment steps in each mode, collected and evaluated together; evaluation takes a
            quarter of them at most.
        modes: 'store' compares what each lookup is handed; 'model' also what a stock world model over the
            same weights makes of it: latent states, rewards, policies and values. 'recompute' compares
            with a computation without a cache alone. By default 'store' and 'model' with LightZero 0.2.0,
            'recompute' with its development branch, which has no other.
        rate: fraction of searches whose nodes are compared, above 0; roots always are.
        simulations: of a search; the config's own number if it is not given.
        out: the folder of the report.
        arguments: of the config.
        command: the whole command line.

    Returns:
        0 when every difference has a proven cause and the cache was never wrong, else 1.
    """
    request = Request(str(config), arguments, '', env_steps, str(out), rate=rate, simulations=simulations)
    _check(request, modes)
    modes_here = _modes_here(modes)
    _clear(out)
    runs = tuple(_run_modes(request, modes_here))
    report = ValidationReport(str(config), arguments, command, told_versions(), runs)
    _write(report, out)
    _show(report, out)
    return 0 if report.passed else 1


def _check(request: Request, modes: Sequence[str]) -> None:
    """Refuse what cannot be, before anything runs."""
    problems = []
    for name, number in (('env-steps', request.env_steps), ('simulations', request.simulations)):
        if number is not None and number < 1:
            problems.append(f'--{name}: expected 1 or more, got {number}')
    if len(set(modes)) < len(modes):
        problems.append(f'--modes: expected some of recompute, store and model, got {" ".join(modes)}')
    if not 0 < request.rate <= 1:
        problems.append(f'--rate: expected a fraction above 0 and up to 1, got {request.rate:g}')
    if not Path(request.config).is_file():
        problems.append(f'{request.config} is no file; give a config file that LightZero can run')
    if problems:
        raise ValueError('; '.join(problems))


def _modes_here(given: Sequence[str]) -> Sequence[str]:
    """The modes that were given, or those of the LightZero that is installed.

    Raises:
        ValueError: they need the caches of the release, and it is not the release.
    """
    if list(given) == [RECOMPUTE]:
        return given
    with contextlib.redirect_stderr(io.StringIO()):  # what LightZero's own imports warn of
        release = host.is_release()
    if release:
        return given or MODES
    if given:
        raise ValueError(
            '--modes: store and model compare with the caches of LightZero 0.2.0, and another LightZero is '
            f'installed; write --modes {RECOMPUTE}'
        )
    return (RECOMPUTE,)


def _clear(out: Path) -> None:
    """Make the folder and remove an earlier report, which would stand beside a run that failed."""
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for name in (PAGE, PICTURE, NUMBERS):
            (out / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f'cannot write into {out}: {error.strerror}; choose another with --out') from error


def _run_modes(request: Request, modes: Sequence[str]) -> list[ModeRun]:
    runs = []
    with Bar() as bar:
        for number, mode in enumerate(modes):

            def hear(numbers: dict[str, int], mode: str = mode, number: int = number) -> None:
                state = (
                    f'mode {mode}: {numbers["steps"]:,} environment steps, {numbers["iterations"]:,} '
                    f'iterations, {numbers["compared"]:,} rows compared, {numbers["different"]:,} explained, '
                    f'{numbers["failures"]:,} not'
                )
                done = number * request.env_steps + min(numbers['steps'], request.env_steps)
                bar.show(done, len(modes) * request.env_steps, state)

            bar.say(f'mode {mode}: training for {request.env_steps:,} environment steps')
            asked, log = dataclasses.replace(request, name=mode), Path(request.folder) / f'{mode}.log'
            try:
                runs.append(MODE_RUN.validate_python(answer_of(__name__, asked, log, hear)))
            except ValueError as error:
                raise ValueError(f'mode {mode}: {error}') from error
    return runs


def _write(report: ValidationReport, out: Path) -> None:
    """Write the page, its picture and the numbers."""
    with _writing(out):
        (out / PAGE).write_text(validation_page(report, PICTURE), encoding='utf-8')
        (out / NUMBERS).write_text(report.as_json() + '\n', encoding='utf-8')
    plot_validation(report, out / PICTURE)


def _show(report: ValidationReport, out: Path) -> None:
    """Print the tables, the verdict and where the page is."""
    for run in report.runs:
        title = (
            f'Mode {run.mode}: {run.collected:,} environment steps collected, {run.evaluated:,} evaluated, '
            f'{run.iterations:,} training iterations, {run.simulations} simulations'
        )
        show_table(validation_table(run.columns, title))
        for note in run.notes:
            show_line(f'note: {note}')
    for run in report.runs:
        for failure in run.failures:
            show_line(f'mode {run.mode}: {failure.sentence}')
            show_line(f'  lzero-kv explain {failure.file}')
    show_line(report.verdict)
    show_line(f'report: {out / PAGE}')


def train(request: Request, hear: Hear) -> dict[str, Any]:
    """Train in one mode, and return the fields of its :class:`ModeRun`.

    Raises:
        ConfigError: the config is none that can be validated.
        RuntimeError: the training ran, and validation did not engage or compared nothing.
    """
    call, notes = prepared(training_call(Path(request.config), request.arguments), request)
    progress = Progress(request.env_steps, lambda progress: hear(_numbers(progress)))
    begun, wall = time.monotonic(), time.time()
    with bounded(progress):
        try:
            call.run(max_env_step=UNBOUNDED, max_train_iter=UNBOUNDED)
        except EnoughSteps:
            pass
        else:
            notes.append(f'the training ended by itself after {progress.steps:,} environment steps')
    run = ModeRun(
        mode=request.name,
        counters=compared(counters_of(progress), progress, request),
        collected=progress.collected,
        evaluated=progress.evaluated,
        iterations=progress.iterations,
        simulations=int(progress.policy._mcts_collect._cfg.num_simulations),
        seconds=time.monotonic() - begun,
        failures=failures_in(_findings_of(request), since=wall),
        notes=tuple(notes),
    )
    return MODE_RUN.dump_python(run, mode='json')


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
    call, notes = alone(call, Path(request.folder) / 'training' / request.name, flag=True)
    if given.get(FLAG) is not True:
        notes.insert(0, f'{FLAG} is not True in the config and was switched on for this run')
    policy = call.config['policy']
    world_model = policy['model']['world_model_cfg']
    world_model['cache_validation_mode'] = request.name
    world_model['kv_cache'] = {
        **_cache_choices(world_model),
        'validation_rate': request.rate,
        'validation_on_failure': 'log',
        'validation_folder': str(_findings_of(request)),
    }
    if request.simulations is not None:
        policy.update(dict.fromkeys(host.SIMULATIONS, request.simulations))
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


def _findings_of(request: Request) -> Path:
    """Where a run in this mode saves its findings."""
    return Path(request.folder) / 'findings' / request.name


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


def _numbers(progress: Progress) -> dict[str, int]:
    total = (counters_of(progress) or ValidationCounters()).total
    shown = {name: getattr(total, name) for name in ('compared', 'different', 'failures')}
    return {**progress.counts, **shown}
