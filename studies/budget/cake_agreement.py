"""Where ``lzero_kv.budget`` agrees with the code of CAKE, and how often it does not.

    git clone https://github.com/antgroup/cakekv
    python studies/budget/cake_agreement.py cakekv

Needs the transformers library that CAKE's code names (4.46) beside this project's own packages. Nothing of
CAKE is part of this project. Random prompts in float64: each layer's attention is a softmax of random logits.

Compared with CAKE's own functions: the dispersion (``calculate_entropy``), the tokens that a prompt keeps
(``CakeprefillKVCache.evcit_layer_kvcache``), budgets (``adjust_budgets``), and what stays while decoding
(``CakeDecodingKVCache_LayerWise``). Its score and shift stand in the middle of an attention function: they
are computed here with the torch calls that are used there (``mean``, ``var``, ``avg_pool1d``, sums).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich.console import Console
from rich.table import Table

from lzero_kv.budget import AttentionRecord, Tokens, apportion, layer_preference, select
from lzero_kv.budget.selection import Cake

ROWS, HEADS, KV_HEADS, HEAD_DIM, WINDOW, GAMMA = 2, 6, 3, 5, 8, 200.0
GROUP = HEADS // KV_HEADS


def attention_of(generator: torch.Generator, columns: int) -> torch.Tensor:
    """``[ROWS, HEADS, WINDOW, columns]``: what the last queries of a prompt attend to."""
    logits = 2 * torch.randn(ROWS, HEADS, WINDOW, columns, generator=generator, dtype=torch.float64)
    column = torch.arange(columns)
    return logits.masked_fill(column > column[-WINDOW:, None], -torch.inf).softmax(-1)


def stamped(columns: int) -> torch.Tensor:
    """``[ROWS, KV_HEADS, columns, HEAD_DIM]``: keys that name their column."""
    return (
        torch.arange(columns, dtype=torch.float64)[:, None].expand(ROWS, KV_HEADS, columns, HEAD_DIM).clone()
    )


def cake_scores(attention: torch.Tensor) -> torch.Tensor:
    """CAKE's score of the tokens in front of the window, ``[ROWS, KV_HEADS, columns - WINDOW]``."""
    value = (attention.mean(-2) + GAMMA * attention.var(-2))[..., :-WINDOW]
    pooled = torch.nn.functional.avg_pool1d(value, 5, stride=1, padding=2)
    return pooled.reshape(ROWS, KV_HEADS, GROUP, -1).mean(2)


