"""Tallies and findings as hypothesis draws them: consistent, and otherwise anything."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import strategies as st

from lzero_kv.validation.causes import Cause, Fault
from lzero_kv.validation.deviation import MISMATCH, Deviation, Tolerance
from lzero_kv.validation.finding import Finding
from lzero_kv.validation.tally import Movement, Tally, ValidationTally

LAYERS, TOKENS, EMBED = 3, 5, 7
COUNTS = st.integers(0, 10_000)
AMOUNTS = st.floats(0, 1e6)
WORDS = st.text(max_size=12)


@st.composite
def movements(draw: st.DrawFn) -> Movement:
    movement = Movement()
    for amount in draw(st.lists(AMOUNTS, max_size=5)):
        movement.add(amount)
    return movement


@st.composite
def tallies(draw: st.DrawFn) -> Tally:
    tally = Tally()
    for _ in range(draw(st.integers(0, 4))):
        tally.count_equal()
    for causes in draw(st.lists(st.sets(st.sampled_from(Cause), min_size=1), max_size=4)):
        tally.count_different(causes)
    for _ in range(draw(st.integers(0, 2))):
        tally.count_unexplained()
    for fault in draw(st.lists(st.sampled_from(Fault), max_size=3)):
        tally.count_manager_off(fault)
    tally.largest_host = draw(AMOUNTS | st.just(float('inf')))
    tally.largest_manager = draw(AMOUNTS | st.just(float('inf')))
    tally.policy, tally.value = draw(movements()), draw(movements())
    return tally


@st.composite
def validation_tallies(draw: st.DrawFn) -> ValidationTally:
    return ValidationTally(draw(tallies()), draw(tallies()), draw(tallies()), draw(COUNTS), draw(COUNTS))


@st.composite
def deviations(draw: st.DrawFn) -> Deviation:
    layer = draw(st.none() | st.integers(0, LAYERS - 1))
    return draw(st.just(MISMATCH) | st.builds(Deviation, AMOUNTS, AMOUNTS, st.just(layer), AMOUNTS))


@st.composite
def findings(draw: st.DrawFn) -> Finding:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensors(tokens: int) -> dict[str, torch.Tensor]:
        return {
            'kv': torch.randn(2 * LAYERS, tokens, EMBED, generator=generator),
            'policy': torch.randn(4, generator=generator),
        }

    return Finding(
        kind=draw(st.sampled_from(['roots', 'nodes', 'reanalysis'])),
        env_id=draw(COUNTS),
        row=draw(COUNTS),
        node=draw(st.none() | COUNTS),
        part=draw(st.sampled_from(['keys and values', 'policy', 'value', 'reward', 'latent'])),
        manager=draw(deviations()),
        host=draw(st.none() | deviations()),
        between=draw(deviations()),
        manager_key=draw(WORDS),
        host_key=draw(WORDS),
        fault=draw(st.none() | st.sampled_from(Fault)),
        causes=tuple(draw(st.sets(st.sampled_from(Cause)))),
        tensors={
            'manager': tensors(TOKENS),
            'host': draw(st.none() | st.just(tensors(TOKENS - 1))),
            'truth': tensors(TOKENS),
        },
        replay={'tokens': torch.randn(2, EMBED, generator=generator), 'config': {'layers': LAYERS}},
    )


def a_finding(fault: Fault | None = Fault.STALE_ENTRY, *, layer: int = 1, by: float = 0.5) -> Finding:
    """A row in which one layer's keys (of `layer`) that the manager served are `by` off."""
    truth = {
        'kv': torch.randn(2 * LAYERS, TOKENS, EMBED, generator=torch.Generator().manual_seed(3)),
        'policy': torch.tensor([0.1, 0.2, 0.3, 0.4]),
    }
    manager = {'kv': truth['kv'].clone(), 'policy': truth['policy'].clone()}
    manager['kv'][2 * layer, 2, 4] += by
    exact = Tolerance()
    deviation = exact.deviation(manager['kv'], truth['kv'], kv=True)
    return Finding(
        kind='nodes',
        env_id=2,
        row=1,
        node=6,
        part='keys and values',
        manager=deviation,
        host=exact.deviation(truth['kv'], truth['kv'], kv=True),
        between=deviation,
        manager_key='environment 2, root 9, node 6',
        host_key='-8123',
        fault=fault,
        causes=() if fault else (Cause.EQUAL_LATENTS,),
        tensors={'manager': manager, 'host': dict(truth), 'truth': truth},
    )


def a_tally(times: int = 1) -> ValidationTally:
    """A run in which each count is another number."""
    tally = ValidationTally(searches=11 * times, validated=7 * times)
    for _ in range(times):
        for _ in range(5):
            tally.roots.count_equal()
        for _ in range(3):
            tally.nodes.count_equal()
        tally.roots.count_different([Cause.ROOT_LOST])
        for _ in range(4):
            tally.nodes.count_different([Cause.SLOT_OVERWRITTEN, Cause.ZERO_PADDING])
        tally.reanalysis.count_different([Cause.EQUAL_LATENTS])
        for amount in (0.25, 0.75):
            tally.nodes.policy.add(amount)
        tally.roots.value.add(3.0)
    tally.nodes.largest_host, tally.roots.largest_host = 2.5, 1.5
    tally.nodes.largest_manager, tally.roots.largest_manager = 3e-7, 1e-7
    return tally


def counters(tally: Tally) -> tuple[int, int, int, int, int, Counter, Counter]:
    """Everything that is counted."""
    return (
        tally.compared,
        tally.equal,
        tally.different,
        tally.unexplained,
        tally.manager_off,
        +tally.causes,
        +tally.faults,
    )
