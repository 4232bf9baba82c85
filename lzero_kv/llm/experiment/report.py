"""The report of a sweep: tables for the terminal, a page of Markdown with pictures, TensorBoard scalars."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lzero_kv.llm.experiment.scoring import SPEED
from lzero_kv.llm.experiment.summary import Summary, by_ratio, by_task, summaries
from lzero_kv.sweep.intervals import Estimate, difference
from lzero_kv.sweep.rows import read_rows
from lzero_kv.telemetry.table import format_bytes, markdown_table

PAGE = 'report.md'
SCALARS = 'tensorboard'


def _percent(value: float) -> str:
    return f'{value:.1f} %'


def _interval(number: Estimate, show: Callable[[float], str]) -> str:
    return f'{show(number.value)} [{show(number.low)}, {show(number.high)}]'


def _kl(value: float) -> str:
    return f'{value:.4f}' if abs(value) >= 0.001 or not value else f'{value:.1e}'


LEGEND = """\
Each line is one method on the same documents. `KL` is the divergence of its next-token distribution from the
full cache's, in nats per token; `score` is the task's, 1 for all right, and `% of full` the same divided by
the full cache's. `bytes`, with what is remembered of the attention, and `peak`, the most keys and values at
once while the prompt is read, are parts of the full cache. In brackets: 95 % bootstrap intervals over
documents. In the pictures, points of one ratio are drawn side by side."""
Cell = Callable[[Summary], str | None]
COLUMNS: dict[str, Cell] = {
    'method': lambda one: one.method,
    'score': lambda one: one.score and f'{one.score.value:.3f}',
    '% of full': lambda one: one.relative and _interval(one.relative, lambda value: f'{value:.0f}'),
    'KL': lambda one: one.kl and _interval(one.kl, _kl),
    'perplexity': lambda one: one.perplexity and f'{one.perplexity.value:.2f}',
    'agreement': lambda one: one.agreement and _percent(100 * one.agreement.value),
    'bytes': lambda one: one.memory and _percent(100 * one.memory.part),
    'peak': lambda one: one.memory and _percent(100 * one.memory.peak_part),
    'first token': lambda one: one.first_token and f'{one.first_token.value:.2f} s',
    'next token': lambda one: one.next_token and f'{1000 * one.next_token.value:.1f} ms',
}
"""What a table shows of a method; a column that no method of the task fills is left out."""


def cells(found: Sequence[Summary]) -> dict[str, list[str]]:
    """The columns of a task's table that hold anything, a text for each method."""
    columns = {head: [cell(one) for one in found] for head, cell in COLUMNS.items()}
    return {head: [text or '-' for text in texts] for head, texts in columns.items() if any(texts)}


def tables(found: Iterable[Summary]) -> list[Table]:
    """A table for each task, a line for each method, the full cache first."""
    return [_table(task, some) for task, some in by_task(found).items()]


def _table(task: str, found: Sequence[Summary]) -> Table:
    table = Table(title=title_of(task, found), title_justify='left', box=box.SIMPLE_HEAD, padding=(0, 1))
    columns = cells(found)
    for head in columns:
        table.add_column(head, justify='left' if head == 'method' else 'right')
    following = [*found[1:], None]
    for one, after, line in zip(found, following, zip(*columns.values(), strict=True), strict=True):
        table.add_row(*line, end_section=after is not None and after.ratio != one.ratio)
    return table


def title_of(task: str, found: Sequence[Summary]) -> str:
    """A task's heading: its documents, and the bytes of which the others are parts."""
    memory = found[0].memory
    return f'{task}: {found[0].documents} documents' + (
        f', full cache {format_bytes(memory.bytes)}' if memory else ''
    )


def page(
    header: Mapping[str, Any], found: Sequence[Summary], pictures: Mapping[str, str], folder: str
) -> str:
    """The report as Markdown.

    Arguments:
        header: of the sweep.
        found: what was measured.
        pictures: file of each picture, relative to the page, and what it shows.
        folder: of the sweep, for the command that makes the page again.
    """
    parts = [
        f'# Layer budgets of {header["model"]}',
        *best_sentences(found),
        LEGEND,
    ]
    for task, some in by_task(found).items():
        parts += [f'## {title_of(task, some)}', _markdown(cells(some))]
    parts += [f'## {text}\n\n![{text}]({file})' for file, text in pictures.items()]
    parts += ['## What ran', _markdown(_settings(header)), f'```bash\nlzero-kv llm report {folder}\n```']
    return '\n\n'.join(parts) + '\n'


def _markdown(columns: Mapping[str, Sequence[str]]) -> str:
    return markdown_table([tuple(columns), *zip(*columns.values(), strict=True)])