class Comparison:
    """Largest differences and counts of disagreement."""

    def __init__(self, cake: Any, seed: int) -> None:
        self.cake = cake
        self.generator = torch.Generator().manual_seed(seed)
        self.largest = dict.fromkeys(('dispersion', 'shift', 'score'), 0.0)
        self.kept_sets = self.kept_same = self.ordered = 0
        self.budgets = self.valid = self.same = self.near = 0
        self.decoded = 0
        self.decoded_same = dict.fromkeys(('by position', 'in another order'), 0)

    def prompt(self, columns: int, budget: int) -> None:
        """One layer of one prompt: dispersion, shift, scores, and the kept tokens."""
        attention = attention_of(self.generator, columns)
        lengths = torch.full((ROWS,), columns)
        ours = layer_preference(attention, lengths, window=WINDOW)
        evictable = attention[..., :-WINDOW]
        # theirs are sums over the rows, in float32 and with 1e-10 in the logarithm
        theirs = float(self.cake.calculate_entropy(evictable)) / ROWS, float(evictable.var(-2).sum()) / ROWS
        for name, mine, other in zip(('dispersion', 'shift'), ours, theirs, strict=True):
            self.largest[name] = max(self.largest[name], abs(mine / other - 1))
        tokens = Tokens.of_prompt(lengths[:, None].expand(-1, KV_HEADS), columns, window=WINDOW)
        record = AttentionRecord(KV_HEADS, WINDOW, 1.0, {'recent'})
        record.observe(attention, tokens.lengths)
        scores = Cake(GAMMA, 5).scores(record, tokens)
        reference = cake_scores(attention)
        difference = (scores[..., :-WINDOW] / reference - 1).abs().max()
        self.largest['score'] = max(self.largest['score'], float(difference))
        kept = select(scores, tokens, budget + WINDOW).indices
        cache = SimpleNamespace(
            key_cache=[stamped(columns)], value_cache=[stamped(columns)], evict_scores=[reference]
        )
        prefill = self.cake.CakeprefillKVCache(budget + WINDOW, WINDOW, num_heads=HEADS, num_layers=1)
        columns_kept = prefill.evcit_layer_kvcache(cache, 0, budget).key_cache[0][..., 0].long()
        self.kept_sets += kept[..., 0].numel()
        self.kept_same += int((columns_kept.sort(-1).values == kept).all(-1).sum())
        self.ordered += int((columns_kept.diff(dim=-1) > 0).all(-1).sum())

    def rounding(self, layers: int, cap: int, share: float) -> None:
        """Budgets of one model."""
        weights = torch.rand(layers, generator=self.generator, dtype=torch.float64).add(0.05).square()
        total = max(layers, int(layers * cap * share))
        exact = [float(weight) for weight in weights]
        theirs = self.cake.adjust_budgets(
            [weight / sum(exact) * total for weight in exact], total, cap, layers
        )
        ours = apportion(exact, total, [cap] * layers, minimum=1)
        self.budgets += 1
        if sum(theirs) == total and all(0 < budget <= cap for budget in theirs):
            self.valid += 1
            self.same += list(ours) == theirs
            self.near += all(abs(mine - other) <= 1 for mine, other in zip(ours, theirs, strict=True))

    def decode(self, columns: int, budget: int) -> None:
        """One eviction while decoding, from a cache that holds the same tokens by position, and in another
        order as CAKE's prefill leaves them; attention follows the tokens."""
        attention = attention_of(self.generator, columns)
        lengths = torch.full((ROWS, KV_HEADS), columns)
        tokens = Tokens.of_prompt(lengths, columns, window=WINDOW)
        record = AttentionRecord(KV_HEADS, WINDOW, 1.0, {'recent'})
        record.observe(attention, lengths)
        ours = select(Cake(0.0, 5).scores(record, tokens), tokens, budget + WINDOW).indices
        self.decoded += ours[..., 0].numel()
        newest = torch.arange(columns - WINDOW, columns)
        orders = {
            'by position': torch.arange(columns - WINDOW),
            'in another order': torch.randperm(columns - WINDOW, generator=self.generator),
        }
        for name, order in orders.items():
            places = torch.cat([order, newest])
            keys = stamped(columns)[:, :, places]
            cache = SimpleNamespace(key_cache=[keys], value_cache=[keys.clone()])
            step = self.cake.CakeDecodingKVCache_LayerWise(budget, WINDOW)
            theirs = step(cache, attention[..., places], 0).key_cache[0][..., 0].long().sort(-1).values
            self.decoded_same[name] += int((theirs == ours).all(-1).sum())


def main() -> None:
    """Print what agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('cake', type=Path, help='a checkout of github.com/antgroup/cakekv')
    parser.add_argument('--prompts', type=int, default=500)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, str(options.cake.resolve()))
    from cake import cake_cache, utils

    found = Comparison(SimpleNamespace(**vars(utils) | vars(cake_cache)), options.seed)
    source = torch.Generator().manual_seed(options.seed + 1)
    for _ in range(options.prompts):
        columns, budget = (int(torch.randint(*ends, (), generator=source)) for ends in ((40, 200), (5, 30)))
        found.prompt(columns, budget)
        found.decode(columns, budget)
        for _ in range(10):
            layers, cap = (int(torch.randint(*ends, (), generator=source)) for ends in ((2, 33), (8, 200)))
            found.rounding(layers, cap, 0.05 + 0.85 * float(torch.rand((), generator=source)))
    table = Table('what', 'agreement')
    for name, value in found.largest.items():
        table.add_row(f'{name}, largest relative difference', f'{value:.1e}')
    table.add_row('kept tokens of a prompt, the same set', f'{found.kept_same} of {found.kept_sets}')
    table.add_row('... in the order of positions with CAKE', f'{found.ordered} of {found.kept_sets}')
    table.add_row('budgets that are valid with CAKE', f'{found.valid} of {found.budgets}')
    table.add_row('... equal to ours', f'{found.same} of {found.valid}')
    table.add_row('... within 1 of ours in every layer', f'{found.near} of {found.valid}')
    for name, same in found.decoded_same.items():
        table.add_row(f'kept while decoding, tokens {name}, the same set', f'{same} of {found.decoded}')
    Console(width=110).print(table)


if __name__ == '__main__':
    main()
