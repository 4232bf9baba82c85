"""Tallies and findings as hypothesis draws them: consistent, and otherwise anything."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import strategies as st

from lzero_kv.telemetry.counters import Cause, Counters, Fault, Movement, ValidationCounters
from lzero_kv.validation.findings import Finding
from lzero_kv.validation.tolerance import MISMATCH, Deviation, Tolerance

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
def several_counters(draw: st.DrawFn) -> Counters:
    counters = Counters()
    for _ in range(draw(st.integers(0, 4))):
        counters.count_equal()
    for causes in draw(st.lists(st.sets(st.sampled_from(Cause), min_size=1), max_size=4)):
        counters.count_different(causes)
    for _ in range(draw(st.integers(0, 2))):
        counters.count_unexplained()
    for fault in draw(st.lists(st.sampled_from(Fault), max_size=3)):
        counters.count_cache_wrong(fault)
    counters.largest_stock = draw(AMOUNTS | st.just(float('inf')))
    counters.largest_cache = draw(AMOUNTS | st.just(float('inf')))
    counters.policy, counters.value = draw(movements()), draw(movements())
    return counters


@st.composite
def validation_counters(draw: st.DrawFn) -> ValidationCounters:
    return ValidationCounters(
        draw(several_counters()),
        draw(several_counters()),
        draw(several_counters()),
        draw(COUNTS),
        draw(COUNTS),
    )


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
        cache=draw(deviations()),
        stock=draw(st.none() | deviations()),
        between=draw(deviations()),
        cache_key=draw(WORDS),
        stock_key=draw(WORDS),
        fault=draw(st.none() | st.sampled_from(Fault)),
        causes=tuple(draw(st.sets(st.sampled_from(Cause)))),
        tensors={
            'cache': tensors(TOKENS),
            'stock': draw(st.none() | st.just(tensors(TOKENS - 1))),
            'truth': tensors(TOKENS),
        },
        replay={'tokens': torch.randn(2, EMBED, generator=generator), 'config': {'layers': LAYERS}},
    )


def a_finding(fault: Fault | None = Fault.STALE_ENTRY, *, layer: int = 1, by: float = 0.5) -> Finding:
    """A row in which one layer's keys (of `layer`) that the cache served are `by` off."""
    truth = {
        'kv': torch.randn(2 * LAYERS, TOKENS, EMBED, generator=torch.Generator().manual_seed(3)),
        'policy': torch.tensor([0.1, 0.2, 0.3, 0.4]),
    }
    cache = {'kv': truth['kv'].clone(), 'policy': truth['policy'].clone()}
    cache['kv'][2 * layer, 2, 4] += by
    exact = Tolerance()
    deviation = exact.deviation(cache['kv'], truth['kv'], kv=True)
    return Finding(
        kind='nodes',
        env_id=2,
        row=1,
        node=6,
        part='keys and values',
        cache=deviation,
        stock=exact.deviation(truth['kv'], truth['kv'], kv=True),
        between=deviation,
        cache_key='environment 2, root 9, node 6',
        stock_key='-8123',
        fault=fault,
        causes=() if fault else (Cause.EQUAL_LATENTS,),
        tensors={'cache': cache, 'stock': dict(truth), 'truth': truth},
    )


def some_counters(times: int = 1) -> ValidationCounters:
    """A run in which each count is another number."""
    counters = ValidationCounters(searches=11 * times, validated=7 * times)
    for _ in range(times):
        for _ in range(5):
            counters.roots.count_equal()
        for _ in range(3):
            counters.nodes.count_equal()
        counters.roots.count_different([Cause.ROOT_LOST])
        for _ in range(4):
            counters.nodes.count_different([Cause.SLOT_OVERWRITTEN, Cause.ZERO_PADDING])
        counters.reanalysis.count_different([Cause.EQUAL_LATENTS])
        for amount in (0.25, 0.75):
            counters.nodes.policy.add(amount)
        counters.roots.value.add(3.0)
    counters.nodes.largest_stock, counters.roots.largest_stock = 2.5, 1.5
    counters.nodes.largest_cache, counters.roots.largest_cache = 3e-7, 1e-7
    return counters


def counts(counters: Counters) -> tuple[int, int, int, int, int, Counter, Counter]:
    """Everything that is counted."""
    return (
        counters.compared,
        counters.equal,
        counters.different,
        counters.unexplained,
        counters.cache_wrong,
        +counters.causes,
        +counters.faults,
    )
