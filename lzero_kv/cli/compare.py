"""`lzero-kv compare`: one config with the flag off and on, the same seeds in turn: time, memory, returns."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lzero_kv.cli.checks import Mark
from lzero_kv.cli.child import answer_of
from lzero_kv.cli.compare_run import PLUGIN, STOCK, Request
from lzero_kv.cli.console import show_error, show_line, show_table
from lzero_kv.cli.engagement import alone, call_checks
from lzero_kv.cli.training_call import ConfigError, TrainingCall, training_call
from lzero_kv.cli.validate import versions
from lzero_kv.sweep.rows import ROWS, Row
from lzero_kv.sweep.sweep import Sweep

PICTURE = 'compare.png'
METHODS = ('training',)


@dataclass(frozen=True)
class Training:
    """One training of the comparison, a document of the sweep."""

    task: str
    """``STOCK`` or ``PLUGIN``."""
    seed: int
    size: float
    """Environment steps."""

    @property
    def id(self) -> str:
        """Name of the seed."""
        return f'seed {self.seed}'


def compare_with(arguments: Sequence[str]) -> Callable[..., int]:
    """The command, for a config that is itself given `arguments`."""

    def compare(
        config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='CONFIG')],
        env_steps: int = 2000,
        seeds: int = 3,
        out: Annotated[Path, tyro.conf.arg(metavar='DIR')] = Path('data_lz/compare'),
    ) -> int:
        """Train a config with LightZero's own cache and with this one, and compare time, memory and returns.

        CONFIG is a config in LightZero's form, with or without the plugin in it. Its code is executed: give
        only files that you trust. What follows `--` is its own command line:
        lzero-kv compare CONFIG.py --env-steps 500 -- --smoke. Each training is a process of its own; flag off
        and on take turns (off, on, on, off, ...). A training ends as LightZero ends it: after the collection
        and the learning in which --env-steps was reached. Evaluations are left out. Where it was stopped, the
        same command goes on, and --seeds may grow.

        Args:
            config: a config file that LightZero can run.
            env_steps: environment steps that each training collects, at least.
            seeds: number of seeds, from 0 on; each is trained twice.
            out: the folder of the rows (rows.jsonl), the picture (compare.png) and what LightZero writes.

        Returns:
            0, 1 when something is wrong (the reason goes to standard error), 130 when interrupted.
        """
        try:
            call = _checked(config, arguments, env_steps, seeds, out)
            rows = _measure(call, Request(str(config), tuple(arguments), '', 0, env_steps, str(out)), seeds)
        except KeyboardInterrupt:
            show_error('interrupted; the same command goes on where it stopped')
            return 130
        except (OSError, ValueError) as error:
            show_error(str(error))
            return 1
        return _show(rows, seeds, out)

    return compare


def _checked(config: Path, arguments: Sequence[str], env_steps: int, seeds: int, out: Path) -> TrainingCall:
    """The training that the plugin would run.

    Raises:
        ValueError: something cannot be; nothing was trained or written.
    """
    numbers = {'--env-steps': env_steps, '--seeds': seeds}
    if problems := [f'{name}: expected 1 or more, got {n}' for name, n in numbers.items() if n < 1]:
        raise ValueError('; '.join(problems))
    given = training_call(config, arguments)
    call, _ = alone(given, str(config), out / 'training', flag=True)
    if given.options.get('model') is not None:
        raise ConfigError(f'{config} builds its model itself, one for both; leave model out of {call.entry}')
    if call.config['policy'].get('multi_gpu'):
        raise ConfigError(f'{config} has multi_gpu=True; a comparison is of one process: write False')
    if failed := [check for check in call_checks(call) if check.mark is Mark.FAIL]:
        raise ConfigError(f'{config}: ' + '; '.join(' '.join(check.remedy.split()) for check in failed))
    return call


def _measure(call: TrainingCall, request: Request, seeds: int) -> list[Row]:
    settings = json.dumps([call.entry, call.config, call.create_config], default=str, sort_keys=True)
    header = {
        'config': request.config,
        'arguments': request.arguments,
        'env_steps': request.env_steps,
        'settings': hashlib.sha256(settings.encode()).hexdigest()[:16],
        'versions': versions(),
        'methods': METHODS,
    }
    trainings = [
        Training(arm, seed, request.env_steps)
        for seed in range(seeds)
        for arm in ((PLUGIN, STOCK) if seed % 2 else (STOCK, PLUGIN))
    ]
    sweep, console = Sweep(Path(request.folder), header), Console()
    with Progress(
        TextColumn('{task.description:<18}'),
        BarColumn(24),
        TextColumn('{task.fields[state]}'),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        task = bars.add_task('', total=len(trainings) * request.env_steps, state='')

        def train(training: Training) -> list[Row]:
            name = f'{training.task}, {training.id}'
            done = request.env_steps * (len(trainings) - len(sweep.left(trainings)))
            if not console.is_terminal:
                show_line(f'{name}: training for {request.env_steps:,} environment steps')

            def hear(numbers: dict[str, Any]) -> None:
                steps = min(numbers['steps'], request.env_steps)
                state = f'{numbers["steps"]:,} environment steps, {numbers["iterations"]:,} iterations'
                bars.update(task, completed=done + steps, description=name, state=state)

            asked = dataclasses.replace(request, arm=training.task, seed=training.seed)
            log = sweep.folder / f'{training.task}_{training.seed}.log'
            return [answer_of('lzero_kv.cli.compare_run', dataclasses.asdict(asked), log, hear)]

        return sweep.run(trainings, train)


def _show(rows: Sequence[Row], seeds: int, out: Path) -> int:
    # Imported here so that a broken plotting library does not take the other commands with it.
    from lzero_kv.cli.comparison import Comparison

    found = Comparison.of([row for row in rows if row['seed'] < seeds])
    show_table(found.table())
    show_line(found.sentence())
    show_line(f'rows: {out / ROWS}, picture: {found.draw(out / PICTURE)}')
    return 0
