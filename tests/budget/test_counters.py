"""What was dropped, against a sum by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lzero_kv.budget import BudgetCounters, Tokens, select


@given(
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=4),
    slots=st.integers(3, 11),
    groups=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_counts_and_mass_are_those_of_the_dropped_tokens(
    lengths: list[int], slots: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, heads, columns = len(lengths), 6, 11
    held = torch.tensor(lengths)[:, None].expand(-1, groups)
    tokens = Tokens.of_prompt(held, columns, window=1, sinks=1)
    newest = torch.rand(rows, heads, columns, generator=generator)
    kept = select(torch.rand(rows, groups, columns, generator=generator), tokens, slots)
    counters = BudgetCounters(2)
    for _ in range(2):
        counters.dropped(1, tokens, kept, newest)
    dropped, mass, counted = 0.0, 0.0, 0
    for row, length in enumerate(lengths):
        of_groups = []
        for group in range(groups):
            stays = set(kept.indices[row, group, -int(kept.lengths[row, group]) :].tolist())
            gone = [column for column in range(columns - length, columns) if column not in stays]
            shares = newest[row, group * (heads // groups) : (group + 1) * (heads // groups)].mean(0)
            of_groups.append((len(gone), sum(float(shares[column]) for column in gone)))
        dropped += sum(count for count, _ in of_groups) / groups
        mass += sum(lost for _, lost in of_groups) / groups
        counted += any(count for count, _ in of_groups)
    nothing, loss = counters.losses()
    assert nothing == (0, 0, 0.0) and nothing.lost_mass is None
    assert loss.dropped_tokens == round(2 * dropped) and loss.rows == 2 * counted
    assert loss.mass == pytest.approx(2 * mass, abs=1e-5)
    assert (loss.lost_mass is None) == (counted == 0)


def test_without_attention_tokens_alone_are_counted() -> None:
    tokens = Tokens.of_prompt(torch.tensor([[7], [2]]), 7, window=1)
    kept = select(torch.arange(7.0).expand(2, 1, 7), tokens, 4)
    counters = BudgetCounters(1)
    counters.dropped(0, tokens, kept, None)
    assert counters.losses() == ((3, 0, 0.0),)
