"""How many tokens each layer keeps: weights of the layers, and their rounding to whole slots.

Weights are exact fractions and the rounding compares them exactly. With floating point a tie would be decided
by the last bit, and a budget could rise again after a layer was added, when its tokens are gone.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

from lzero_kv.budget.attention import Preference, check_finite_preferences

Weight = Fraction | int | float

PYRAMID_BETA = 20
"""How many times the first layer's share the last one gets in PyramidKV (Cai et al., 2024)."""
_GRID = 2**20
"""Preferences are compared in steps of 2**(1/_GRID), 0.7 parts in a million, far above the rounding error of
logarithms and far below what an attention measured in float32 can tell."""


class Allocation(ABC):
    """Weights of the layers."""

    @property
    def needs_preference(self) -> bool:
        """Whether the weights depend on the attention."""
        return False

    @property
    def cascades(self) -> bool:
        """Whether the proportions among the first layers stay the same when deeper ones are added."""
        return True

    @abstractmethod
    def weights(self, layers: int, preferences: Sequence[Preference]) -> list[Fraction]:
        """Weight of each layer, greater than 0; only proportions matter.

        Arguments:
            layers: layers of the model.
            preferences: of the layers measured so far, the first ones; weights are given for those alone
                where :attr:`needs_preference`.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every layer."""

    def weights(self, layers: int, preferences: Sequence[Preference] = ()) -> list[Fraction]:
        return [Fraction(1)] * layers


@dataclass(frozen=True)
class Adaptive(Allocation):
    """Earlier layers get more: ``L - l``, or from 1 down to ``1 / beta`` along a straight line."""

    beta: float | None

    def weights(self, layers: int, preferences: Sequence[Preference] = ()) -> list[Fraction]:
        if self.beta is None:
            return [Fraction(layers - layer) for layer in range(layers)]
        drop = (1 - 1 / Fraction(self.beta)) / max(layers - 1, 1)
        return [1 - drop * layer for layer in range(layers)]


@dataclass(frozen=True)
class Pyramid(Adaptive):
    """:class:`Adaptive` with the slope of PyramidKV."""

    beta: float | None = field(init=False, default=PYRAMID_BETA)


@dataclass(frozen=True)
class AttentionBased(Allocation):
    """``(1 - alpha) / L + alpha P_l / sum P`` with the preference ``P_l = H_l^(1/tau1) V_l^(1/tau2)``.

    ``alpha = 1`` is CAKE (Qin et al., ICLR 2025). Modes: ``'normal'`` as above, ``'reverse_disp'`` with
    ``1/H``, ``'reverse'`` with ``1/H`` and ``1/V``. Multiplying all ``H`` or all ``V`` by a number changes
    nothing.
    """

    alpha: float
    tau1: float
    tau2: float
    preference: str

    signs: ClassVar[dict[str, tuple[int, int]]] = {
        'normal': (1, 1),
        'reverse_disp': (-1, 1),
        'reverse': (-1, -1),
    }
    """Exponents of ``H`` and of ``V`` in each mode."""

    @property
    def needs_preference(self) -> bool:
        return True

    @property
    def cascades(self) -> bool:
        # The uniform part is measured against the mean preference, which every further layer moves.
        return self.alpha == 1

    def weights(self, layers: int, preferences: Sequence[Preference]) -> list[Fraction]:
        check_finite_preferences(preferences)
        logs = [self._log2(preference) for preference in preferences]
        powers = [_power_of_two(round((log - logs[0]) * _GRID)) for log in logs]
        if self.alpha == 1:
            return powers
        alpha, count, total = Fraction(self.alpha), len(powers), sum(powers)
        return [(1 - alpha) / count + alpha * power / total for power in powers]

    def _log2(self, measured: Preference) -> float:
        # 0 (attention on one key, or no key that may go) counts as the smallest number there is: P stays > 0
        dispersion, shift = (math.log2(max(value, sys.float_info.min)) for value in measured)
        sign_h, sign_v = self.signs[self.preference]
        return sign_h * dispersion / self.tau1 + sign_v * shift / self.tau2


def _power_of_two(exponent: int) -> Fraction:
    """``2 ** (exponent / _GRID)`` without overflow; the same for the same exponent whatever else is there."""
    whole, part = divmod(exponent, _GRID)
    return Fraction(2.0 ** (part / _GRID)) * Fraction(2) ** whole


ALLOCATIONS: dict[str, type[Allocation]] = {
    'uniform': Uniform,
    'adaptive': Adaptive,
    'pyramid': Pyramid,
    'attention_based': AttentionBased,
}
"""The class of each allocation. The fields of a class are the parameters of BudgetConfig that it reads."""


