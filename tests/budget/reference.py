"""Layer budgets once more, slowly: lists and loops, no tensors. The oracle of the tests of
``lzero_kv.budget``.

One row and one key-value head at a time; a token is a dictionary entry, never a column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Matrix = Sequence[Sequence[float]]
"""Attention of one head: one list for each query, one number for each key."""


# --- how many tokens each layer keeps ---


def apportion(weights: Sequence[Fraction], total: int, caps: Sequence[int], minimum: int) -> list[int]:
    """Hand out one slot after another.

    While a layer is below its minimum (or its cap, where that is lower), the emptiest such layer is next, of
    equally empty ones that of the largest weight; afterwards the layer whose weight is largest for the slots
    it has (Webster: divided by 1/2, 3/2, ...). The lower layer wins ties.
    """
    slots = [0] * len(weights)
    for _ in range(total):
        poor = [layer for layer in range(len(weights)) if slots[layer] < min(minimum, caps[layer])]
        if poor:
            layer = min(poor, key=lambda item: (slots[item], -weights[item], item))
        else:
            open_layers = [layer for layer in range(len(weights)) if slots[layer] < caps[layer]]
            if not open_layers:
                break
            claims = {item: weights[item] / (slots[item] + Fraction(1, 2)) for item in open_layers}
            layer = min(open_layers, key=lambda item: (-claims[item], item))
        slots[layer] += 1
    return slots


def weights(
    allocation: str,
    layers: int,
    preferences: Sequence[tuple[float, float]],
    *,
    beta: float | None = None,
    alpha: float = 1.0,
    tau1: float = 1.0,
    tau2: float = 1.0,
    mode: str = 'normal',
) -> list[Fraction]:
    """Weight of each layer, from dispersion and shift of each layer where the allocation reads them."""
    if allocation == 'uniform':
        return [Fraction(1)] * layers
    if allocation == 'pyramid':
        allocation, beta = 'adaptive', 20
    if allocation == 'adaptive':
        if beta is None:
            return [Fraction(layers - layer) for layer in range(layers)]
        if layers == 1:
            return [Fraction(1)]
        return [1 - (1 - 1 / Fraction(beta)) * Fraction(layer, layers - 1) for layer in range(layers)]
    signs = {'normal': (1, 1), 'reverse_disp': (-1, 1), 'reverse': (-1, -1)}[mode]
    logs = [
        signs[0] * math.log2(max(h, 2.0**-1022)) / tau1 + signs[1] * math.log2(max(v, 2.0**-1022)) / tau2
        for h, v in preferences
    ]
    million = 2**20
    powers = []
    for log in logs:
        units = round((log - logs[0]) * million)
        powers.append(Fraction(2.0 ** (units % million / million)) * Fraction(2) ** (units // million))
    share = Fraction(alpha)
    return [(1 - share) / len(powers) + share * power / sum(powers) for power in powers]


# --- dispersion and shift ---


def variance(values: Sequence[float]) -> float:
    """Sample variance; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def dispersion(heads: Sequence[Matrix], keys: Sequence[int]) -> float:
    """Attention dispersion of one row over the keys that may be evicted."""
    total = 0.0
    for head in heads:
        for query in head:
            for key in keys:
                if query[key] > 0:
                    total -= query[key] * math.log(query[key])
    return total


def shift(heads: Sequence[Matrix], keys: Sequence[int]) -> float:
    """Attention shift of one row over the keys that may be evicted."""
    return sum(variance([query[key] for query in head]) for head in heads for key in keys)


# --- which tokens stay ---


def may_go(positions: Sequence[int], window: int, sinks: int, step: int = 1) -> list[int]:
    """Places (in ``positions``, ascending) of the tokens outside the first and the newest steps."""
    numbers = sorted({position // step for position in positions})
    first, newest = (sinks + step - 1) // step, max(0, len(numbers) - window // step)
    spared = {*numbers[:first], *numbers[newest:]}
    return [place for place, position in enumerate(positions) if position // step not in spared]


def accumulated(heads: Sequence[Matrix], decay: float) -> list[float]:
    """``s <- decay s + a`` for every query, ``a`` the mean over the heads."""
    sums = [0.0] * len(heads[0][0])
    for query in zip(*heads, strict=True):
        sums = [decay * past + sum(now) / len(now) for past, *now in zip(sums, *query, strict=True)]
    return sums


def pooled(scores: dict[int, float], kernel: int) -> dict[int, float]:
    """Mean over ``kernel`` neighbours in position order; beyond the ends there are zeros."""
    places = sorted(scores)
    result = {}
    for number, place in enumerate(places):
        around = range(number - kernel // 2, number + kernel // 2 + 1)
        result[place] = sum(scores[places[item]] for item in around if 0 <= item < len(places)) / kernel
    return result


def scores(
    selection: str,
    places: Sequence[int],
    positions: Sequence[int],
    accumulated: Sequence[float],
    recent: Sequence[Matrix],
    *,
    gamma: float = 200.0,
    kernel: int = 5,
    mix: float = 0.5,
    theta: float = 0.0,
) -> dict[int, float]:
    """Score of each token that may go.

    Arguments:
        places: where the tokens that may go lie.
        positions: logical position of every token.
        accumulated: accumulated attention of every token.
        recent: for each query head of the key-value head, the rows of the last queries.
    """
    if selection == 'streaming':
        return {place: float(positions[place]) for place in places}
    if selection == 'h2o':
        return {place: accumulated[place] for place in places}
    spread = {'snapkv': 0.0, 'cake': gamma, 'hace': gamma}[selection]
    indicator = {}
    for place in places:
        of_heads = []
        for head in recent:
            seen = [query[place] for query in head]
            of_heads.append(sum(seen) / len(seen) + spread * variance(seen) if seen else 0.0)
        indicator[place] = sum(of_heads) / len(of_heads)
    indicator = pooled(indicator, kernel)
    if selection != 'hace':
        return indicator
    heavy, strong = sum(accumulated[place] for place in places), sum(indicator.values())
    result = {}
    for place in places:
        result[place] = mix * accumulated[place] / heavy if heavy else 0.0
        result[place] += (1 - mix) * indicator[place] / strong if strong else 0.0
    least = theta * max(result.values(), default=0.0)
    return {place: score if score >= least else 0.0 for place, score in result.items()}


def keep(scored: dict[int, float], positions: Sequence[int], slots: int, step: int = 1) -> list[int]:
    """Places that stay: what has no score, then step after step the highest sums, the later one first among
    equals, until the next step does not fit."""
    kept = [place for place in range(len(positions)) if place not in scored]
    steps: dict[int, list[int]] = {}
    for place in scored:
        steps.setdefault(positions[place] // step, []).append(place)
    best_first = sorted(steps, key=lambda item: (-sum(scored[place] for place in steps[item]), -item))
    for number in best_first:
        if len(kept) + len(steps[number]) > slots:
            break
        kept += steps[number]
    return sorted(kept)
