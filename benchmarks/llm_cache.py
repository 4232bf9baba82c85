"""What a layer budget costs a language model: time of prompt and generated tokens, and bytes.

    python benchmarks/llm_cache.py --lengths 1024 2048 4096
    python benchmarks/llm_cache.py --device cuda --dtype bfloat16 --model llama-8b --lengths 8192 32768

Each method beside transformers' own full cache (plain), random tokens: a round reads the prompt with every
cache, then one token after another with every cache in turn. Ratios are those of neighbours in time; medians
are over rounds (prompt) and tokens (generated). Times are processor time of one thread, on a GPU wall-clock
time until its work is done. One table, and one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

os.environ['OMP_NUM_THREADS'] = '1'
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from lzero_kv.llm import BudgetCache
from lzero_kv.llm.experiment.methods import Method
from lzero_kv.llm.experiment.models import SMOLLM2, load
from lzero_kv.llm.families import cache_argument

PLAIN = 'plain'
LLAMA = dict(
    vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    rope_theta=5e5,
)  # fmt: skip
RANDOM: dict[str, dict[str, Any]] = {
    'llama-8b': LLAMA | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
    'llama-1b': LLAMA | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
}
"""Sizes of Llama 3.1 and 3.2, with random weights: what a token costs does not depend on them."""
METHODS = ('streaming uniform', 'snapkv uniform', 'cake', 'h2o uniform', 'hace')
COLUMNS = ('tokens', 'method', 'prompt s', 'x plain', 'token ms', 'x plain', 'kept %', 'peak %', 'GPU MiB')
Row = dict[str, Any]


def main(
    lengths: tuple[int, ...] = (1024, 2048, 4096),
    decode: int = 32,
    rounds: int = 3,
    ratio: float = 0.25,
    model: str = SMOLLM2,
    device: Literal['cpu', 'cuda'] = 'cpu',
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32',
) -> int:
    """Measure and print.

    Args:
        lengths: tokens of the prompts.
        decode: tokens read one by one behind each prompt.
        rounds: of each length.
        ratio: slots as a part of the tokens.
        model: a name or a folder; 'llama-8b' and 'llama-1b' are random weights of those sizes.
        device: where the model computes.
        dtype: of its weights, and of keys and values.
    """
    torch.set_num_threads(1)
    lm = random_model(model, dtype, device) if model in RANDOM else load(model, dtype, device=device)[0]
    budgets = {f'{name} {ratio:g}': Method.parse(f'{name} {ratio}').budget() for name in METHODS}
    rows = [row for length in lengths for row in measured(lm, budgets, length, decode, rounds)]
    Console(width=110).print(table(rows))
    where = torch.cuda.get_device_name() if device == 'cuda' else 'processor'
    about = dict(model=model, dtype=dtype, device=where, torch=torch.__version__)
    print(json.dumps(about | dict(decode=decode, rounds=rounds, rows=rows)))
    return 0


def random_model(name: str, dtype: str, device: str) -> Any:
    """A model of :data:`RANDOM`."""
    config = AutoConfig.for_model('llama', **RANDOM[name])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation='sdpa'
        )
    return model.eval()


def measured(lm: Any, budgets: dict[str, Any], length: int, decode: int, rounds: int) -> list[Row]:
    """A row for each method at one length."""
    names = [PLAIN, *budgets]
    ids = torch.randint(3, lm.config.vocab_size, (1, length + decode), generator=torch.manual_seed(length))
    ids = ids.to(lm.device)
    prompt, token, caches = {name: [] for name in names}, {name: [] for name in names}, {}
    held: dict[str, tuple[int, int]] = {}
    memory: dict[str, int] = {}
    for _ in range(rounds):
        for name in names:
            config = lm.config
            caches.pop(name, None)
            before = begin_memory()
            caches[name] = (
                DynamicCache(config=config) if name == PLAIN else BudgetCache(config, budgets[name])
            )
            prompt[name].append(seconds(lambda name=name: read(lm, caches[name], ids[:, :length])))
            memory[name] = most_memory() - before
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
            gpu_bytes=memory[name],
        )
        for name in names
    ]  # fmt: skip


@torch.no_grad()
def read(lm: Any, cache: Any, ids: torch.Tensor) -> None:
    """Add a block to a cache."""
    lm(ids, use_cache=True, logits_to_keep=1, **{cache_argument(type(lm)): cache})


def begin_memory() -> int:
    """Bytes that a GPU's tensors take; from here on the most is remembered."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def most_memory() -> int:
    """Most bytes that a GPU's tensors took since :func:`begin_memory`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def seconds(call: Callable[[], None]) -> float:
    """Processor seconds of a call; on a GPU wall-clock seconds until its work is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - begun
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
    shown = Table(*COLUMNS, title='bytes as parts of the full cache; GPU MiB: most while the prompt is read')
    for row in rows:
        times = (f'{row["prompt_s"]:.2f}', f'{row["prompt_ratio"]:.2f}')
        steps = (f'{1e3 * row["token_s"]:.1f}', f'{row["token_ratio"]:.2f}')
        parts = (f'{100 * row["kept"]:.1f}', f'{100 * row["peak"]:.1f}', f'{row["gpu_bytes"] / 2**20:.0f}')
        end = row['method'] == rows[-1]['method']
        shown.add_row(f'{row["tokens"]:,}', row['method'], *times, *steps, *parts, end_section=end)
    return shown


if __name__ == '__main__':
    sys.exit(tyro.cli(main))
