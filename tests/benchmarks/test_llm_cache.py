"""The benchmark of language models' caches on a tiny model: every method, exact bytes, ratios to plain."""

from __future__ import annotations

import pytest
import torch
from llm_cache import METHODS, PLAIN, measured, ratio_to_plain, table

from lzero_kv.llm.experiment.methods import Method
from tests.llm.models import make


def test_rows_have_the_bytes_of_the_caches() -> None:
    budgets = {name: Method.parse(f'{name} window=8 0.25').budget() for name in METHODS}
    rows = measured(make('llama', torch.float32), budgets, length=120, decode=3, rounds=2)
    assert [row['method'] for row in rows] == [PLAIN, *METHODS]
    # keys and values of 3 layers with 2 heads of 8 numbers of 4 bytes
    assert (rows[0]['bytes'], rows[0]['kept'], rows[0]['peak']) == (2 * 3 * 120 * 2 * 8 * 4, 1.0, 1.0)
    assert rows[0]['prompt_ratio'] == rows[0]['token_ratio'] == 1.0
    for row in rows[1:]:
        # positions and scores are as large as a tenth of these small heads and more
        assert 0.25 < row['kept'] < 0.4
        # the last layer whole, beside the others: cut to their own slots, or together to the total
        assert 0.5 - 1e-9 < row['peak'] < 0.25 + 1 / 3 + 1e-9
        assert row['prompt_ratio'] > 0 < row['token_ratio']
    assert table(rows).row_count == len(rows)


def test_ratios_are_those_of_neighbours() -> None:
    times = {PLAIN: [1.0, 4.0, 2.0], 'cake': [2.0, 4.0, 6.0]}
    assert ratio_to_plain(times, 'cake') == pytest.approx(2.0)
