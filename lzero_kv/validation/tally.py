"""Counts what a validation found."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .causes import Cause, Fault


@dataclass
class Movement:
    """How far a prediction moved, over all differences where it is known."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, amount: float) -> None:
        """Count one."""
        self.count += 1
        self.total += amount
        self.largest = max(self.largest, amount)

    @property
    def mean(self) -> float:
        """Mean movement, 0.0 without any."""
        return self.total / self.count if self.count else 0.0

    def __add__(self, other: Movement) -> Movement:
        return Movement(self.count + other.count, self.total + other.total, max(self.largest, other.largest))

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> Movement:
        """What ``vars`` gave; an infinite number may be a string, as in JSON."""
        return cls(int(numbers['count']), float(numbers['total']), float(numbers['largest']))

    def since(self, earlier: Movement) -> Movement:
        """What was counted after ``earlier``, a snapshot of this one; the largest stays that of all."""
        return Movement(self.count - earlier.count, self.total - earlier.total, self.largest)


@dataclass
class Tally:
    """Rows of inferences that were compared, each with one verdict.

    Attributes:
        compared: all of them: ``equal + different + unexplained + manager_off``.
        equal: both systems gave the same, within the tolerance where exactness is not due.
        different: the old system was off, the manager right, and the cause is proven.
        unexplained: a difference whose cause is not proven.
        manager_off: the manager was off, whatever the old system did.
        causes: differences by cause; one with several causes counts under each.
        faults: ``manager_off`` by fault.
        largest_host: largest difference of the old system from the recomputation.
        largest_manager: the same for the manager: rounding, where it is right.
        policy: total variation distance between the policies (discrete actions), over the differences.
        value: absolute difference between the values, in units of return, over the differences.
    """

    compared: int = 0
    equal: int = 0
    different: int = 0
    unexplained: int = 0
    manager_off: int = 0
    causes: Counter[Cause] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    largest_host: float = 0.0
    largest_manager: float = 0.0
    policy: Movement = field(default_factory=Movement)
    value: Movement = field(default_factory=Movement)

    def count_equal(self) -> None:
        """Both gave the same."""
        self.compared += 1
        self.equal += 1

    def count_different(self, causes: Iterable[Cause]) -> None:
        """The old system was off, for proven causes."""
        self.compared += 1
        self.different += 1
        self.causes.update(causes)

    def count_unexplained(self) -> None:
        """They differ and nothing proves why."""
        self.compared += 1
        self.unexplained += 1

    def count_manager_off(self, fault: Fault) -> None:
        """The manager was off."""
        self.compared += 1
        self.manager_off += 1
        self.faults[fault] += 1

    @property
    def failures(self) -> int:
        """Rows that must not be: unexplained, or the manager off."""
        return self.unexplained + self.manager_off

    def snapshot(self) -> Tally:
        """A copy that later counts do not change."""
        return copy.deepcopy(self)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.compared + other.compared,
            self.equal + other.equal,
            self.different + other.different,
            self.unexplained + other.unexplained,
            self.manager_off + other.manager_off,
            self.causes + other.causes,
            self.faults + other.faults,
            max(self.largest_host, other.largest_host),
            max(self.largest_manager, other.largest_manager),
            self.policy + other.policy,
            self.value + other.value,
        )

    def since(self, earlier: Tally) -> Tally:
        """What was counted after ``earlier``, a snapshot of this one; the largest stay those of all."""
        return Tally(
            self.compared - earlier.compared,
            self.equal - earlier.equal,
            self.different - earlier.different,
            self.unexplained - earlier.unexplained,
            self.manager_off - earlier.manager_off,
            self.causes - earlier.causes,
            self.faults - earlier.faults,
            self.largest_host,
            self.largest_manager,
            self.policy.since(earlier.policy),
            self.value.since(earlier.value),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; :meth:`from_dict` reads it back."""
        return {
            **{name: getattr(self, name) for name in (*_COUNTS, *_LARGEST)},
            'causes': {cause.value: count for cause, count in self.causes.items()},
            'faults': {fault.value: count for fault, count in self.faults.items()},
            'policy': vars(self.policy).copy(),
            'value': vars(self.value).copy(),
        }

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> Tally:
        """What :meth:`as_dict` gave."""
        return cls(
            *(int(numbers[name]) for name in _COUNTS),
            largest_host=float(numbers['largest_host']),
            largest_manager=float(numbers['largest_manager']),
            causes=Counter({Cause(name): count for name, count in numbers['causes'].items()}),
            faults=Counter({Fault(name): count for name, count in numbers['faults'].items()}),
            policy=Movement.from_dict(numbers['policy']),
            value=Movement.from_dict(numbers['value']),
        )


_COUNTS = ('compared', 'equal', 'different', 'unexplained', 'manager_off')
_LARGEST = ('largest_host', 'largest_manager')


@dataclass
class ValidationTally:
    """The tally of one world model, by kind of inference.

    Attributes:
        roots: root inferences.
        nodes: recurrent inferences of searches from those roots.
        reanalysis: recurrent inferences of reanalysis.
        searches: searches begun.
        validated: searches whose nodes were compared.
    """

    roots: Tally = field(default_factory=Tally)
    nodes: Tally = field(default_factory=Tally)
    reanalysis: Tally = field(default_factory=Tally)
    searches: int = 0
    validated: int = 0

    @property
    def total(self) -> Tally:
        """All kinds together."""
        return self.roots + self.nodes + self.reanalysis

    def snapshot(self) -> ValidationTally:
        """A copy that later counts do not change."""
        return copy.deepcopy(self)

    def __add__(self, other: ValidationTally) -> ValidationTally:
        return ValidationTally(
            self.roots + other.roots,
            self.nodes + other.nodes,
            self.reanalysis + other.reanalysis,
            self.searches + other.searches,
            self.validated + other.validated,
        )

    def since(self, earlier: ValidationTally) -> ValidationTally:
        """What was counted after ``earlier``, a snapshot of this one; the largest stay those of all."""
        return ValidationTally(
            self.roots.since(earlier.roots),
            self.nodes.since(earlier.nodes),
            self.reanalysis.since(earlier.reanalysis),
            self.searches - earlier.searches,
            self.validated - earlier.validated,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; :meth:`from_dict` reads it back."""
        kinds = {name: getattr(self, name).as_dict() for name in KINDS}
        return {**kinds, 'searches': self.searches, 'validated': self.validated}

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> ValidationTally:
        """What :meth:`as_dict` gave."""
        kinds = {name: Tally.from_dict(numbers[name]) for name in KINDS}
        return cls(**kinds, searches=numbers['searches'], validated=numbers['validated'])


KINDS = ('roots', 'nodes', 'reanalysis')
