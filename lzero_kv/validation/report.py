"""Results of a bounded training with validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from lzero_kv.telemetry.counters import KINDS, Cause, Counters, ValidationCounters


@dataclass(frozen=True)
class Failure:
    """A saved finding: ``sentence`` is its first line."""

    file: str
    sentence: str


@dataclass(frozen=True)
class ModeRun:
    """One training in one mode of validation.

    Attributes:
        mode: ``'store'`` or ``'model'``.
        counters: what was counted.
        collected, evaluated: environment steps of collection and of evaluation.
        iterations: training iterations.
        simulations: simulations of a search.
        seconds: wall time, without the start of the process.
        failures: what was saved.
        notes: what was changed in the config, or came otherwise than asked for.
    """

    mode: str
    counters: ValidationCounters
    collected: int
    evaluated: int
    iterations: int
    simulations: int
    seconds: float
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Environment steps of collection and evaluation."""
        return self.collected + self.evaluated

    @property
    def missing(self) -> str:
        """What should have been compared and was not, as a sentence; empty where nothing is missing."""
        roots, nodes = self.counters.roots, self.counters.nodes + self.counters.reanalysis
        kinds = [name for name, kind in (('root', roots), ('node', nodes)) if not kind.compared]
        if not kinds:
            return ''
        crashed = self.counters.total.causes[Cause.CRASHED]
        why = (
            f"LightZero's own code crashed in {crashed:,} rows; write an env_num of all environments"
            if crashed
            else 'write a larger --env-steps, or a larger --rate'
        )
        searches = f'{self.counters.searches:,} searches'
        return f'mode {self.mode} compared no {" and no ".join(kinds)} in {searches}: {why}'


MODE_RUN = TypeAdapter(ModeRun)
"""Reads and writes a run as plain numbers and strings, for JSON."""


@dataclass(frozen=True)
class ValidationReport:
    """Trainings of one config, one for each mode.

    Attributes:
        config: the config file.
        arguments: what the config file was given on its command line.
        command: what runs all of it again.
        versions: of the packages that matter, by name.
        runs: one for each mode.
    """

    config: str
    arguments: tuple[str, ...]
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    runs: tuple[ModeRun, ...] = ()

    @property
    def total(self) -> Counters:
        """All modes and kinds together."""
        return sum((run.counters.total for run in self.runs), Counters())

    @property
    def passed(self) -> bool:
        """Whether each mode compared roots and nodes, and none of them is a failure."""
        return self.total.failures == 0 and not self.missing

    @property
    def missing(self) -> str:
        """What was not compared: a sentence for each mode in which something is missing."""
        return '; '.join(run.missing for run in self.runs if run.missing) if self.runs else 'no mode ran'

    @property
    def verdict(self) -> str:
        """One sentence, for people."""
        total, kinds = self.total, self._kinds
        if self.passed:
            wrong = (
                f'in {total.different:,} the stock cache was wrong, each time for a proven cause'
                if total.different
                else 'the stock cache was never wrong'
            )
            return (
                f'Passed: of {total.compared:,} rows compared ({kinds}) {total.equal:,} are equal and '
                f'{wrong}; 0 are unexplained, and the cache was never wrong (its largest rounding error is '
                f'{total.largest_cache:.2g}).'
            )
        if not total.failures:
            return f'NOT passed: {self.missing}.'
        return (
            f'NOT passed: of {total.compared:,} rows compared {total.unexplained:,} differ without a proven '
            f'cause, and in {total.cache_wrong:,} the cache was wrong.'
        )

    @property
    def _kinds(self) -> str:
        counts = {kind: sum(getattr(run.counters, kind).compared for run in self.runs) for kind in KINDS}
        return ', '.join(f'{kind} {count:,}' for kind, count in counts.items() if count)

    def as_json(self) -> str:
        """One JSON document; a difference without a number (another shape, nothing there) is a string."""
        plain = json.loads(_REPORT.dump_json(self))
        return json.dumps({**plain, 'passed': self.passed, 'verdict': self.verdict}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ValidationReport:
        """The report that :meth:`as_json` wrote."""
        return _REPORT.validate_json(text)


_REPORT = TypeAdapter(ValidationReport)
