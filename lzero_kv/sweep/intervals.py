"""Means, quotients and paired differences over documents or seeds, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray

RESAMPLES = 2000
LEVEL = 0.95
"""Of an interval."""


class Estimate(NamedTuple):
    """A number over documents and its interval: percentile bootstrap over documents (Efron, 1979)."""

    value: float
    low: float
    high: float

    def map(self, change: Callable[[float], float]) -> Estimate:
        """The estimate of a growing function of the number."""
        return Estimate(*map(change, self))


def mean(values: Values) -> Estimate:
    """Mean over documents.

    Args:
        values: one for each document.

    Raises:
        ValueError: there is no value, or one is not finite.
    """
    return _estimate(lambda rows: rows[..., 0].mean(-1), values)


def quotient(values: Values, control: Values) -> Estimate:
    """Mean of ``values`` divided by the mean of ``control``.

    Resamples whose control is 0 are left out.

    Args:
        values: one for each document.
        control: of the same documents in the same order.

    Raises:
        ValueError: the numbers of values differ, one is not finite, or the whole control is 0.
    """
    if len(control) and not np.sum(control):
        raise ValueError('the control is 0 on all documents: there is nothing to divide by')
    return _estimate(_quotient, values, control)


def difference(first: Values, second: Values) -> Estimate:
    """Mean of ``first - second``, document by document.

    Raises:
        ValueError: the numbers of values differ, or one is not finite.
    """
    return _estimate(lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1), first, second)


def _estimate(statistic: Callable[[np.ndarray], np.ndarray], *columns: Values) -> Estimate:
    rows = _as_rows(columns)
    random = np.random.default_rng(0)  # the same documents for every method
    drawn = rows[random.integers(len(rows), size=(RESAMPLES, len(rows)))]
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(statistic(drawn), (tail, 1 - tail))
    return Estimate(float(statistic(rows)), float(low), float(high))


def _quotient(rows: np.ndarray) -> np.ndarray:
    values, control = rows[..., 0].mean(-1), rows[..., 1].mean(-1)
    return values / np.where(control, control, np.nan)


def _as_rows(columns: Sequence[Values]) -> np.ndarray:
    """``[documents, columns]``."""
    sizes = [len(column) for column in columns]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ValueError(f'expected one value for each document, at least one, got {sizes} values')
    rows = np.stack([np.asarray(column, dtype=float) for column in columns], axis=-1)
    if not np.isfinite(rows).all():
        raise ValueError(f'expected finite values, got {rows[~np.isfinite(rows)].tolist()}')
    return rows
