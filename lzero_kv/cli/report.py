"""`lzero-kv report`: the cache's part of a TensorBoard log as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from lzero_kv.cli.console import show_line, show_table
from lzero_kv.telemetry.read import RunLog, find_runs, read_run, runs_in
from lzero_kv.telemetry.table import budget_table, speed_table, statistics_table, validation_table

PLOT_NAME = 'kv_cache.png'
NOT_ENGAGED = (
    'the log has no chart of the KV cache, so its first collection is not done yet or the plugin is not on. '
    'A config needs both '
    'world_model_cfg=dict(..., use_new_cache_manager=True) and '
    "create_config.policy.import_names=[..., 'lzero_kv.plugin'], and must not switch off "
    'kv_cache.enable_stats or kv_cache.tensorboard. Check it with: lzero-kv doctor CONFIG.py'
)


def report(
    logdir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='LOGDIR')],
    out: Annotated[Path | None, tyro.conf.arg(metavar='PNG')] = None,
) -> int:
    """Print the statistics of a training's KV cache and write them as a plot.

    The first table has times and rates. The next adds the counters up over the whole run (entries, occupancy
    and bytes are those of the end), and one shows the last point alone; where validation was on, a table says
    what it found, and where there are layer budgets, what each layer holds and lost. The plot shows the same
    over environment steps; panels that never moved are left out and named. With several runs below LOGDIR
    every one is reported, each plot in its own experiment folder. A training that was resumed in its folder
    is one run more, with a plot of its own: both may have made the same steps, and nothing is added up.

    Args:
        logdir: the experiment folder (exp_name) of LightZero, its log or log/serial, a folder of many, or one
            event file.
        out: where to write the plot; LOGDIR/kv_cache.png if it is not given.

    Returns:
        0, or 1 when there is nothing to report; the reason goes to standard error.
    """
    runs, silent = _engaged_runs(logdir)
    if not runs:
        raise ValueError(f'{logdir}: {NOT_ENGAGED}')
    if out is not None and len(runs) > 1:
        folders = ', '.join(str(run.folder if run.file is None else run.file) for run in runs)
        raise ValueError(f'--out is for one run, but {logdir} holds {len(runs)}: {folders}. Give one of them')
    for run in runs:
        beside = [other for other in runs if other.folder == run.folder]
        path = _plot_path(run, logdir, out, alone=len(beside) == len(runs))
        if len(beside) > 1:
            assert run.file is not None  # runs of one folder are told apart by it
            number = beside.index(run) + 1
            path = path.with_stem(f'{path.stem}_{number}')
            show_line(f'run {number} of {len(beside)} in its folder, told apart by file: {run.file.name}')
        _show(run, path)
    for folder in silent:
        show_line(f'{folder}: no chart of the KV cache, left out')
    return 0


def _engaged_runs(logdir: Path) -> tuple[list[RunLog], list[Path]]:
    """Return the runs below `logdir` that have charts of the cache, and the folders that have others only."""
    if logdir.is_file():
        logs = [read_run(logdir)]
    else:
        logs = [log for folder in find_runs(logdir) for log in runs_in(folder)]
    return [log for log in logs if log.pools], [log.folder for log in logs if not log.pools]


def _plot_path(run: RunLog, logdir: Path, out: Path | None, *, alone: bool) -> Path:
    if out is not None:
        return out
    if alone:
        return (logdir.parent if logdir.is_file() else logdir) / PLOT_NAME
    in_experiment = run.folder.parts[-2:] == ('log', 'serial')
    return (run.folder.parent.parent if in_experiment else run.folder) / PLOT_NAME


def _show(run: RunLog, path: Path) -> None:
    # Imported here so that a broken plotting library does not take the other commands with it.
    from lzero_kv.telemetry.plot import constant_charts, plot_run

    iterations = f'{run.train_iterations:,} training iterations'
    show_line(f'log: {run.folder}, {run.last_step:,} environment steps, {iterations}')
    if run.ranks > 1:
        show_line(f'{run.ranks} processes: counters, entries and bytes are their sums, occupancy the largest')
    if speed := run.speed():
        show_table(speed_table(speed, run.speed(last=True)))
    show_table(statistics_table(run.totals(), 'Whole run', meanings=True))
    if any(len(series.steps) > 1 for series in run.scalars.values()):
        show_table(statistics_table(run.last(), 'Last point'))
    if validation := run.validation():
        show_table(validation_table({'total': validation}, 'Validation of the whole run'))
    if layers := run.layers():
        show_table(budget_table(layers))
    if constant := constant_charts(run):
        told = (f'{name} ({values})' for name, values in constant.items())
        show_line(f'constant, so not in the plot: {", ".join(told)}')
    show_line(f'plot: {plot_run(run, path)}')
