"""The verdict on one compared row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lzero_kv.lightzero.validation.diagnosis import diagnose
from lzero_kv.lightzero.validation.failures import Failures
from lzero_kv.lightzero.validation.lineup import Lineup
from lzero_kv.lightzero.validation.movement import movement
from lzero_kv.lightzero.validation.opinion import Compared, Opinion
from lzero_kv.lightzero.validation.recompute import Answer
from lzero_kv.validation.causes import Fault
from lzero_kv.validation.deviation import MISMATCH, Deviation, Tolerance
from lzero_kv.validation.finding import Finding
from lzero_kv.validation.tally import Tally


class Judge:
    """Holds the manager and the old system against the truth, row by row, and counts.

    Args:
        tolerance: of comparisons in which exactness is not due.
        lineup: what a manager that is off may have served.
        failures: told of rows that must not be.
    """

    def __init__(self, tolerance: Tolerance, lineup: Lineup, failures: Failures) -> None:
        self._tolerance = tolerance
        self._lineup = lineup
        self._failures = failures

    def of(self, row: Compared, tally: Tally, nodes: Sequence[Sequence[Answer]]) -> None:
        """Give ``row`` its verdict in ``tally``; ``nodes`` are the true nodes of its search so far.

        Raises:
            ValidationError: see :class:`Failures`.
        """
        truth = row.truth.served, row.truth.answers
        part, manager = self._worst((row.kv, row.answers), truth)
        if manager.largest < float('inf'):
            tally.largest_manager = max(tally.largest_manager, manager.largest)
        if row.lost or not manager.within:
            fault = Fault.ENTRY_LOST if row.lost else diagnose(self._lineup.of(row, nodes), self._tolerance)
            tally.count_manager_off(fault)
            self._failures.report(self._finding(row, part, manager, fault), row)
            return
        if row.host is None:
            return
        given = row.host.kv, row.host.answers
        host, between = self._worst(given, truth)[1], self._worst(given, (row.kv, row.answers))[1]
        if row.host.exact:
            same = row.kv is not None and row.host.kv is not None and torch.equal(row.kv, row.host.kv)
        else:
            same = host.within or between.within
        if same:
            tally.count_equal()
            return
        causes = row.host.explain()
        if not causes or host.within:
            tally.count_unexplained()
            self._failures.report(self._finding(row, part, manager, None), row)
            return
        tally.count_different(causes)
        tally.largest_host = max(tally.largest_host, self._farthest(given, truth))
        for name, moved in movement(row.host.moved(), row.truth.answers, self._failures.world_model).items():
            getattr(tally, name).add(moved)

    def _farthest(self, given: Opinion, other: Opinion) -> float:
        """Largest difference of what two opinions can be compared in."""
        found = [self._tolerance.deviation(given[0], other[0])]
        found += [self._tolerance.deviation(logits, other[1][name]) for name, logits in given[1].items()]
        return max((part.largest for part in found if part.largest < float('inf')), default=0.0)

    def _worst(self, given: Opinion, other: Opinion) -> tuple[str, Deviation]:
        """What of one opinion is farthest from another, and how far; answers that one lacks are left out."""
        kv = self._tolerance.deviation(given[0], other[0], kv=True)
        if not kv.within:
            return 'keys and values', kv  # what is answered follows from them
        parts = {'keys and values': kv}
        for name, logits in given[1].items():
            parts[name] = self._tolerance.deviation(logits, other[1][name])
        name = max(parts, key=lambda part: parts[part].excess)
        return name, parts[name]

    def _finding(self, row: Compared, part: str, manager: Deviation, fault: Fault | None) -> Finding:
        host = row.host
        tensors: dict[str, Any] = {
            'manager': {'kv': row.kv, **row.answers},
            'truth': {'kv': row.truth.served, **row.truth.answers},
            'host': {} if host is None else {'kv': host.kv, **host.answers},
        }
        off = between = MISMATCH
        if host is not None:
            given = host.kv, host.answers
            off = self._worst(given, (row.truth.served, row.truth.answers))[1]
            where, between = self._worst(given, (row.kv, row.answers))
            part = part if fault is not None else where
        return Finding(
            row.kind,
            row.name.env_id,
            row.row,
            row.node,
            part,
            manager,
            None if host is None or (host.kv is None and not host.answers) else off,
            between,
            row.manager_key,
            'none' if host is None else host.key,
            fault,
            () if host is None else tuple(host.explain() or ()),
            tensors,
        )
