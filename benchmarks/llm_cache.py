"""What a layer budget costs a language model: processor time of prompt and generated tokens, and bytes.

    python benchmarks/llm_cache.py --lengths 1024 2048 4096

Each method beside transformers' own full cache (plain), one thread, random tokens: a round reads the prompt
with every cache, then one token after another with every cache in turn. Ratios are those of neighbours in
time; medians are over rounds (prompt) and tokens (generated). One table, and one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from lzero_kv.llm import BudgetCache
from lzero_kv.llm.experiment.methods import Method
from lzero_kv.llm.experiment.models import SMOLLM2, load
from lzero_kv.llm.families import cache_argument

PLAIN = 'plain'
METHODS = ('streaming uniform', 'snapkv uniform', 'cake', 'h2o uniform', 'hace')
COLUMNS = ('tokens', 'method', 'prompt s', 'x plain', 'token ms', 'x plain', 'kept %', 'peak %')
Row = dict[str, Any]


def main(
    lengths: tuple[int, ...] = (1024, 2048, 4096),
    decode: int = 32,
    rounds: int = 3,
    ratio: float = 0.25,
    model: str = SMOLLM2,
) -> int:
    """Measure and print.

    Args:
        lengths: tokens of the prompts.
        decode: tokens read one by one behind each prompt.
        rounds: of each length.
        ratio: slots as a part of the tokens.
        model: a name or a folder.
    """
    torch.set_num_threads(1)
    lm, _ = load(model)
    budgets = {f'{name} {ratio:g}': Method.parse(f'{name} {ratio}').budget() for name in METHODS}
    rows = [row for length in lengths for row in measured(lm, budgets, length, decode, rounds)]
    Console(width=110).print(table(rows))
    print(json.dumps(dict(model=model, decode=decode, rounds=rounds, torch=torch.__version__, rows=rows)))
    return 0


def measured(lm: Any, budgets: dict[str, Any], length: int, decode: int, rounds: int) -> list[Row]:
    """A row for each method at one length."""
    names = [PLAIN, *budgets]
    ids = torch.randint(3, lm.config.vocab_size, (1, length + decode), generator=torch.manual_seed(length))
    prompt, token, caches = {name: [] for name in names}, {name: [] for name in names}, {}
    held: dict[str, tuple[int, int]] = {}
    for _ in range(rounds):
        for name in names:
            config = lm.config
            caches[name] = (
                DynamicCache(config=config) if name == PLAIN else BudgetCache(config, budgets[name])
            )
            prompt[name].append(seconds(lambda name=name: read(lm, caches[name], ids[:, :length])))
            held[name] = held_bytes(caches[name])
        for at in range(length, length + decode):
            for name in names:
                step = seconds(lambda name=name, at=at: read(lm, caches[name], ids[:, at : at + 1]))
                token[name].append(step)
    full = held[PLAIN][0]
    return [
        dict(
            tokens=length, method=name,
            prompt_s=statistics.median(prompt[name]), prompt_ratio=ratio_to_plain(prompt, name),
            token_s=statistics.median(token[name]), token_ratio=ratio_to_plain(token, name),
            bytes=held[name][0], kept=held[name][0] / full, peak=held[name][1] / full,
        )
        for name in names
    ]  # fmt: skip


@torch.no_grad()
def read(lm: Any, cache: Any, ids: torch.Tensor) -> None:
    """Add a block to a cache."""
    lm(ids, use_cache=True, logits_to_keep=1, **{cache_argument(type(lm)): cache})


def seconds(call: Callable[[], None]) -> float:
    """Processor seconds of a call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def ratio_to_plain(times: dict[str, list[float]], name: str) -> float:
    """Median of the ratios to plain, measured next to it."""
    return statistics.median(own / plain for own, plain in zip(times[name], times[PLAIN], strict=True))


def held_bytes(cache: Any) -> tuple[int, int]:
    """Bytes behind the prompt with the record of the attention, and of most keys and values at once."""
    if not isinstance(cache, BudgetCache):
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return size, size
    of_token = cache[0].keys[:, :, :1].nbytes + cache[0].values[:, :, :1].nbytes
    return cache.bytes, cache.peak_tokens * of_token


def table(rows: list[Row]) -> Table:
    """One row for each length and method."""
    shown = Table(*COLUMNS, title='processor time, one thread; bytes as parts of the full cache')
    for row in rows:
        times = (f'{row["prompt_s"]:.2f}', f'{row["prompt_ratio"]:.2f}')
        steps = (f'{1e3 * row["token_s"]:.1f}', f'{row["token_ratio"]:.2f}')
        parts = (f'{100 * row["kept"]:.1f}', f'{100 * row["peak"]:.1f}')
        end = row['method'] == rows[-1]['method']
        shown.add_row(f'{row["tokens"]:,}', row['method'], *times, *steps, *parts, end_section=end)
    return shown


if __name__ == '__main__':
    sys.exit(tyro.cli(main))
