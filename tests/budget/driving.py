"""A cache under a budget and its reference, given the same queries, keys and values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch

from lzero_kv.budget import BudgetConfig, BudgetedCache

from .reference_cache import ReferenceCache

HEAD_DIM = 3
GARBAGE = 50.0
"""Keys, values and queries of padding: finite, and so large that a query would see nothing else."""


@dataclass(frozen=True)
class Case:
    """One prompt and what is decoded after it. All sizes are different numbers."""

    config: BudgetConfig
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    lengths: tuple[int, ...] = (17, 17, 10)
    decoded: int = 5
    limits: tuple[int | None, ...] | None = None
    dynamic: bool = True
    interval: int = 1
    scale: float | None = None
    seed: int = 0

    @property
    def columns(self) -> int:
        return max(self.lengths)

    @property
    def groups(self) -> int:
        return self.kv_heads if self.config.per_head else 1

    @property
    def limit(self) -> tuple[int | None, ...]:
        """Limits of the layers."""
        return self.limits or (None,) * self.layers

    @property
    def named(self) -> dict[str, Any]:
        """What a cache is given beside the config and the number of layers."""
        return dict(limits=self.limits, dynamic=self.dynamic, interval=self.interval, scale=self.scale)


class FlatCache(BudgetedCache):
    """Layers shrink behind the last one alone."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.cascade = False

    def _cut(self, layer: int, sizes: Sequence[Any], again: bool) -> None:
        if not any(self._begin):
            super()._cut(layer, sizes, again)
        elif layer + 1 == self.layers:
            for number in range(self.layers):
                super()._cut(number, sizes, again=False)


