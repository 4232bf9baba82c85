"""Check layer budgets under transformers in seconds: `python tools/quick_cake_test.py [--skip-model]`.

Five checks on tiny random models of the three families, then the same on a small real model (`--model`,
SmolLM2 by default; its weights are converted once, which takes a minute). `--skip-model` leaves the real one
out and needs no weights.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Several threads on few cores wait for each other. It has to be set before torch is imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from lzero_kv.cli.console import show_error, show_line
from lzero_kv.llm.families import FAMILIES
from testing.language_models import tiny_model

RATIO = 0.25
BUDGET = dict(ratio=RATIO, window=8)
TOKENS, SHORT, NEW = 96, 61, 5
TOLERANCE = 1e-4


def prompt(model: Any, rows: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    """Random tokens, int64 ``[rows, tokens]``; 0 is padding."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator)


def generated(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """Greedy tokens with the logits of each."""
    options = {'attention_mask': torch.ones_like(ids), **options}
    return model.generate(
        ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, **options,
    )  # fmt: skip


def budgeted(model: Any, **budget: Any) -> Any:
    """The cache of a prompt that was read under a budget."""
    from lzero_kv.llm import BudgetCache

    cache = BudgetCache(model.config, {**BUDGET, **budget})
    model(prompt(model), past_key_values=cache, use_cache=True)
    return cache


def held_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(cache[layer].keys.nbytes + cache[layer].values.nbytes for layer in range(len(cache)))


def covering_budget_changes_no_bit(model: Any) -> bool:
    """Logits and greedy tokens of ratio 1 are those of transformers' own sdpa."""
    from lzero_kv.llm import BudgetCache

    ids = prompt(model, rows=2)
    stock = generated(model, ids)
    covering = generated(model, ids, past_key_values=BudgetCache(model.config, dict(ratio=1.0)))
    same = [torch.equal(one, other) for one, other in zip(stock.logits, covering.logits, strict=True)]
    return torch.equal(stock.sequences, covering.sequences) and all(same)


def bytes_are_the_ratio(model: Any) -> bool:
    """Keys and values take the ratio's part of the full cache's bytes, to the token, for each algorithm."""
    full = held_bytes(budgeted(model, ratio=1.0))
    return all(
        held_bytes(budgeted(model, selection=selection)) == RATIO * full
        for selection in ('cake', 'h2o', 'hace', 'snapkv', 'streaming')
    )


def peak_is_total_and_a_layer(model: Any) -> bool:
    """While the prompt is read, no more than the total and one full layer are held."""
    cache = budgeted(model)
    return 0 < cache.peak_tokens <= sum(cache.slots[0]) + TOKENS


def padded_row_is_the_row_alone(model: Any) -> bool:
    """A batch of two lengths, padded on the left, gives each row what it gets alone."""
    from lzero_kv.llm import BudgetCache

    long, short = prompt(model), prompt(model, tokens=SHORT)
    batch = torch.zeros(2, TOKENS, dtype=torch.int64)
    batch[0], batch[1, TOKENS - SHORT :] = long[0], short[0]
    mask = (batch > 0).long()
    together = generated(model, batch, attention_mask=mask, past_key_values=BudgetCache(model.config, BUDGET))
    for row, alone in enumerate((long, short)):
        single = generated(model, alone, past_key_values=BudgetCache(model.config, BUDGET))
        for one, other in zip(single.logits, together.logits, strict=True):
            if not torch.allclose(one[0], other[row], atol=TOLERANCE, rtol=TOLERANCE):
                return False
    return True


def switch_leaves_the_model(model: Any) -> bool:
    """enable changes what is generated, disable leaves model and configuration as they were."""
    from lzero_kv.llm import disable, enable

    ids, config = prompt(model), copy.deepcopy(model.config.to_dict())
    before = generated(model, ids).logits
    enable(model, BUDGET)
    under = generated(model, ids).logits
    disable(model)
    after = generated(model, ids).logits
    changed = not torch.equal(torch.stack(under), torch.stack(before))
    whole = model.config.to_dict() == config and not model.base_model._forward_pre_hooks
    return changed and whole and torch.equal(torch.stack(after), torch.stack(before))


CHECKS: Sequence[tuple[str, Callable[[Any], bool]]] = (
    ('a budget that covers the context changes no bit of sdpa', covering_budget_changes_no_bit),
    (f'keys and values take exactly {RATIO:g} of the bytes', bytes_are_the_ratio),
    ('the peak of a prompt is at most the total and one layer', peak_is_total_and_a_layer),
    ('a padded row gets what it gets alone', padded_row_is_the_row_alone),
    ('enable and disable leave the model as it was', switch_leaves_the_model),
)


@torch.no_grad()
def run_checks(models: dict[str, Any]) -> int:
    """Print a line for each check; the number of those that hold for every model."""
    held = 0
    for text, check in CHECKS:
        wrong = [name for name, model in models.items() if not check(model)]
        held += not wrong
        show_line(f'{"FAILED" if wrong else "ok":<7}{text} ({", ".join(wrong or models)})')
    return held


def quick_cake_test(skip_model: bool = False, model: str = 'smollm2') -> int:
    """Check layer budgets on tiny random models, and on a real one.

    Args:
        skip_model: leave the real model out: no weights are needed.
        model: the real model: smollm2, a folder or a name of the hub.

    Returns:
        0 when all checks hold, else 1.
    """
    from lzero_kv.llm.experiment.experiment import quiet_transformers

    quiet_transformers()
    begun, groups = time.monotonic(), [{family: tiny_model(family) for family in FAMILIES}]
    if not skip_model:
        from lzero_kv.llm.experiment.models import load

        try:
            groups.append({model: load(model)[0]})
        except (ImportError, OSError, ValueError) as error:
            show_error(f'{error}\n--skip-model checks tiny models alone')
            return 1
    held, asked = sum(map(run_checks, groups)), len(CHECKS) * len(groups)
    show_line(f'{time.monotonic() - begun:.0f} s')
    show_line(f'{held}/{asked}')
    return 0 if held == asked else 1


if __name__ == '__main__':
    sys.exit(tyro.cli(quick_cake_test))
