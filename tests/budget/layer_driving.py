"""A layer and the slow cache, changed alike and compared token by token."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from lzero_kv.budget import AttentionRecord, LayerCache

from .methods import config_of
from .reference_cache import Group, Token

KV_HEADS, HEADS, HEAD_DIM, WINDOW, SINKS = 2, 6, 5, 4, 2


class Pair:
    """A layer and its reference.

    Arguments:
        names: of the rows; keys, values and attention depend on them.
        lengths: tokens of the prompt of each row.
    """

    def __init__(
        self, names: list[int], lengths: list[int], *, selection: dict[str, Any], groups: int, step: int
    ) -> None:
        self.selector = config_of(selection, ratio=1.0).selector()
        self.names, self.step, decay = names, step, self.selector.decay
        self.selection = selection['selection']
        self.parameters = {name: selection[name] for name in ('gamma', 'kernel', 'mix') if name in selection}
        self.slow = [[Group(HEADS // groups) for _ in range(groups)] for _ in names]
        record = AttentionRecord(groups, WINDOW, decay, {'accumulated', 'recent'})
        columns = max(lengths)
        position = torch.arange(columns) - columns + torch.tensor(lengths)[:, None]
        both = torch.stack([self.stamp(position), -self.stamp(position)], dim=1)
        self.fast = LayerCache.of_prompt(
            both[:, 0], both[:, 1], torch.tensor(lengths), record, sinks=SINKS, step=step
        )
        for row, length in enumerate(lengths):
            self.see(row, list(range(length)))
        self.fast.observe(self.probabilities(columns))

    def see(self, row: int, positions: list[int]) -> None:
        """New tokens of a row of the reference, each an observation of its own."""
        for number, group in enumerate(self.slow[row]):
            group.tokens += [Token(position) for position in positions]
            first = number * group.share

            def attention(head: int, query: int, keys: list[int], first: int = first) -> list[float]:
                return self.attention(row, first + head, query, keys)

            group.see(positions, attention, self.selector.decay)
            group.recent = group.recent[-WINDOW:]

    def attention(self, row: int, head: int, query: int, keys: list[int]) -> list[float]:
        """One number for each key."""
        name = self.names[row]
        powers = [math.exp(2 * math.sin(7 * name + 3 * head + 1.7 * query + key * key)) for key in keys]
        return [power / sum(powers) for power in powers]

    def stamp(self, positions: torch.Tensor) -> torch.Tensor:
        """``[B, KV_HEADS, n, HEAD_DIM]`` for positions ``[B, n]``: numbers that name row, head, token."""
        rows, heads = torch.tensor(self.names)[:, None, None], torch.arange(KV_HEADS)[:, None]
        name = (rows * 13 + heads) * 101 + positions[:, None]
        return (name[..., None] * HEAD_DIM + torch.arange(HEAD_DIM)).double()

    def probabilities(self, block: int, columns: int | None = None) -> torch.Tensor:
        """``[B, HEADS, block, columns]`` of the tokens in the last of ``columns``; 7 for padding."""
        positions, total = self.fast.positions, self.fast.columns
        columns = total if columns is None else columns
        shown = torch.full((len(self.names), HEADS, block, columns), 7.0, dtype=torch.float64)
        share = HEADS // positions.shape[1]
        for row in range(len(self.names)):
            for head in range(HEADS):
                first = total - int(self.fast.lengths[row, head // share])
                held = positions[row, head // share].tolist()
                for column in range(max(first, columns - block), columns):
                    values = self.attention(row, head, held[column], held[first : column + 1])
                    shown[row, head, column - columns, first:] = 0
                    shown[row, head, column - columns, first : column + 1] = torch.tensor(
                        values, dtype=torch.float64
                    )
        return shown

    def append(self, block: int) -> None:
        """Tokens behind the newest, observed together."""
        positions = self.fast.positions[:, 0, -1:] + 1 + torch.arange(block)
        self.fast.append(self.stamp(positions), -self.stamp(positions))
        for row, own in enumerate(positions.tolist()):
            self.see(row, own)
        self.fast.observe(self.probabilities(block))

    def append_step(self, begins: int) -> None:
        """Two tokens in columns that are there before the tokens are, each observed by itself; rows that are
        empty get the second one alone, at position ``begins``."""
        empty = self.fast.lengths[:, 0] == 0
        newest = torch.where(empty, begins - 2, self.fast.positions[:, 0, -1])
        positions, rows = newest[:, None] + torch.tensor([1, 2]), len(self.names)
        room = torch.zeros(rows, KV_HEADS, 2, HEAD_DIM, dtype=torch.float64)
        self.fast.append(room, room.clone(), positions, 2 - empty.long())
        for token in range(2):
            at = self.fast.columns - 2 + token
            self.fast.keys[:, :, at] = self.stamp(positions)[:, :, token]
            self.fast.values[:, :, at] = -self.stamp(positions)[:, :, token]
            for row in range(rows):
                if token or not empty[row]:
                    self.see(row, [int(positions[row, token])])
            self.fast.observe(self.probabilities(1, at + 1))

    def shrink(self, slots: int) -> None:
        self.fast.shrink(slots, self.selector)
        for groups in self.slow:
            for group in groups:
                scored = group.scores(self.selection, self.parameters, WINDOW, SINKS, self.step)
                group.shrink(scored, slots, self.step)

    def select_rows(self, rows: list[int]) -> None:
        self.fast.select_rows(torch.tensor(rows))
        self.names = [self.names[row] for row in rows]
        self.slow = [copy.deepcopy(self.slow[row]) for row in rows]

    def put_rows(self, rows: list[int], other: Pair) -> None:
        self.fast.put_rows(torch.tensor(rows), other.fast)
        for row, name, held in zip(rows, other.names, other.slow, strict=True):
            self.names[row], self.slow[row] = name, copy.deepcopy(held)

    def check(self) -> None:
        """Tokens, positions, keys, values and record agree."""
        fast, share = self.fast, HEADS // self.fast.positions.shape[1]
        for row, groups in enumerate(self.slow):
            for number, group in enumerate(groups):
                count = len(group.tokens)
                assert int(fast.lengths[row, number]) == count
                real = slice(fast.columns - count, None)
                assert fast.positions[row, number, real].tolist() == group.positions
                expected = self.stamp(fast.positions[:, number])[row][:, real]
                own = KV_HEADS // len(groups)
                for head in range(number * own, (number + 1) * own):
                    assert torch.equal(fast.keys[row, head, real], expected[head])
                    assert torch.equal(fast.values[row, head, real], -expected[head])
                accumulated = [token.accumulated for token in group.tokens]
                got = fast.record.accumulated[row, number, real].tolist()
                assert got == pytest.approx(accumulated, rel=1e-9)
                heads = torch.tensor(group.matrices(), dtype=torch.float64)
                queries = int(fast.record.queries[row, number])
                assert queries == len(group.recent)
                recent = fast.record.recent[
                    row, number * share : (number + 1) * share, WINDOW - queries :, real
                ]
                torch.testing.assert_close(recent, heads.reshape(share, queries, count))


def check_layer(selection: dict[str, Any] | None = None, groups: int = KV_HEADS, step: int = 1) -> None:
    """Everything that a layer can do, in an order in which every part meets every other."""
    common: dict[str, Any] = dict(
        selection=selection or dict(selection='hace', mix=0.4, kernel=3, gamma=2.0), groups=groups, step=step
    )
    pair, other = Pair([3, 1, 4], [13, 9, 0], **common), Pair([5, 9], [6, 11], **common)
    pair.append_step(begins=8)
    pair.check()
    for one, slots in ((pair, 10), (other, 8)):
        one.shrink(slots)
        one.check()
    other.fast.pad(10)
    pair.put_rows([2, 0], other)
    pair.check()
    pair.append(3)
    pair.select_rows([2, 0, 0, 1])
    pair.check()
    pair.shrink(8)
    pair.fast.pad(12)
    pair.append(1)
    pair.check()
    pair.shrink(9)
    pair.check()