class Driver:
    """Queries and keys are random numbers that name a row, so that they do not depend on what a cache holds;
    values say which token they are of.

    Arguments:
        case: what is run.
        names: rows of the case that are run; None for all.
        of: the cache.
    """

    def __init__(
        self, case: Case, *, names: Sequence[int] | None = None, of: type[BudgetedCache] = BudgetedCache
    ) -> None:
        self.case = case
        self.names = list(range(len(case.lengths)) if names is None else names)
        generator = torch.Generator().manual_seed(case.seed)
        shape = case.layers, len(case.lengths), case.heads + case.kv_heads, case.columns + case.decoded
        drawn = torch.randn(*shape, HEAD_DIM, generator=generator, dtype=torch.float64)
        self.queries, self.keys = drawn[:, :, : case.heads], drawn[:, :, case.heads :]
        # layers that differ in sharpness, so that their preferences differ
        self.queries *= 3 * torch.rand(case.layers, 1, 1, 1, 1, generator=generator, dtype=torch.float64) + 1
        self.cache = of(case.config, case.layers, **case.named)
        self.slots_seen: list[list[tuple[int, ...]]] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return [self.case.lengths[name] for name in self.names]

    def prompt(self) -> None:
        """The first block, with padding in front of the shorter rows."""
        self.block(max(self.lengths), self.lengths)

    def block(self, size: int = 1, added: Sequence[int] | None = None) -> None:
        """One block through all layers."""
        before = self.cache.seen or [0] * len(self.names)
        ends = torch.tensor(before) + torch.tensor([size] * len(before) if added is None else list(added))
        positions = ends[:, None] - size + torch.arange(size)
        padding = positions < torch.tensor(before)[:, None]
        padded = bool(padding.any())
        for layer in range(self.case.layers):
            queries, keys = (self._at(table, layer, positions) for table in (self.queries, self.keys))
            values = self.stamp(layer, positions.clamp(min=0)[:, None].expand(-1, self.case.kv_heads, -1))
            for tensor in (queries, keys, values) if padded else ():
                tensor.transpose(1, 2)[padding] = GARBAGE
            joined = self.cache.join(layer, keys, values)
            assert all(torch.equal(all_[:, :, -size:], new) or
                       torch.equal(all_[:, :, -size:].nan_to_num(7), new.nan_to_num(7))
                       for all_, new in zip(joined, (keys, values), strict=True))  # fmt: skip
            held = self.cache.append(layer, added)
            assert held is self.cache[layer] and (held.keys is joined[0] and held.values is joined[1])
            self.cache.observe(layer, queries)
            self.slots_seen.append(list(self.cache.slots))

    def select_rows(self, rows: list[int]) -> None:
        self.cache.select_rows(torch.tensor(rows))
        self.names = [self.names[row] for row in rows]

    def stamp(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """``[B, kv_heads, n, HEAD_DIM]``: a number that names layer, row, head, token and column."""
        rows, heads = torch.tensor(self.names), torch.arange(positions.shape[1])
        name = ((layer * 11 + rows[:, None, None]) * 13 + heads[:, None]) * 101 + positions
        return (name[..., None] * HEAD_DIM + torch.arange(HEAD_DIM)).double()

    def kept(self) -> list[list[list[list[int]]]]:
        """Positions by layer, row and group."""
        return [
            [
                [own[len(own) - length :] for own, length in zip(*pair, strict=True)]
                for pair in zip(held.positions.tolist(), held.lengths.tolist(), strict=True)
            ]
            for held in (self.cache[layer] for layer in range(self.case.layers))
        ]

    def check_contents(self) -> None:
        """Keys and values are those of the tokens that the positions name."""
        for layer in range(self.case.layers):
            held = self.cache[layer]
            positions = held.positions.expand(-1, self.case.kv_heads, -1)
            lengths = held.lengths.expand(-1, self.case.kv_heads)[..., None]
            real = torch.arange(held.columns) >= held.columns - lengths
            table = self.keys[layer][self.names]
            expected = table.gather(2, positions[..., None].expand(-1, -1, -1, HEAD_DIM))
            assert torch.equal(held.keys[real], expected[real])
            assert torch.equal(held.values[real], self.stamp(layer, positions)[real])
            assert held.keys.isfinite().all() and held.values.isfinite().all()

    def _at(self, table: torch.Tensor, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """``[B, heads, Q, HEAD_DIM]`` of a table ``[layers, rows, heads, positions, HEAD_DIM]``."""
        rows = torch.tensor(self.names)[:, None]
        return table[layer][rows, :, positions.clamp(min=0)].transpose(1, 2).contiguous()


def reference_of(driver: Driver) -> ReferenceCache:
    """The slow cache for a driver's case, before the prompt."""
    case, config = driver.case, driver.case.config
    names = {'allocation', 'alpha', 'tau1', 'tau2', 'beta', 'preference'} & config.model_fields_set
    allocation: dict[str, Any] = {
        'mode' if name == 'preference' else name: getattr(config, name) for name in names | {'allocation'}
    }
    parameters = {
        name: getattr(config, name)
        for name in ('gamma', 'kernel', 'theta')
        if name in config.model_fields_set or name != 'theta'
    }
    mix, rho = {'attention': (1, 1), 'time_decay': (1, 0.95), 'hybrid': (0.5, 1)}[config.strategy]
    reads = {'streaming': set(), 'h2o': {'accumulated'}}.get(config.selection, {'recent'})
    if config.selection == 'hace':
        mix = parameters['mix'] = mix if config.mix is None else config.mix
        reads = {name for name, part in (('accumulated', mix), ('recent', 1 - mix)) if part}
    else:
        rho = 1
    sizes = {
        name: Fraction(str(getattr(config, name)))
        for name in ('ratio', 'tokens', 'heavy_ratio', 'recent_ratio')
        if getattr(config, name) is not None
    }
    interval = case.interval
    if config.tokens is not None:
        room = config.tokens - config.window - config.sinks
        interval = max(1, min(interval, room - room % config.step))
    scale = HEAD_DIM**-0.5 if case.scale is None else case.scale
    keys = driver.keys.repeat_interleave(case.heads // case.kv_heads, dim=2)
    numbers = (torch.einsum('lrhqd,lrhkd->lrhqk', driver.queries, keys) * scale).tolist()

    def attention(layer: int, row: int, head: int, query: int, keys: list[int]) -> list[float]:
        logits = numbers[layer][driver.names[row]][head][query]
        largest = max(logits[key] for key in keys)
        powers = [math.exp(logits[key] - largest) for key in keys]
        total = sum(powers)
        return [power / total for power in powers]

    return ReferenceCache(
        layers=case.layers,
        heads=case.heads,
        groups=case.groups,
        rows=len(driver.names),
        limits=case.limit,
        dynamic=case.dynamic,
        interval=interval,
        sizes=sizes,
        window=config.window,
        sinks=config.sinks,
        minimum=config.minimum,
        step=config.step,
        allocation=allocation,
        selection=config.selection,
        reads=reads,
        decay=rho if config.rho is None else config.rho,
        parameters=parameters,
        attention=attention,
    )


def kept_by(slow: ReferenceCache) -> list[list[list[list[int]]]]:
    """Positions by layer, row and group."""
    return [[[group.positions for group in row.groups] for row in layer] for layer in slow.rows]


def check_same(driver: Driver, slow: ReferenceCache) -> None:
    """Slots, tokens, keys, values, and what is remembered of the attention agree."""
    cache = driver.cache
    assert cache.seen == slow.seen
    assert [unbounded(row) for row in cache.slots] == [unbounded(row) for row in slow.slots]
    assert driver.kept() == kept_by(slow)
    driver.check_contents()
    if slow.measures and cache.reads_attention:
        for fast, expected in zip(cache.preferences, slow.preferences, strict=True):
            for pair in zip(fast, expected, strict=True):
                assert tuple(pair[0]) == pytest.approx(pair[1], rel=1e-7, abs=1e-12)
    for layer in range(driver.case.layers):
        check_remembered(driver, slow, layer)


def check_remembered(driver: Driver, slow: ReferenceCache, layer: int) -> None:
    """Accumulated attention, scores and awaited queries of a layer agree."""
    held = driver.cache[layer]
    assert (held.scores is not None) == bool(slow.reads and driver.cache.reads_attention)
    held_scores, held_sums = (
        None if of is None else of.tolist() for of in (held.scores, held.record.accumulated)
    )
    for row, owner in enumerate(slow.rows[layer]):
        for number, group in enumerate(owner.groups):
            first = held.columns - len(group.tokens)
            if held_scores is not None:
                known = held_scores[row][number][first:]
                known += [-1.0] * (len(group.tokens) - len(known))
                scores = [-1.0 if token.score is None else token.score for token in group.tokens]
                assert known == pytest.approx(scores, rel=1e-7, abs=1e-12)
            if held_sums is not None:
                summed = held_sums[row][number][first:]
                expected = [token.accumulated for token in group.tokens]
                assert summed == pytest.approx(expected[: len(summed)], rel=1e-9)
                assert not any(expected[len(summed) :])
            if driver.cache.reads_attention:
                waiting = 0 if held.queries is None else held.queries.shape[2]
                assert waiting == len(group.pending)


def unbounded(slots: Sequence[int]) -> list[int | None]:
    """Slots, None for more than there will be tokens."""
    return [None if count >= 10**9 else count for count in slots]


Blocks = Sequence[int | tuple[int, Sequence[int]] | list[int]]
"""Blocks of so many tokens, ``(size, added)`` where rows differ, and lists: rows that are selected."""


def compare(case: Case, blocks: Blocks = (1, 1, 2)) -> Driver:
    """Run both caches over a prompt and blocks of new tokens; they must hold the same all the way."""
    driver = Driver(case)
    slow = reference_of(driver)
    driver.prompt()
    slow.block(case.columns, case.lengths)
    check_same(driver, slow)
    for block in blocks:
        if isinstance(block, list):
            driver.select_rows(block)
            slow.select_rows(block)
        else:
            size, added = block if isinstance(block, tuple) else (block, [block] * len(driver.names))
            driver.block(size, added)
            slow.block(size, added)
        check_same(driver, slow)
    return driver


def alone(case: Case, row: int, blocks: Sequence[int]) -> Driver:
    """One row of a case in a cache of its own."""
    driver = Driver(case, names=[row])
    driver.prompt()
    for size in blocks:
        driver.block(size)
    return driver


def with_blocks(case: Case, blocks: Sequence[int]) -> Case:
    """A case with enough positions for the blocks behind the prompt."""
    return dataclasses.replace(case, decoded=sum(blocks))