def best_sentences(found: Iterable[Summary]) -> list[str]:
    """For each task the lowest KL and the best score of each ratio, and whether the full cache can do it."""
    sentences = []
    for task, some in by_task(found).items():
        lines = [
            f'- ratio {ratio:g}: {text}' for ratio, group in by_ratio(some).items() if (text := _best(group))
        ]
        control = _control(some[0])
        sentences += ['\n'.join([f'**{task}**{control}', *lines])] if control or lines else []
    return sentences


def _control(full: Summary) -> str:
    """The score of the full cache beside a guess, in words where it is no better."""
    if full.score is None:
        return ''
    said = f', full cache {full.score.value:.2f}, a guess {full.chance:.2f}'
    if full.score.value > full.chance:
        return said
    return f'{said}: the scores say nothing, the model cannot do this task'


def _best(group: Sequence[Summary]) -> str:
    texts = []
    if measured := [(one.kl, one) for one in group if one.kl]:
        kl, best = min(measured, key=lambda pair: pair[0].value)
        losses = {one.method: one.kls for _, one in measured}
        texts.append(f'lowest KL {_interval(kl, _kl)} with {best.method}{_as_good(best.method, losses)}')
    if scored := [(one.relative, one) for one in group if one.relative and any(one.scores)]:
        score, best = max(scored, key=lambda pair: pair[0].value)
        losses = {one.method: tuple(-value for value in one.scores) for _, one in scored}
        as_good = _as_good(best.method, losses)
        texts.append(f'best score {score.value:.0f} % of full with {best.method}{as_good}')
    return '; '.join(texts)


def _as_good(best: str, losses: Mapping[str, Sequence[float]]) -> str:
    """The methods whose difference from the best one, document by document, may be 0."""
    names = [name for name, own in losses.items() if name != best and difference(own, losses[best]).low <= 0]
    return f' (not told apart from {", ".join(names)})' if names else ''


def _settings(header: Mapping[str, Any]) -> dict[str, list[str]]:
    flat = {**{name: value for name, value in header.items() if name not in ('methods', 'versions')}}
    flat |= header['versions']
    shown = {name: _short(value) for name, value in flat.items() if value not in (None, [], {})}
    return {'setting': list(shown), 'value': list(shown.values())}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ', '.join(map(_short, value))
    if isinstance(value, dict):
        return ', '.join(f'{name} {_short(item)}' for name, item in value.items())
    return f'{value:g}' if isinstance(value, float) else str(value)


def write_report(folder: Path) -> tuple[Path, list[Summary]]:
    """Write the page, its pictures and the TensorBoard log of a sweep into its folder.

    Returns:
        The page, and what it shows.

    Raises:
        ValueError: there are no rows.
    """
    # Imported here so that a broken plotting library does not take the sweep with it.
    from lzero_kv.llm.experiment.pictures import draw_all

    header, rows = read_rows(folder)
    if not rows:
        raise ValueError(f'{folder} holds no finished document yet; run the sweep first')
    found = in_order(summaries(rows), header.get('tasks', []))
    pictures = draw_all(found, folder)
    path = folder / PAGE
    path.write_text(page(header, found, pictures, str(folder)), encoding='utf-8')
    write_scalars(found, folder / SCALARS)
    return path, found


def in_order(found: Sequence[Summary], tasks: Sequence[str]) -> list[Summary]:
    """Summaries in the order of the tasks that were asked for, not in that in which documents were done."""
    places = {task: place for place, task in enumerate(tasks)}
    ends = {SPEED: len(places) + 1}
    return sorted(found, key=lambda one: (places | ends).get(one.task.partition('/')[0], len(places)))


def write_scalars(found: Sequence[Summary], folder: Path) -> None:
    """TensorBoard scalars in the place of those of an earlier report: a run for each method over all ratios,
    the full cache among them, a chart for each task and metric; the step is the ratio in thousandths."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for line in dict.fromkeys(one.line for one in found):
        with SummaryWriter(str(folder / line.replace('/', '_'))) as writer:
            for one in sorted((one for one in found if one.line == line), key=lambda one: one.ratio):
                for name, value in numbers(one).items():
                    writer.add_scalar(f'{one.task}/{name}', value, round(1000 * one.ratio))


def numbers(one: Summary) -> dict[str, float]:
    """The means of a summary, and the parts of the full cache, by name."""
    means = {
        name: number.value
        for name in ('score', 'relative', 'kl', 'perplexity', 'agreement', 'first_token', 'next_token')
        if (number := getattr(one, name)) is not None
    }
    held = one.memory
    return (
        means if held is None else {**means, 'bytes': held.bytes, 'part': held.part, 'peak': held.peak_part}
    )
