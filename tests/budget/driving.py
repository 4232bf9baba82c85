"""A cache under a budget and its reference, given the same attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lzero_kv.budget import BudgetConfig, BudgetedCache, LayerCache

from .reference_cache import ReferenceCache

HEAD_DIM = 3


@dataclass(frozen=True)
class Case:
    """One prompt and what is decoded after it. All sizes are different numbers."""

    config: BudgetConfig
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    lengths: tuple[int, ...] = (17, 17, 10)
    decoded: int = 5
    seed: int = 0

    @property
    def columns(self) -> int:
        return max(self.lengths)

    @property
    def groups(self) -> int:
        return self.kv_heads if self.config.per_head else 1


class Driver:
    """Attention comes from a table of random logits for each (layer, row, head, query, key), so that it does
    not depend on what a cache holds, but for the softmax over it. Keys and values say which token they are
    of.
    """

    def __init__(self, case: Case, *, cascade: bool = True) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        positions = case.columns + case.decoded
        rows = len(case.lengths)
        self.logits = 3 * torch.randn(
            case.layers, rows, case.heads, positions, positions, generator=generator, dtype=torch.float64
        )
        # layers that differ in sharpness, so that their preferences differ
        self.logits *= torch.rand(case.layers, 1, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.2
        self.cache = BudgetedCache(case.config, case.layers, case.columns, cascade=cascade)
        self.slots_seen: list[tuple[int, ...]] = []

    def attention(self, layer: int, kv: LayerCache, block: int) -> torch.Tensor:
        """Probabilities ``[B, heads, block, n]``; padding is attended with a weight that must not be read."""
        case = self.case
        shares = case.heads // case.groups
        keys = kv.positions.repeat_interleave(shares, dim=1)
        queries = keys[:, :, -block:]
        rows = torch.arange(len(case.lengths))[:, None, None, None]
        heads = torch.arange(case.heads)[None, :, None, None]
        logits = self.logits[layer][rows, heads, queries[..., None], keys[:, :, None]]
        column = torch.arange(kv.columns)
        real = column >= kv.columns - kv.lengths.repeat_interleave(shares, dim=1)[..., None]
        causal = column <= column[-block:, None]
        shown = logits.masked_fill(~(real[:, :, None] & causal), -torch.inf).softmax(-1)
        visible = real[:, :, None] & real[:, :, -block:, None]
        return torch.where(visible, shown, 7.0)

    def prompt(self) -> None:
        self._block(self.case.columns, torch.tensor(self.case.lengths))

    def block(self, tokens: int = 1) -> None:
        self._block(tokens, None)

    def _block(self, tokens: int, lengths: torch.Tensor | None) -> None:
        case, rows = self.case, len(self.case.lengths)
        for layer in range(case.layers):
            if lengths is None:
                newest = self.cache[layer].positions[:, :1, -1:] + 1 + torch.arange(tokens)
            else:
                newest = (torch.arange(tokens) - tokens + lengths[:, None]).clamp(min=0)[:, None]
            keys = self.stamp(layer, newest.expand(-1, case.kv_heads, -1))
            kv = self.cache.append(layer, keys, -keys, lengths)
            assert kv.keys.shape == (rows, case.kv_heads, kv.columns, HEAD_DIM)
            needed = self.cache.reads_attention
            self.cache.observe(layer, self.attention(layer, kv, tokens) if needed else None)
            self.slots_seen.append(self.cache.slots)

    def stamp(self, layer: int, positions: torch.Tensor) -> torch.Tensor:
        """``[B, kv_heads, n, HEAD_DIM]``: a number that names layer, row, head, token and column."""
        rows, heads = torch.arange(positions.shape[0]), torch.arange(positions.shape[1])
        name = ((layer * 11 + rows[:, None, None]) * 13 + heads[:, None]) * 101 + positions
        return (name[..., None] * HEAD_DIM + torch.arange(HEAD_DIM)).double()

    def kept(self) -> list[list[list[list[int]]]]:
        """Positions by layer, row and group."""
        return [
            [
                [row_positions[-length:].tolist() for row_positions, length in zip(*pair, strict=True)]
                for pair in zip(kv.positions, kv.lengths.tolist(), strict=True)
            ]
            for kv in (self.cache[layer] for layer in range(self.case.layers))
        ]

    def check_contents(self) -> None:
        """Keys and values are those of the tokens that the positions name."""
        for layer in range(self.case.layers):
            kv = self.cache[layer]
            positions = kv.positions.expand(-1, self.case.kv_heads, -1)
            real = (
                torch.arange(kv.columns) >= kv.columns - kv.lengths.expand(-1, self.case.kv_heads)[..., None]
            )
            expected = self.stamp(layer, positions)
            assert torch.equal(kv.keys[real], expected[real])
            assert torch.equal(kv.values[real], -expected[real])


def reference_of(driver: Driver) -> ReferenceCache:
    """The slow cache for a driver's case, before the prompt."""
    case, config = driver.case, driver.case.config
    sizes = config.sizes(case.layers, case.columns)
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
    if config.selection == 'hace':
        parameters['mix'] = mix if config.mix is None else config.mix
    else:
        rho = 1

    numbers = driver.logits.tolist()

    def attention(layer: int, row: int, head: int, query: int, keys: list[int]) -> list[float]:
        logits = numbers[layer][row][head][query]
        powers = [math.exp(logits[key]) for key in keys]
        total = sum(powers)
        return [power / total for power in powers]

    return ReferenceCache(
        layers=case.layers,
        heads=case.heads,
        groups=case.groups,
        lengths=list(case.lengths),
        **sizes._asdict(),
        allocation=allocation,
        selection=config.selection,
        decay=rho if config.rho is None else config.rho,
        parameters=parameters,
        attention=attention,
    )


def kept_by(slow: ReferenceCache) -> list[list[list[list[int]]]]:
    """Positions by layer, row and group."""
    return [[[group.positions for group in row] for row in layer] for layer in slow.groups]


def driver_of(case: Case) -> Driver:
    return Driver(case, cascade=case.config.allocator().cascades)


def compare(case: Case, blocks: tuple[int, ...] = (1, 1, 2)) -> Driver:
    """Run both caches over a prompt and blocks of new tokens; they must hold the same all the way."""
    driver = driver_of(case)
    slow = reference_of(driver)
    driver.prompt()
    slow.prompt()
    for tokens in (0, *blocks):
        if tokens:
            driver.block(tokens)
            slow.block(tokens)
        assert list(driver.cache.slots) == slow.slots()
        assert driver.kept() == kept_by(slow)
        driver.check_contents()
    return driver
