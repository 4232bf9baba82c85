"""Means, relative scores and paired differences over documents or seeds, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A number over documents and its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap over documents (Efron, 1979). The same seed draws the same documents for every
    method."""

    resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def mean(self, values: Values) -> Estimate:
        """Mean over documents.

        Args:
            values: one for each document.

        Raises:
            ValueError: there is no value, or one is not finite.
        """
        return self._estimate(lambda rows: rows[..., 0].mean(-1), values)

    def relative_score(self, scores: Values, full: Values) -> Estimate:
        """``100 x score / full``, the quotient of the means over the same documents.

        Resamples in which the control scores 0 are left out.

        Args:
            scores: of the method, one for each document.
            full: of the full cache, on the same documents in the same order.

        Raises:
            ValueError: the numbers of values differ, one is not finite, or the control scores 0.
        """
        if len(full) and not np.sum(full):
            raise ValueError('the full cache scores 0 on these documents: there is nothing to compare with')
        return self._estimate(_quotient, scores, full)

    def difference(self, first: Values, second: Values) -> Estimate:
        """Mean of ``first - second``, document by document.

        Raises:
            ValueError: the numbers of values differ, or one is not finite.
        """
        return self._estimate(lambda rows: (rows[..., 0] - rows[..., 1]).mean(-1), first, second)

    def _estimate(self, statistic: Callable[[np.ndarray], np.ndarray], *columns: Values) -> Estimate:
        rows = _as_rows(columns)
        random = np.random.default_rng(self.seed)
        drawn = rows[random.integers(len(rows), size=(self.resamples, len(rows)))]
        tail = (1 - self.level) / 2
        low, high = np.nanquantile(statistic(drawn), (tail, 1 - tail))
        return Estimate(float(statistic(rows)), float(low), float(high))


def _quotient(rows: np.ndarray) -> np.ndarray:
    scores, full = rows[..., 0].mean(-1), rows[..., 1].mean(-1)
    return 100 * scores / np.where(full > 0, full, np.nan)


def _as_rows(columns: Sequence[Values]) -> np.ndarray:
    """``[documents, columns]``."""
    sizes = [len(column) for column in columns]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ValueError(f'expected one value for each document, at least one, got {sizes} values')
    rows = np.stack([np.asarray(column, dtype=float) for column in columns], axis=-1)
    if not np.isfinite(rows).all():
        raise ValueError(f'expected finite values, got {rows[~np.isfinite(rows)].tolist()}')
    return rows
