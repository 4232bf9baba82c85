"""Means over documents with bootstrap intervals, computed from the rows of a sweep alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lzero_kv.llm.experiment.rows import Row

FULL = 'full'
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Number:
    """A mean over documents and its bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """One method on the documents of one task; None where the task does not measure it."""

    task: str
    method: str
    algorithm: str
    ratio: float
    allocation: str | None
    documents: int
    score: Number | None
    """Of the task, 1 for all right."""
    relative: Number | None
    """100 x score / the full cache's score on the same documents."""
    kl: Number | None
    """KL divergence of the method's next-token distribution from the full cache's, nats per token."""
    perplexity: Number | None
    """Geometric mean over documents."""
    agreement: Number | None
    """Part of the next tokens that are the full cache's."""
    bytes: float
    """Kept, with what is remembered of the attention."""
    part: float
    """Kept bytes as a part of the full cache's."""
    peak_part: float
    """Most bytes held at once, as a part of the full cache's."""
    shares: np.ndarray
    """``[layers]``: tokens that each layer holds, as a part of the document's."""
    kept: np.ndarray
    """``[layers, bins]``: part of the tokens that stays, from the oldest to the newest."""
    first_token: Number | None
    """Seconds to the first token."""
    next_token: Number | None
    """Seconds for each further token."""

    @property
    def line(self) -> str:
        """The name of the method without its ratio: the same method at every ratio."""
        return self.method.removesuffix(f' {self.ratio:g}')


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """One for each task and method; tasks and methods in the order of the rows, the full cache first.

    Raises:
        ValueError: a document has no row of the full cache.
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
    scores, controls = _values(rows, 'score'), _values(control, 'score')
    return Summary(
        **{name: rows[0][name] for name in ('task', 'method', 'algorithm', 'ratio', 'allocation')},
        documents=len(rows),
        score=_number(scores, np.mean),
        relative=_relative(scores, controls),
        kl=_number(_values(rows, 'kl'), np.mean),
        perplexity=_number(_values(rows, 'perplexity'), _geometric_mean),
        agreement=_number(_values(rows, 'agreement'), np.mean),
        bytes=float(np.mean([row['bytes'] for row in rows])),
        part=float(np.mean([row['bytes'] / row['full_bytes'] for row in rows])),
        peak_part=float(np.mean([row['peak_bytes'] / row['full_bytes'] for row in rows])),
        shares=np.mean([np.divide(row['slots'], row['tokens']) for row in rows], axis=0),
        kept=np.mean([row['kept'] for row in rows], axis=0),
        first_token=_number(_values(rows, 'first_token'), np.mean),
        next_token=_number(_values(rows, 'next_token'), np.mean),
    )


def _values(rows: Sequence[Row], name: str) -> np.ndarray | None:
    values = [row.get(name) for row in rows]
    return None if None in values else np.array(values, dtype=float)


def _relative(scores: np.ndarray | None, controls: np.ndarray | None) -> Number | None:
    if scores is None or controls is None or not controls.sum():
        return None
    pairs = np.stack([scores, controls], axis=-1)

    def relative(some: np.ndarray, axis: int) -> Any:
        sums = some.sum(axis)
        return 100 * sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], np.nan)

    return _number(pairs, relative)


def _geometric_mean(values: np.ndarray, axis: int) -> Any:
    return np.exp(np.log(values).mean(axis))


def _number(values: np.ndarray | None, mean: Callable[..., Any]) -> Number | None:
    """A mean over the first axis, and the interval of the same mean over resampled documents."""
    if values is None:
        return None
    random = np.random.default_rng(0)  # the same documents in the same draw for every method
    drawn = values[random.integers(len(values), size=(RESAMPLES, len(values)))]
    low, high = np.nanquantile(mean(drawn, axis=1), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Number(float(mean(values, axis=0)), float(low), float(high))


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
