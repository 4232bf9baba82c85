"""What rounding does to layer budgets: three rules on the same random cascades.

    python studies/budget/rounding.py

A model of 2 to 12 layers with log-normal preferences; 8 to 200 tokens that may be evicted; a total of 5 to
90 % of them. Budgets are computed after each layer of a prompt, for the layers seen so far, at the same
total. Counted are problems in which an older budget rises at least once on the way, so that tokens are
missing that were dropped before, and in which something is wrong with the last budgets. CAKE's code cuts what
is over a cap when it evicts: the second column counts the rises that are left after that cut.

- CAKE's rule, written from reading its code: cut to whole numbers; what is over a cap is spread evenly over
  the layers below it, once, the remainder to the first; then what is missing from the total likewise.
- largest remainder (Hamilton), what is over a cap is handed out again.
- Webster's divisor rule, ``lzero_kv.budget.apportion``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console
from rich.table import Table

from lzero_kv.budget import Preference, apportion
from lzero_kv.budget.allocation import AttentionBased

Rule = Callable[[Sequence[float], int, int], Sequence[int]]
"""``rule(weights, total, cap)``: one budget for each weight."""


def spread(amount: int, budgets: list[int], open_layers: list[int]) -> None:
    """Add ``amount`` evenly to some layers, the remainder to the first of them."""
    if not open_layers or not amount:
        return
    each, rest = divmod(abs(amount), len(open_layers))
    sign = 1 if amount > 0 else -1
    for place, layer in enumerate(open_layers):
        budgets[layer] += sign * (each + (place < rest))


def cake(weights: Sequence[float], total: int, cap: int) -> list[int]:
    """The rule of CAKE."""
    shares = [int(weight / sum(weights) * total) for weight in weights]
    budgets = [min(share, cap) for share in shares]
    over = sum(shares) - sum(budgets)
    spread(over, budgets, [layer for layer, budget in enumerate(budgets) if budget < cap])
    missing = total - sum(budgets)
    allowed = (lambda budget: budget < cap) if missing > 0 else (lambda budget: budget > 1)
    spread(missing, budgets, [layer for layer, budget in enumerate(budgets) if allowed(budget)])
    return budgets


def largest_remainder(weights: Sequence[float], total: int, cap: int) -> list[int]:
    """Hamilton's rule within caps."""
    budgets, left = [0] * len(weights), min(total, cap * len(weights))
    while left:
        free = [layer for layer, budget in enumerate(budgets) if budget < cap]
        whole = sum(weights[layer] for layer in free)
        quotas = {layer: left * weights[layer] / whole for layer in free}
        shares = {layer: int(quota) for layer, quota in quotas.items()}
        first = sorted(free, key=lambda layer: (shares[layer] - quotas[layer], layer))
        for layer in first[: left - sum(shares.values())]:
            shares[layer] += 1
        for layer, share in shares.items():
            budgets[layer] = min(cap, budgets[layer] + share)
        left = min(total, cap * len(weights)) - sum(budgets)
    return budgets


def webster(weights: Sequence[float], total: int, cap: int) -> Sequence[int]:
    """The rule of ``lzero_kv.budget``."""
    return apportion(weights, total, [cap] * len(weights), minimum=1)


RULES: dict[str, Rule] = {"CAKE's": cake, 'largest remainder': largest_remainder, 'Webster': webster}


def judge(rule: Rule, prefixes: Sequence[Sequence[float]], total: int, cap: int) -> Counter[str]:
    """What is wrong with one cascade."""
    steps = [list(rule(weights, total, cap)) for weights in prefixes]
    final, more = steps[-1], rule(prefixes[-1], total + 1, cap)
    right = min(total, cap * len(final))
    older = [
        pair for before, after in pairwise(steps) for pair in zip(before, after[: len(before)], strict=True)
    ]
    return Counter(
        {
            'a layer over its cap': any(budget > cap for budget in final),
            'a layer with nothing': any(budget <= 0 for budget in final),
            'total missed': sum(min(budget, cap) for budget in final) != right,
            'one slot more lowers a layer': any(new < old for old, new in zip(final, more, strict=True)),
            'an older budget rises': any(new > old for old, new in older),
            'also below the cap': any(min(new, cap) > min(old, cap) for old, new in older),
        }
    )


def draw(source: random.Random) -> tuple[list[Preference], int, int]:
    """Preferences, total and cap of one random problem."""
    layers, context = source.randint(2, 12), source.randint(8, 200)
    spreads = source.uniform(0.2, 1.5)
    preferences = [Preference(source.lognormvariate(0, spreads), 1.0) for _ in range(layers)]
    return preferences, int(layers * context * source.uniform(0.05, 0.9)), context


def main() -> None:
    """Print one row for each rule, and one for Webster's with weights that are mixed with uniform ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--problems', type=int, default=5000)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    source = random.Random(options.seed)
    plain, mixed = (AttentionBased(alpha, 1.0, 1.0, 'normal') for alpha in (1.0, 0.5))
    found: dict[str, Counter[str]] = {name: Counter() for name in (*RULES, 'Webster, alpha=0.5')}
    for _ in range(options.problems):
        preferences, total, cap = draw(source)
        seen = [preferences[:layers] for layers in range(1, len(preferences) + 1)]
        exact = [plain.weights(len(preferences), part) for part in seen]
        for name, rule in RULES.items():
            weights = exact if rule is webster else [[float(one) for one in part] for part in exact]
            found[name] += judge(rule, weights, total, cap)
        blended = [mixed.weights(len(preferences), part) for part in seen]
        found['Webster, alpha=0.5'] += judge(webster, blended, total, cap)
    columns = list(dict.fromkeys(name for counter in found.values() for name in counter))
    table = Table('rule', *columns, title=f'{options.problems} random cascades, seed {options.seed}')
    for name, counter in found.items():
        table.add_row(name, *(f'{counter[column] / options.problems:.1%}' for column in columns))
    Console(width=150).print(table)


if __name__ == '__main__':
    main()
