"""Contestants take turns; what each needed is compared with stock's and the floor's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from testing.families import Family
from testing.models import collect_model

from .collection import Collection
from .contestants import EAGER, Floor, contestant, precisions_of
from .players import FloorPlayer, Numbers, Player
from .reanalysis import BatchReanalysis
from .upstream import CACHES, Checkout, UpstreamPlayer

FLOOR = 'floor'


def summary(values: Sequence[float]) -> Numbers:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {'median': round(float(median), 3), 'quartiles': [round(float(low), 3), round(float(high), 3)]}


def measure_shape(
    family: Family,
    caches: Sequence[str],
    steps: int,
    history: int,
    threads: Sequence[int],
    upstream: Checkout | None,
    device: str,
) -> dict[str, Numbers]:
    """Each of ``caches``, stock among them, and the floor at one shape: numbers by name; those of each number
    of threads under 'threads'.

    Raises RuntimeError when two contestants predict different values for the first observations.
    """
    reduced = precisions_of(family, device)
    names = [*caches, *reduced]
    players: list[Any] = [Player(contestant(family, name, device), family.simulations) for name in names]
    weights = collect_model(players[0].contestant.policy).state_dict()
    others = [UpstreamPlayer(upstream, name, family, weights, device) for name in CACHES] if upstream else []
    try:
        players += others
        values = {player.name: player.begin() for player in players}
        require_equal_values({name: of for name, of in values.items() if name not in reduced})
        warm_up = history if family.context > 16 else family.context // 2 + 1
        for player in players:
            player.warm_up(warm_up)
        floor = Floor(family, min(2 * warm_up + 1, family.context - 3), device)
        floors = [FloorPlayer(floor)] + ([FloorPlayer(floor, captured=True)] if device == 'cuda' else [])
        timed = {number: take_turns([*players, *floors], steps, number) for number in threads}
        for player in players:
            player.threads(threads[0])
        found: dict[str, Numbers] = {player.name: player.look_closer() for player in players}
        for name, quality in agreement({p.name: p for p in players}, reduced).items():
            found[name]['quality'] = quality
    finally:
        for other in others:
            other.close()
    found |= {floor.name: {} for floor in floors}
    for name, numbers in found.items():
        numbers['threads'] = {
            number: compared(rounds, name, family.simulations) for number, rounds in timed.items()
        }
    return found


def agreement(players: dict[str, Any], reduced: Sequence[str], steps: int = 6) -> dict[str, Numbers]:
    """How searches of each of ``reduced`` differ from those of the same window in float32, at the same roots.

    Actions are scripted, so histories stay equal. All have played as many steps before.

    Returns:
        For each: part of the roots whose most visited action is the same, and the mean divergence (nats) of
        its visit counts from those of float32.
    """
    same: dict[str, list[bool]] = {name: [] for name in reduced}
    nats: dict[str, list[float]] = {name: [] for name in reduced}
    exact = sorted({name.split()[0] for name in reduced})
    for _ in range(steps if reduced else 0):
        visits = {name: players[name].visits() for name in [*exact, *reduced]}
        for name in reduced:
            for own, other in zip(visits[name], visits[name.split()[0]], strict=True):
                same[name].append(bool(own.argmax() == other.argmax()))
                nats[name].append(divergence(other, own))
    return {
        name: {
            'root_actions': round(float(np.mean(same[name])), 4),
            'nats': round(float(np.mean(nats[name])), 5),
        }
        for name in reduced
    }


def divergence(counts: np.ndarray, other: np.ndarray) -> float:
    """Divergence (Kullback-Leibler, nats) of a search's visits from another's, half a visit added to each."""
    p, q = ((c + 0.5) / (c + 0.5).sum() for c in (counts, other))
    return float((p * np.log(p / q)).sum())


def require_equal_values(predicted: dict[str, list[float]]) -> None:
    """Raise RuntimeError unless all have the same model and see the same: fresh roots owe nothing to a cache.

    The tolerance is that of float32 arithmetic in another order; another weight or observation changes the
    first digit.
    """
    expected = predicted['stock']
    for name, values in predicted.items():
        if not np.allclose(values, expected, rtol=1e-3, atol=1e-3):
            raise RuntimeError(
                'expected the same values of the first roots from all contestants: '
                f'stock predicts {expected}, {name} {values}'
            )


def take_turns(players: Sequence[Any], steps: int, threads: int) -> dict[str, list[tuple[float, float]]]:
    """``steps`` rounds of one environment step each; milliseconds of the steps and their root inferences."""
    rounds: dict[str, list[tuple[float, float]]] = {player.name: [] for player in players}
    for player in players:
        player.threads(threads)
    for _ in range(steps):
        for player in players:
            rounds[player.name].append(player.step())
    return rounds


def compared(rounds: dict[str, list[tuple[float, float]]], name: str, simulations: int) -> Numbers:
    """Times of one contestant, beside stock's and the floor's of the same rounds: a machine that gets slower
    on the way changes the times, and hardly their quotients."""
    steps, roots = np.transpose(rounds[name])
    stock, floor = (np.transpose(rounds[other]) for other in ('stock', FLOOR))
    numbers = {
        'step_ms': summary(steps),
        'times_as_fast': round(float(np.median(stock[0] / steps)), 2),
        'over_floor': round(float(np.median(steps / floor[0])), 2),
    }
    if not np.isnan(roots).any():
        numbers['root_inference_ms'] = summary(roots)
        numbers['root_times_as_fast'] = round(float(np.median(stock[1] / roots)), 2)
        numbers['simulation_ms'] = round(float(np.median(steps - roots)) / simulations, 3)
    return numbers


def measure_reanalysis(shape: str, segments: int, simulations: int) -> Numbers:
    """One batch each; the caches take turns, twice for all but stock, which takes minutes."""
    found: Numbers = {'roots': 11 * segments, 'simulations': simulations}
    for cache in EAGER:
        batch = BatchReanalysis(shape, cache, segments, simulations)
        if cache != 'stock':
            batch.seconds()
        found[f'{cache}_s'] = round(batch.seconds(), 3)
    for cache in EAGER:
        found[f'{cache}_times_as_fast'] = round(found['stock_s'] / found[f'{cache}_s'], 1)
    return found


def measure_collection(task: str, calls: int) -> dict[str, Numbers]:
    """Environment steps per second of real collection by each cache: ``calls`` of the collector, in turn."""
    rates: dict[str, list[float]] = {cache: [] for cache in EAGER}
    with ExitStack() as stack:
        collections = {cache: stack.enter_context(closing(Collection(task, cache))) for cache in EAGER}
        for collection in collections.values():
            collection.segment()
        for _ in range(calls):
            for cache, collection in collections.items():
                steps, seconds = collection.segment()
                rates[cache].append(steps / seconds)
    stock = np.median(rates['stock'])
    return {
        cache: {
            'steps_per_second': summary(values),
            'times_as_fast': round(float(np.median(values) / stock), 2),
        }
        for cache, values in rates.items()
    }
