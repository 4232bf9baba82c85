"""A cache under a budget on a CUDA device keeps and answers what it keeps and answers on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lzero_kv.budget.attention import QueryAttention, at_least_float32
from lzero_kv.llm import BudgetCache, disable, enable
from testing.language_models import WINDOWS

from .models import batch, generate, make
from .test_cache import METHODS, budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


@pytest.mark.parametrize('family', WINDOWS)
@pytest.mark.parametrize('method', METHODS, ids=lambda method: '-'.join(map(str, method.values())))
def test_a_device_keeps_and_answers_what_a_cpu_does(family: str, method: dict[str, Any]) -> None:
    model, (ids, mask), found = make(family), batch(), []
    for device in ('cpu', 'cuda'):
        model = model.to(device)
        cache = BudgetCache(model.config, budget(method))
        logits = generate(model, ids.to(device), mask.to(device), cache)
        kept = [layer.positions.cpu() for layer in (cache[number] for number in range(len(cache)))]
        found.append((logits.cpu(), kept, cache.slots, cache.bytes, cache.peak_tokens))
    (logits, kept, *sizes), (expected, kept_there, *sizes_there) = found[1], found[0]
    assert sizes == sizes_there
    assert all(torch.equal(own, there) for own, there in zip(kept, kept_there, strict=True))
    # norms and rotary positions are float32 in every model of transformers
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize('family', WINDOWS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_covering_budget_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model, (ids, mask) = make(family, dtype).cuda(), (part.cuda() for part in batch())
    expected = generate(model, ids, mask, new=11)
    cache = BudgetCache(model.config, dict(tokens=80, window=4))
    assert torch.equal(generate(model, ids, mask, cache, new=11), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_beams(dtype: torch.dtype) -> None:
    model, (ids, mask) = make('llama', dtype).cuda(), (part.cuda() for part in batch())
    enable(model, dict(ratio=0.5, window=4))
    sampled = dict(attention_mask=mask, max_new_tokens=9)
    one = [model.generate(ids, num_beams=3, **sampled) for _ in range(2)]
    torch.manual_seed(5)
    assert model.generate(ids, do_sample=True, **sampled).shape == (3, ids.shape[1] + 9)
    disable(model)
    assert torch.equal(*one)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('decay', [1.0, 0.99])
def test_attention_summed_by_the_fused_kernel_is_that_of_the_probabilities(
    dtype: torch.dtype, decay: float
) -> None:
    """Sums of 700 queries, read again in float64. Rounding: the probabilities and sums are of ``dtype``."""
    torch.manual_seed(3)
    queries, keys = (torch.randn(2, heads, 700, 64, device='cuda').to(dtype) for heads in (6, 3))
    reading = QueryAttention(queries, at_least_float32(keys), None, None, None, 0, 64**-0.5)
    exact = dataclasses.replace(reading, queries=queries.double(), keys=keys.double())
    expected = exact.accumulated(3, decay, None)
    difference = (reading.accumulated(3, decay, None) - expected).abs() / expected
    assert reading._has_fused_kernel and not exact._has_fused_kernel
    assert float(difference.max()) < (0.02 if dtype == torch.bfloat16 else 0.003)
