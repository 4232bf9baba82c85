"""`lzero-kv validate`: a bounded training of any config with both caches side by side, and its report."""

from __future__ import annotations

import dataclasses
import platform
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lzero_kv.cli.checks import installed_version
from lzero_kv.cli.child import ChildFailed, answer_of
from lzero_kv.cli.console import show_error, show_line, show_table
from lzero_kv.cli.validation_run import Request
from lzero_kv.telemetry.validation import columns_of, validation_table
from lzero_kv.validation.report import ModeRun, ValidationReport

MODES = ('store', 'model')
PAGE, PICTURE, NUMBERS = 'validation.md', 'validation.png', 'validation.json'
TOLD = ('LightZero', 'DI-engine', 'torch', 'numpy')


class ValidationFailed(ValueError):
    """There is nothing to report; the message says why and what to write."""


def validate_with(arguments: Sequence[str]) -> Callable[..., int]:
    """The command, for a config that is itself given `arguments`."""

    def validate(
        config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='CONFIG')],
        env_steps: int = 400,
        modes: tuple[Literal['recompute', 'store', 'model'], ...] = MODES,
        rate: float = 1.0,
        simulations: int | None = None,
        out: Annotated[Path, tyro.conf.arg(metavar='DIR')] = Path('data_lz/validation'),
    ) -> int:
        """Train with this cache and LightZero's own side by side, and account for each difference.

        CONFIG is a config in LightZero's form, with or without the plugin in it. Its code is executed: give
        only files that you trust. What follows `--` is its own
        command line: lzero-kv validate CONFIG.py --env-steps 200 -- --smoke. Each mode is a training of its
        own, in one process, that ends after --env-steps. DIR gets a page (validation.md, validation.png) that
        can go into a bug report, the same as validation.json, findings, and what LightZero wrote.

        Args:
            config: a config file that LightZero can run.
            env_steps: environment steps in each mode, collected and evaluated together; evaluation takes a
                quarter of them at most.
            modes: 'store' compares what each lookup is handed; 'model' also what a stock world model over the
                same weights makes of it: latent states, rewards, policies and values. 'recompute' compares
                with a computation without a cache alone, on LightZero's development branch too.
            rate: fraction of searches whose nodes are compared, above 0; roots always are.
            simulations: of a search; the config's own number if it is not given.
            out: the folder of the report.

        Returns:
            0 when every difference has a proven cause and the cache was never wrong, else 1.
        """
        asked = [
            *('lzero-kv', 'validate', str(config), '--env-steps', str(env_steps)),
            *('--modes', *modes, '--rate', f'{rate:g}'),
            *([] if simulations is None else ['--simulations', str(simulations)]),
            *('--out', str(out)),
            *(['--', *arguments] if arguments else []),
        ]
        try:
            _check(env_steps, modes, rate, simulations, config, out)
            request = Request(str(config), tuple(arguments), '', env_steps, rate, simulations, str(out))
            report = ValidationReport(
                str(config),
                tuple(arguments),
                shlex.join(asked),
                versions(),
                tuple(_run_modes(request, modes)),
            )
            write(report, out)
        except ValueError as error:
            show_error(str(error))
            return 1
        except KeyboardInterrupt:
            show_error('interrupted; no report was written')
            return 130
        show(report, out)
        return 0 if report.passed else 1

    return validate


def _check(
    env_steps: int,
    modes: Sequence[str],
    rate: float,
    simulations: int | None,
    config: Path,
    out: Path,
) -> None:
    problems = []
    if env_steps < 1:
        problems.append(f'--env-steps: expected 1 or more, got {env_steps}')
    if not modes or len(set(modes)) < len(modes):
        problems.append(
            f'--modes: expected some of recompute, store and model, got {" ".join(modes) or "none"}'
        )
    if not 0 < rate <= 1:
        problems.append(f'--rate: expected a fraction above 0 and up to 1, got {rate:g}')
    if simulations is not None and simulations < 1:
        problems.append(f'--simulations: expected 1 or more, got {simulations}')
    if not config.is_file():
        problems.append(f'{config} is no file; give a config file that LightZero can run')
    if problems:
        raise ValidationFailed('; '.join(problems))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).open('a', encoding='utf-8').close()
    except OSError as error:
        raise ValidationFailed(
            f'cannot write into {out}: {error.strerror}; choose another folder with --out'
        ) from error


def _run_modes(request: Request, modes: Sequence[str]) -> list[ModeRun]:
    runs = []
    console = Console()
    with Progress(
        TextColumn('{task.description:<11}'),
        BarColumn(24),
        MofNCompleteColumn(),
        TextColumn('environment steps, {task.fields[state]}'),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        for mode in modes:
            task = bars.add_task(f'mode {mode}', total=request.env_steps, state='loading LightZero')

            def show_progress(numbers: dict[str, int], task: Any = task) -> None:
                state = (
                    f'{numbers["iterations"]} training iterations, {numbers["compared"]:,} rows compared, '
                    f'{numbers["different"]:,} explained, {numbers["failures"]:,} not'
                )
                bars.update(task, completed=min(numbers['steps'], request.env_steps), state=state)

            if not console.is_terminal:
                show_line(f'mode {mode}: training for {request.env_steps:,} environment steps')
            runs.append(_run_mode(dataclasses.replace(request, mode=mode), show_progress))
            bars.update(task, completed=request.env_steps)
    return runs


def _run_mode(request: Request, show_progress: Callable[[dict[str, int]], None]) -> ModeRun:
    """Run one mode in a process of its own.

    Raises:
        ValidationFailed: it ended without a result.
    """
    log = Path(request.folder) / f'{request.mode}.log'
    try:
        run = answer_of('lzero_kv.cli.validation_run', dataclasses.asdict(request), log, show_progress)
    except ChildFailed as error:
        raise ValidationFailed(f'mode {request.mode}: {error}') from error
    return ModeRun.from_dict(run)


def versions() -> dict[str, str]:
    """Versions of what a difference may depend on."""
    found = {name: installed_version(name) or 'not installed' for name in TOLD}
    found['lzero_kv'] = installed_version('lzero_kv') or 'a checkout, not installed'
    return {**found, 'Python': platform.python_version(), 'machine': platform.platform()}


def write(report: ValidationReport, out: Path) -> None:
    """Write the page, its picture and the numbers.

    Raises:
        ValidationFailed: one of them cannot be written.
    """
    # Imported here so that a broken plotting library does not take the other commands with it.
    from lzero_kv.validation.page import plot_validation, validation_page

    try:
        (out / PAGE).write_text(validation_page(report, PICTURE), encoding='utf-8')
        (out / NUMBERS).write_text(report.as_json() + '\n', encoding='utf-8')
    except OSError as error:
        raise ValidationFailed(
            f'cannot write into {out}: {error.strerror}; choose another with --out'
        ) from error
    plot_validation(report, out / PICTURE)


def show(report: ValidationReport, out: Path) -> None:
    """Print the tables, the verdict and where the page is."""
    for run in report.runs:
        title = (
            f'Mode {run.mode}: {run.collected:,} environment steps collected, {run.evaluated:,} evaluated, '
            f'{run.iterations:,} training iterations, {run.simulations} simulations'
        )
        show_table(validation_table(columns_of(run.counters), title))
        for note in run.notes:
            show_line(f'note: {note}')
    for run in report.runs:
        for failure in run.failures:
            show_line(f'mode {run.mode}: {failure.sentence}')
            show_line(f'  lzero-kv explain {failure.file}')
    show_line(report.verdict)
    show_line(f'report: {out / PAGE}')
