"""Counters of a validation: rows by verdict, by cause of stock's mistakes and by fault of the cache."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

from pydantic import ConfigDict


class _Named(Enum):
    """Names with a sentence that says what happened."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> Self:
        member = object.__new__(cls)
        member._value_, member.sentence = value, sentence
        return member


class Cause(_Named):
    """Causes of a wrong answer of the stock cache; each is proven before it is counted."""

    SLOT_OVERWRITTEN = 'slot_overwritten', 'the slot was written for another history, and its old key stayed'
    OTHER_ENVIRONMENT = 'other_environment', "another environment's entry was served"
    EQUAL_LATENTS = (
        'equal_latents',
        'two histories have the same latent state, which is all that the key is made of',
    )
    ZERO_PADDING = (
        'zero_padding',
        'shorter rows of the batch were padded with zero keys, which attention sees',
    )
    ROOT_LOST = 'root_lost', 'the root is stored, but its observation, encoded again, gives another key'
    RESTARTED = 'restarted', 'the context was gone, and the stock cache began again from one token'
    CRASHED = 'crashed', 'an entry or an input was missing, and the stock code ends with an error there'
    WINDOW_CORRECTION = (
        'window_correction',
        'a full window moved, and its keys and values were not computed again',
    )
    ROTARY_POSITION = 'rotary_position', 'tokens were rotated to other positions than those of their steps'


class Fault(_Named):
    """What a wrong cache served in the place of the right keys and values."""

    ANOTHER_NODE = 'another_node', 'what was served belongs to another node of the same search'
    STALE_ENTRY = 'stale_entry', 'what was served belongs to an earlier state of the same environment'
    OTHER_ENVIRONMENT = 'other_environment', 'what was served belongs to another environment'
    KEYS_AND_VALUES_EXCHANGED = 'keys_and_values_exchanged', 'keys and values of a layer are exchanged'
    TOKEN_OFFSET = 'token_offset', 'the history is one token off'
    POSITION_OFFSET = 'position_offset', 'a token stands at another position than its own'
    PERTURBED = 'perturbed', 'the numbers differ a little everywhere, more than rounding explains'
    ENTRY_LOST = 'entry_lost', 'the entry was stored and never evicted or cleared, and is not there'
    UNKNOWN = 'unknown', 'no pattern was recognised'


class _Additive:
    """Arithmetic of dataclasses field by field; of fields named ``largest...`` the maximum is taken."""

    __pydantic_config__ = ConfigDict(ser_json_inf_nan='strings')  # JSON has no such numbers

    def __add__(self, other: Self) -> Self:
        return self._combined(other, max, lambda one, two: one + two)

    def since(self, earlier: Self) -> Self:
        """Counts after ``earlier``, a snapshot of this one; ``largest...`` stay those of all."""

        def difference(now: Any, before: Any) -> Any:
            return now.since(before) if isinstance(now, _Additive) else now - before

        return self._combined(earlier, lambda now, before: now, difference)

    def _combined(self, other: Any, largest: Callable[..., Any], others: Callable[..., Any]) -> Self:
        values = {
            name: (largest if name.startswith('largest') else others)(value, getattr(other, name))
            for name, value in vars(self).items()
        }
        return type(self)(**values)

    def snapshot(self) -> Self:
        """A copy that later counts do not change."""
        return copy.deepcopy(self)


@dataclass
class Movement(_Additive):
    """Distance by which a prediction moved, over all differences where it is known."""

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


@dataclass
class Counters(_Additive):
    """Compared rows of one kind of inference, each with one verdict.

    Attributes:
        compared: all of them: ``equal + different + unexplained + cache_wrong``.
        equal: both caches gave the same, within the tolerance where exactness is not due.
        different: the stock cache was wrong, this one right, and the cause is proven.
        unexplained: a difference whose cause is not proven.
        cache_wrong: this cache was wrong, whatever the stock cache did.
        causes: differences by cause; one with several causes counts under each.
        faults: ``cache_wrong`` by fault.
        largest_stock: largest difference of the stock cache from the recomputation.
        largest_cache: the same for this cache: rounding, where it is right.
        policy: total variation distance between the policies (discrete actions), over the differences.
        value: absolute difference between the values, in units of return, over the differences.
    """

    compared: int = 0
    equal: int = 0
    different: int = 0
    unexplained: int = 0
    cache_wrong: int = 0
    causes: Counter[Cause] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    largest_stock: float = 0.0
    largest_cache: float = 0.0
    policy: Movement = field(default_factory=Movement)
    value: Movement = field(default_factory=Movement)

    def count_equal(self) -> None:
        """Count a row in which both gave the same."""
        self.compared += 1
        self.equal += 1

    def count_different(self, causes: Iterable[Cause]) -> None:
        """Count a row in which the stock cache was wrong, for proven causes."""
        self.compared += 1
        self.different += 1
        self.causes.update(causes)

    def count_unexplained(self) -> None:
        """Count a difference without a proven cause."""
        self.compared += 1
        self.unexplained += 1

    def count_cache_wrong(self, fault: Fault) -> None:
        """Count a row in which this cache was wrong."""
        self.compared += 1
        self.cache_wrong += 1
        self.faults[fault] += 1

    @property
    def failures(self) -> int:
        """Rows that must not be: unexplained, or this cache wrong."""
        return self.unexplained + self.cache_wrong


@dataclass
class ValidationCounters(_Additive):
    """Counters of one world model by kind of inference.

    Attributes:
        roots: root inferences.
        nodes: recurrent inferences of searches from those roots.
        reanalysis: recurrent inferences of reanalysis.
        searches: searches begun.
        validated: searches whose nodes were compared.
    """

    roots: Counters = field(default_factory=Counters)
    nodes: Counters = field(default_factory=Counters)
    reanalysis: Counters = field(default_factory=Counters)
    searches: int = 0
    validated: int = 0

    @property
    def total(self) -> Counters:
        """All kinds together."""
        return self.roots + self.nodes + self.reanalysis


@dataclass
class Timings(_Additive):
    """Seconds on the wall and work of one world model, as SPEED_METRICS names them."""

    searches: int = 0
    simulations: int = 0
    search_seconds: float = 0.0
    root_inferences: int = 0
    root_seconds: float = 0.0
    collect_seconds: float = 0.0
    planning_seconds: float = 0.0

    def count_search(self, simulations: int, seconds: float) -> None:
        """Count a search of a batch with that many simulations in all rows together."""
        self.searches += 1
        self.simulations += simulations
        self.search_seconds += seconds

    def count_roots(self, seconds: float) -> None:
        """Count a root inference of a batch."""
        self.root_inferences += 1
        self.root_seconds += seconds

    def count_collection(self, seconds: float, before: Timings) -> None:
        """Count a collection, or a part of it, that began with the counts ``before``."""
        self.collect_seconds += seconds
        self.planning_seconds += self.search_seconds - before.search_seconds
        self.planning_seconds += self.root_seconds - before.root_seconds


KINDS = ('roots', 'nodes', 'reanalysis')
