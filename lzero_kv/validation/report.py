"""What a bounded training with validation came to, and what it says."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .tally import Tally, ValidationTally


@dataclass(frozen=True)
class Failure:
    """One finding that was saved: ``sentence`` is its first line."""

    file: str
    sentence: str


@dataclass(frozen=True)
class ModeRun:
    """One training in one mode of validation.

    Attributes:
        mode: ``'store'`` or ``'model'``.
        tally: what was counted.
        collected, evaluated: environment steps of collection and of evaluation.
        iterations: training iterations.
        simulations: simulations of a search.
        seconds: wall time, without the start of the process.
        failures: what was saved.
        notes: what was changed in the config, or came otherwise than asked for.
    """

    mode: str
    tally: ValidationTally
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

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; :meth:`from_dict` reads it back."""
        plain = dataclasses.asdict(dataclasses.replace(self, tally=ValidationTally()))
        return {**plain, 'tally': self.tally.as_dict()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ModeRun:
        """What :meth:`as_dict` gave."""
        return cls(
            **{
                **plain,
                'tally': ValidationTally.from_dict(plain['tally']),
                'failures': tuple(Failure(**failure) for failure in plain['failures']),
                'notes': tuple(plain['notes']),
            }
        )


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
    def total(self) -> Tally:
        """All modes and kinds together."""
        return sum((run.tally.total for run in self.runs), Tally())

    @property
    def passed(self) -> bool:
        """Whether nothing is unexplained and the manager was never off."""
        return self.total.failures == 0

    @property
    def verdict(self) -> str:
        """One sentence, for people."""
        total = self.total
        if self.passed:
            off = (
                f'in {total.different:,} the old system was off, each time for a proven cause'
                if total.different
                else 'the old system was never off'
            )
            return (
                f'Passed: of {total.compared:,} rows compared {total.equal:,} are equal and {off}; '
                f'0 are unexplained, and the manager was never off (its largest rounding error is '
                f'{total.largest_manager:.2g}).'
            )
        return (
            f'NOT passed: of {total.compared:,} rows compared {total.unexplained:,} differ without a proven '
            f'cause, and in {total.manager_off:,} the manager was off.'
        )

    def as_json(self) -> str:
        """One JSON document; a difference without a number (another shape, nothing there) is a string."""
        plain = dataclasses.asdict(dataclasses.replace(self, runs=()))
        plain |= {
            'passed': self.passed,
            'verdict': self.verdict,
            'runs': [run.as_dict() for run in self.runs],
        }
        return json.dumps(_finite(plain), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ValidationReport:
        """What :meth:`as_json` wrote."""
        plain = json.loads(text)
        return cls(
            config=plain['config'],
            arguments=tuple(plain['arguments']),
            command=plain['command'],
            versions=plain['versions'],
            runs=tuple(ModeRun.from_dict(run) for run in plain['runs']),
        )


def _finite(tree: Any) -> Any:
    """``tree`` with numbers that JSON does not have as strings, which ``float`` reads."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    return tree