def allocate(
    weights: Sequence[Weight],
    total: int,
    contexts: Sequence[int],
    *,
    window: int,
    sinks: int,
    minimum: int = 1,
    step: int = 1,
    reserved: int = 0,
) -> tuple[int, ...]:
    """Slots of each layer: the window, the sinks and the layer's part of what is left of ``total``.

    Arguments:
        weights: one for each layer, greater than 0.
        total: slots of all layers together.
        contexts: tokens that each layer has seen; no layer gets more.
        window, sinks: newest and first tokens, kept in every layer.
        minimum: slots for other tokens that a layer gets at least, as far as ``total`` allows.
        step: slots are handed out in blocks of this size.
        reserved: slots of ``total`` that are set aside: window and sinks of further layers, where only the
            first layers of a model are known.

    Returns:
        One number for each weight. With ``step`` 1 and nothing ``reserved`` their sum is the smaller one of
        ``total`` and ``sum(contexts)``.

    Raises:
        ValueError: as :func:`apportion`; a number is out of range; or ``total`` does not hold what is always
            kept.
    """
    _check_sizes(total, contexts, window, sinks, minimum, step)
    always = [min(context, window + sinks) for context in contexts]
    if total < sum(always):
        raise ValueError(
            f'window={window} and sinks={sinks} of {len(contexts)} layers are always kept: expected a total '
            f'of at least {sum(always)}, got {total}; raise the total or lower window or sinks'
        )
    caps = [context - kept for context, kept in zip(contexts, always, strict=True)]
    evictable = max(0, total - sum(always) - reserved)
    if evictable >= sum(caps):
        return tuple(contexts)
    blocks = apportion(weights, evictable // step, [-(-cap // step) for cap in caps], -(-minimum // step))
    return tuple(kept + min(cap, step * count) for kept, cap, count in zip(always, caps, blocks, strict=True))


def _check_sizes(
    total: int, contexts: Sequence[int], window: int, sinks: int, minimum: int, step: int
) -> None:
    given = dict(total=total, window=window, sinks=sinks, minimum=minimum, contexts=min(contexts, default=0))
    wrong = [f'{name}={value}' for name, value in given.items() if value < 0]
    if wrong or step < 1:
        raise ValueError(
            f'sizes must not be negative and step must be at least 1, got '
            f'{", ".join(wrong) or f"step={step}"}'
        )


def apportion(
    weights: Sequence[Weight], total: int, caps: Sequence[int], minimum: int = 0
) -> tuple[int, ...]:
    """Webster's divisor rule within bounds: ``clip(floor(lambda w + 1/2), minimum, cap)`` for each layer,
    with ``lambda`` such that the sum is ``min(total, sum(caps))``.

    The k-th slot of layer ``l`` is a claim of rank ``w_l / (k - 1/2)``; slots up to ``minimum`` go before all
    others, in rounds, the largest weight first; the lower layer wins ties. The result is the first ``total``
    claims in this order. A claim's rank does not depend on other layers or on ``total``, therefore one slot
    more takes nothing from any layer, and a further layer gives nothing to any (Balinski & Young, Fair
    Representation, 1982, on divisor methods).

    Raises:
        ValueError: there is not one cap for each weight, a weight is not greater than 0, or a number is
            negative.
    """
    exact = _checked(weights, total, caps, minimum)
    floors = [min(minimum, cap) for cap in caps]

    def claim(layer: int, slot: int) -> tuple[int, Fraction, int]:
        if slot <= floors[layer]:
            return slot - minimum, -exact[layer], layer
        return 1, -exact[layer] / (2 * slot - 1), layer

    slots = _first_guess(exact, total, caps, floors)
    missing = min(total, sum(caps)) - sum(slots)
    while True:
        asking = min(
            (claim(layer, held + 1) for layer, held in enumerate(slots) if held < caps[layer]), default=None
        )
        holding = max((claim(layer, held) for layer, held in enumerate(slots) if held), default=None)
        if missing > 0 and asking is not None:
            slots[asking[2]] += 1
            missing -= 1
        elif missing < 0 and holding is not None:
            slots[holding[2]] -= 1
            missing += 1
        elif asking is not None and holding is not None and asking < holding:
            slots[asking[2]] += 1
            slots[holding[2]] -= 1
        else:
            return tuple(slots)


def _first_guess(
    exact: Sequence[Fraction], total: int, caps: Sequence[int], floors: Sequence[int]
) -> list[int]:
    """The result up to a few slots: ``lambda`` by bisection in floating point."""
    if total <= sum(floors):
        return [min(floor, total // len(floors)) for floor in floors]
    largest = max(exact)
    weights = [float(weight / largest) for weight in exact]

    def at(factor: float) -> list[int]:
        return [
            max(floor, min(cap, math.floor(min(factor * weight, cap) + 0.5)))
            for weight, cap, floor in zip(weights, caps, floors, strict=True)
        ]

    low, high = 0.0, 1.0
    while sum(at(high)) < min(total, sum(caps)) and high < sys.float_info.max / 4:
        low, high = high, high * 4
    guess = at(low)
    for _ in range(64):
        middle = (low + high) / 2
        slots = at(middle)
        if sum(slots) > total:
            high = middle
            continue
        low, guess = middle, slots
        if sum(slots) == total:
            break
    return guess


def _checked(weights: Sequence[Weight], total: int, caps: Sequence[int], minimum: int) -> list[Fraction]:
    if len(weights) != len(caps) or not weights:
        raise ValueError(f'expected one cap for each weight, got {len(weights)} weights and {len(caps)} caps')
    try:
        exact = [Fraction(weight) for weight in weights]
    except (OverflowError, ValueError) as error:
        raise ValueError(f'weights must be finite numbers greater than 0, got {list(weights)}') from error
    if min(exact) <= 0:
        raise ValueError(f'weights must be finite numbers greater than 0, got {list(weights)}')
    if total < 0 or minimum < 0 or min(caps) < 0:
        raise ValueError(
            f'total, minimum and caps must not be negative, got {total}, {minimum} and {list(caps)}'
        )
    return exact
