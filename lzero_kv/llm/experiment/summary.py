"""Means over documents with bootstrap intervals, computed from the rows of a sweep alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lzero_kv.llm.experiment.methods import FULL
from lzero_kv.sweep.intervals import Estimate, mean, quotient
from lzero_kv.sweep.rows import Row


@dataclass(frozen=True)
class Memory:
    """What the caches of a method held, means over documents."""

    bytes: float
    """Behind the prompt, with what is remembered of the attention."""
    part: float
    """The same as a part of the full cache's keys and values."""
    peak_part: float
    """Most keys and values held at once, as a part of the full cache's."""
    shares: np.ndarray
    """``[layers]``: tokens that each layer holds, as a part of the document's."""
    kept: np.ndarray
    """``[layers, bins]``: part of the tokens that stays, from the oldest to the newest."""


@dataclass(frozen=True)
class Summary:
    """One method on the documents of one task; None for what the task does not measure."""

    task: str
    method: str
    algorithm: str
    ratio: float
    allocation: str | None
    documents: int
    chance: float
    """Score of a guess."""
    score: Estimate | None
    """Of the task, 1 for all right."""
    relative: Estimate | None
    """100 x score / the full cache's score on the same documents."""
    kl: Estimate | None
    """KL divergence of the method's next-token distribution from the full cache's, nats per token."""
    kls: tuple[float, ...]
    """Of each document, in the same order for every method; empty where it is not measured."""
    scores: tuple[float, ...]
    """Likewise."""
    perplexity: Estimate | None
    """Geometric mean over documents."""
    agreement: Estimate | None
    """Part of the next tokens that are the full cache's."""
    memory: Memory | None
    first_token: Estimate | None
    """Seconds to the first token."""
    next_token: Estimate | None
    """Seconds for each further token."""

    @property
    def line(self) -> str:
        """The name of the method without its ratio: the same method at every ratio."""
        return self.method.removesuffix(f' {self.ratio:g}')


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """One for each task and method; tasks and methods in the order of the rows, the full cache first.

    Raises:
        ValueError: a document has no row of the full cache, or a number is not finite.
    """
    found = []
    for task in dict.fromkeys(row['task'] for row in rows):
        of_task = [row for row in rows if row['task'] == task]
        control = {row['document']: row for row in of_task if row['algorithm'] == FULL}
        if missing := sorted({row['document'] for row in of_task} - control.keys()):
            raise ValueError(f'task {task} has no rows of the full cache for {missing}, the control of all')
        methods = sorted(
            dict.fromkeys(row['method'] for row in of_task), key=lambda name: name != control_name(of_task)
        )
        for method in methods:
            of_method = [row for row in of_task if row['method'] == method]
            found.append(_summary(of_method, [control[row['document']] for row in of_method]))
    return found


def control_name(rows: Sequence[Row]) -> str:
    """The name of the full cache among the methods."""
    return next(row['method'] for row in rows if row['algorithm'] == FULL)


def _summary(rows: Sequence[Row], control: Sequence[Row]) -> Summary:
    memory = _memory(rows) if all('bytes' in row for row in rows) else None
    scores, controls, kls = _values(rows, 'score'), _values(control, 'score'), _values(rows, 'kl')
    return Summary(
        **{name: rows[0][name] for name in ('task', 'method', 'algorithm', 'allocation')},
        ratio=rows[0]['ratio'] or (memory and round(float(memory.shares.mean()), 3)) or 0.0,
        documents=len(rows),
        chance=float(np.mean([row.get('chance', 0) for row in rows])),
        score=_mean(scores),
        relative=_relative(scores, controls),
        kl=_mean(kls),
        kls=tuple(kls),
        scores=tuple(scores),
        perplexity=_geometric_mean(_values(rows, 'perplexity')),
        agreement=_mean(_values(rows, 'agreement')),
        memory=memory,
        first_token=_mean(_values(rows, 'first_token')),
        next_token=_mean(_values(rows, 'next_token')),
    )


def _memory(rows: Sequence[Row]) -> Memory:
    # a stock cache remembers nothing of the attention; the control is measured in one that could
    name = 'full_bytes' if rows[0]['algorithm'] == FULL else 'bytes'
    return Memory(
        bytes=float(np.mean([row[name] for row in rows])),
        part=float(np.mean([row[name] / row['full_bytes'] for row in rows])),
        peak_part=float(np.mean([row['peak_bytes'] / row['full_bytes'] for row in rows])),
        shares=np.mean([np.divide(row['slots'], row['tokens']) for row in rows], axis=0),
        kept=np.mean([row['kept'] for row in rows], axis=0),
    )


def _values(rows: Sequence[Row], name: str) -> list[float]:
    """A number of each document; empty where a document has none.

    Raises:
        ValueError: a number is not finite.
    """
    values = [row[name] for row in rows if row.get(name) is not None]
    if len(values) < len(rows):
        return []
    if not np.isfinite(values).all():
        place = rows[int(np.argmin(np.isfinite(values)))]
        raise ValueError(
            f'{name} of {place["method"]} on {place["task"]} {place["document"]} is not finite: the model '
            f'overflowed; write another dtype, such as bfloat16 in the place of float16'
        )
    return values


def _mean(values: Sequence[float]) -> Estimate | None:
    return mean(values) if values else None


def _relative(scores: Sequence[float], controls: Sequence[float]) -> Estimate | None:
    if not (scores and sum(controls)):
        return None
    return quotient(scores, controls).map(lambda part: 100 * part)


def _geometric_mean(values: Sequence[float]) -> Estimate | None:
    return mean(np.log(values)).map(math.exp) if values else None


def by_task(found: Iterable[Summary]) -> dict[str, list[Summary]]:
    """Summaries of each task, in order."""
    tasks: dict[str, list[Summary]] = {}
    for one in found:
        tasks.setdefault(one.task, []).append(one)
    return tasks


def by_ratio(found: Iterable[Summary]) -> dict[float, list[Summary]]:
    """Summaries of each ratio without the full cache, in order."""
    groups: dict[float, list[Summary]] = {}
    for one in found:
        if one.algorithm != FULL:
            groups.setdefault(one.ratio, []).append(one)
    return groups


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats in both numbers, the smaller the better, in order."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front
