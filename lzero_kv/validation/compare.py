"""Verdict on one compared row."""

from __future__ import annotations

from typing import Any

import torch
from lzero.policy.scaling_transform import InverseScalarTransform

from lzero_kv.telemetry.counters import Counters, Fault
from lzero_kv.validation.faults import FaultFinder, Nodes
from lzero_kv.validation.findings import Finding, FindingLog
from lzero_kv.validation.histories import ComparedRow, Logits
from lzero_kv.validation.tolerance import MISMATCH, Deviation, Tolerance

Given = tuple[torch.Tensor | None, Logits]
"""Keys and values that were served, ``[2 * layers, T, embed]``, and answers by name."""


class Comparison:
    """Comparison of the cache and the stock cache with the truth, row by row, counted.

    Args:
        tolerance: of comparisons in which exactness is not due.
        faults: recognises what a wrong cache served.
        log: takes the rows that must not be.
        alone: whether there is no stock cache, and a right row is counted by itself.
    """

    def __init__(
        self, tolerance: Tolerance, faults: FaultFinder, log: FindingLog, alone: bool = False
    ) -> None:
        self._alone = alone
        self._tolerance = tolerance
        self._faults = faults
        self._log = log

    def compare_row(self, row: ComparedRow, counters: Counters, nodes: Nodes) -> None:
        """Count the verdict on ``row``; ``nodes`` are the true nodes of its search so far.

        Raises:
            ValidationError: see :class:`FindingLog`.
        """
        served, truth = (row.kv, row.answers), (row.truth.served, row.truth.answers)
        part, cache = self._worst(served, truth)
        if cache.largest < float('inf'):
            counters.largest_cache = max(counters.largest_cache, cache.largest)
        if row.lost or not cache.within:
            fault = self._faults.diagnose(row, nodes)
            counters.count_cache_wrong(fault)
            self._log.report(self._finding(row, part, cache, fault), row.course)
            return
        if row.stock is None:
            if self._alone:
                counters.count_equal()
            return
        given = row.stock.kv, row.stock.answers
        stock, between = self._worst(given, truth)[1], self._worst(given, served)[1]
        if row.stock.exact:
            same = row.kv is not None and row.stock.kv is not None and torch.equal(row.kv, row.stock.kv)
        else:
            same = stock.within or between.within
        if same:
            counters.count_equal()
            return
        causes = row.stock.explain()
        if not causes or stock.within:
            counters.count_unexplained()
            self._log.report(self._finding(row, part, cache, None), row.course)
            return
        counters.count_different(causes)
        counters.largest_stock = max(counters.largest_stock, self._farthest(given, truth))
        for name, moved in movement(row.stock.moved(), row.truth.answers, self._log.world_model).items():
            getattr(counters, name).add(moved)

    def _farthest(self, given: Given, other: Given) -> float:
        """Largest finite difference of two answers."""
        found = [self._tolerance.deviation(given[0], other[0])]
        found += [self._tolerance.deviation(logits, other[1][name]) for name, logits in given[1].items()]
        return max((part.largest for part in found if part.largest < float('inf')), default=0.0)

    def _worst(self, given: Given, other: Given) -> tuple[str, Deviation]:
        """The part that differs most, and its distance; answers that one side lacks are left out."""
        kv = self._tolerance.deviation(given[0], other[0], kv=True)
        if not kv.within:
            return 'keys and values', kv  # the answers follow from them
        parts = {'keys and values': kv}
        for name, logits in given[1].items():
            parts[name] = self._tolerance.deviation(logits, other[1][name])
        name = max(parts, key=lambda part: parts[part].excess)
        return name, parts[name]

    def _finding(self, row: ComparedRow, part: str, cache: Deviation, fault: Fault | None) -> Finding:
        stock, truth = row.stock, (row.truth.served, row.truth.answers)
        distance, between, answers = None, MISMATCH, {}
        if stock is not None:
            given = stock.kv, stock.answers
            answers = {'kv': stock.kv, **stock.answers}
            where, between = self._worst(given, (row.kv, row.answers))
            part = part if fault is not None else where
            if stock.kv is not None or stock.answers:
                distance = self._worst(given, truth)[1]
        return Finding(
            kind=row.kind,
            env_id=row.name.env_id,
            row=row.row,
            node=row.node,
            part=part,
            cache=cache,
            stock=distance,
            between=between,
            cache_key=row.key,
            stock_key='none' if stock is None else stock.key,
            fault=fault,
            causes=() if stock is None else tuple(stock.explain() or ()),
            tensors={
                'cache': {'kv': row.kv, **row.answers},
                'truth': {'kv': truth[0], **truth[1]},
                'stock': answers,
            },
        )


def movement(moved: Logits, true: Logits, world_model: Any) -> dict[str, float]:
    """Distances between two answers, of what both have.

    Returns:
        ``policy``: total variation distance of discrete policies, in [0, 1]; left out where actions are
        continuous. ``value``: absolute difference in units of return.
    """
    distances = {}
    if 'policy' in moved and not world_model.continuous_action_space:
        one, other = (logits.double().softmax(-1) for logits in (moved['policy'], true['policy']))
        distances['policy'] = float((one - other).abs().sum() / 2)
    if 'value' in moved:
        scalar = InverseScalarTransform((world_model.support_size - 1) // 2, moved['value'].device)
        one, other = (scalar(logits.clone()[None]) for logits in (moved['value'], true['value']))
        distances['value'] = float((one - other).abs())
    return distances
