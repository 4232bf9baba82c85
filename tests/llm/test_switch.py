"""``enable`` and ``disable``: a model under a budget, what is refused, and what is left behind."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

from lzero_kv.llm import BudgetCache, disable, enable

from .models import batch, cache_name, generate, make

BUDGET: dict[str, Any] = dict(ratio=0.5, window=4, selection='hace')


def test_an_enabled_model_gives_every_prompt_its_own_cache():
    model, (ids, mask) = make('qwen2-mixed'), batch()
    expected = generate(model, ids, mask, BudgetCache(model.config, BUDGET))
    stock = generate(model, ids, mask)
    assert not torch.equal(stock, expected)
    assert enable(model, BUDGET) is model
    for _ in range(2):
        assert torch.equal(generate(model, ids, mask), expected)
    assert disable(model) is model
    assert torch.equal(generate(model, ids, mask), stock)


def test_nothing_is_left_on_a_model():
    model, (ids, mask) = make('llama'), batch()
    config, attributes = (
        copy.deepcopy(model.config.to_dict()),
        {name: set(vars(part)) for name, part in model.named_modules()},
    )
    enable(model, BUDGET)
    generate(model, ids, mask)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == 'sdpa'
    assert {name: set(vars(part)) for name, part in model.named_modules()} == attributes
    disable(model)
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_pre_hooks_with_kwargs
    disable(model)


class Adapter(torch.nn.Module):
    """What peft wraps a model in: names that it lacks are the model's, so ``base_model`` is there, too."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('base_model'), name)


def test_a_model_in_an_adapter_runs_under_the_budget():
    model, (ids, mask) = make('llama'), batch()
    expected = generate(model, ids, mask, BudgetCache(model.config, BUDGET))
    adapted = Adapter(Adapter(model))
    assert enable(adapted, BUDGET) is adapted
    assert torch.equal(generate(model, ids, mask), expected)
    disable(model)
    assert not model.model._forward_pre_hooks


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_enabled_model_is_enabled_and_can_be_disabled(copied):
    model, (ids, mask) = make('llama'), batch()
    expected = generate(enable(model, BUDGET), ids, mask)
    other = copied(model)
    assert torch.equal(generate(other, ids, mask), expected)
    disable(other)
    assert not other.model._forward_pre_hooks and not other.model._forward_pre_hooks_with_kwargs
    assert torch.equal(generate(model, ids, mask), expected)


def test_enabling_again_replaces_the_budget():
    model, (ids, mask) = make('llama'), batch()
    enable(model, BUDGET)
    enable(model, dict(ratio=1.0, window=4))
    assert torch.equal(generate(model, ids, mask), generate(disable(model), ids, mask))


def test_two_models_have_budgets_of_their_own_in_threads():
    (ids, mask), budgets = batch(), dict(llama=BUDGET, mistral=dict(tokens=12, window=5, selection='cake'))
    models = {family: make(family) for family in budgets}
    expected = {
        family: generate(model, ids, mask, BudgetCache(model.config, budgets[family]))
        for family, model in models.items()
    }
    for family, model in models.items():
        enable(model, budgets[family])
    got: dict[tuple[str, int], torch.Tensor] = {}

    def run(family: str, number: int) -> None:
        got[family, number] = generate(models[family], ids, mask)

    threads = [threading.Thread(target=run, args=(family, n)) for family in budgets for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4
    for (family, _), logits in got.items():
        assert torch.equal(logits, expected[family])


def test_a_covering_budget_changes_no_sample():
    model, (ids, mask) = make('mistral'), batch()
    given = dict(attention_mask=mask, max_new_tokens=9, do_sample=True, num_return_sequences=2)
    torch.manual_seed(5)
    expected = model.generate(ids, **given)
    enable(model, dict(tokens=90, window=4))
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, **given), expected)


def test_a_cache_of_ones_own_goes_before():
    model, (ids, mask) = make('llama'), batch()
    enable(model, BUDGET)
    own = BudgetCache(model.config, dict(ratio=1.0, window=4))
    assert torch.equal(generate(model, ids, mask, own), generate(disable(model), ids, mask))
    assert own.seen == [61, 48, 56]


def test_one_forward_over_prompt_and_answer_is_the_plain_one():
    """What lm-eval does for a loglikelihood: nothing is dropped before the block has been read."""
    model, (ids, _) = make('qwen2-mixed', torch.float32), batch()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(enable(model, BUDGET)(ids).logits, expected)


def test_a_model_without_a_cache_stays_without():
    model, (ids, mask) = make('llama'), batch()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    enable(model, BUDGET)
    output = model(ids, attention_mask=mask, use_cache=False)
    assert torch.equal(output.logits, expected)
    assert output.past_key_values is None


# --- refused ---


def refused(model: Any, error: Any, text: str, call: Any) -> None:
    """The call is refused in words, and the next prompt is as it was before."""
    ids, mask = batch()
    before = generate(model, ids, mask)
    with pytest.raises(error, match=text):
        call(ids, mask)
    assert torch.equal(generate(model, ids, mask), before)


def test_what_has_no_budget_is_refused():
    model = enable(make('llama'), BUDGET)
    name = cache_name(model)
    refused(model, TypeError, 'got StaticCache', lambda ids, mask: generate(
        model, ids, mask, StaticCache(config=model.config, max_cache_len=99)))  # fmt: skip
    used = DynamicCache(config=model.config)
    model.model(torch.tensor([[5, 6, 7]]), use_cache=True, **{name: BudgetCache(model.config, BUDGET)})
    used.update(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 8), 0)
    refused(model, TypeError, 'got DynamicCache; write lzero_kv.llm.disable', lambda ids, mask: model(
        ids[:, 5:], use_cache=True, **{name: used}))  # fmt: skip
    refused(model, (ValueError, NotImplementedError), 'crop', lambda ids, mask: model.generate(
        ids[:1], attention_mask=mask[:1], max_new_tokens=9, prompt_lookup_num_tokens=3))  # fmt: skip
    refused(model, ValueError, 'output_attentions=True is not possible', lambda ids, mask: generate(
        model, ids, mask, output_attentions=True))  # fmt: skip


def test_masks_with_holes_are_refused():
    model = enable(make('mistral-sliding'), BUDGET)

    def with_mask(change: Any) -> Any:
        def call(ids: torch.Tensor, mask: torch.Tensor) -> None:
            mask = torch.ones_like(mask)
            change(mask)
            generate(model, ids, mask)

        return call

    refused(
        model, ValueError, "tokenizer.padding_side = 'left'", with_mask(lambda mask: mask[1, -3:].zero_())
    )
    refused(model, ValueError, 'without holes', with_mask(lambda mask: mask[2, 29].zero_()))
    full = enable(make('llama'), BUDGET)
    cache = BudgetCache(full.config, BUDGET)
    ids, mask = batch()
    generate(full, ids, mask, cache, new=1)
    longer = torch.cat([mask, torch.ones(3, 2, dtype=mask.dtype)], dim=1)
    longer[0, 7] = 0
    with pytest.raises(ValueError, match='without holes'), torch.no_grad():
        full(ids[:, :2], attention_mask=longer, **{cache_name(full): cache})


def test_gradients_and_positions_beyond_the_model_are_refused():
    model = enable(make('llama'), BUDGET)
    model.requires_grad_(True)
    refused(model, ValueError, 'use_cache=False to train', lambda ids, mask: model(ids, attention_mask=mask))
    model.requires_grad_(False)
    refused(model, ValueError, r'positions for 256 tokens .*, got 257', lambda ids, mask: generate(
        model, ids[:1].repeat(1, 6), mask[:1].repeat(1, 6), new=21))  # fmt: skip


def test_a_cache_cannot_be_cropped():
    model = make('llama')
    with pytest.raises(NotImplementedError, match='assisted decoding and prompt lookup need a full cache'):
        BudgetCache(model.config, BUDGET).crop(-1)


def test_attention_that_cannot_be_seen_is_refused():
    model = make('llama')
    cache = BudgetCache(model.config, BUDGET)
    model.set_attn_implementation('eager')
    with pytest.raises(ValueError, match=r"set_attn_implementation\('sdpa'\)"):
        enable(model, BUDGET)
    with pytest.raises(RuntimeError, match="a budget needs attn_implementation='sdpa' all the time"):
        generate(model, *batch(), cache)


@pytest.mark.parametrize(
    ('budget', 'options', 'error', 'text'),
    [
        (dict(ratio=1.5), {}, ValueError, 'ratio: expected a number greater than 0 and at most 1'),
        (dict(ratio=0.5, selecton='cake'), {}, ValueError, "did you mean 'selection'"),
        (0.25, {}, TypeError, r'dict\(ratio=0.25\)'),
        (BUDGET, dict(interval=0), ValueError, 'interval must be an integer of at least 1, got 0'),
        (BUDGET, dict(intervall=4), TypeError, 'intervall'),
    ],
)
def test_impossible_budgets_leave_the_model_as_it_was(budget, options, error, text):
    model = make('llama')
    enable(model, BUDGET)
    ids, mask = batch()
    before = generate(model, ids, mask)
    with pytest.raises(error, match=text):
        enable(model, budget, **options)
    assert torch.equal(generate(model, ids, mask), before)


def test_other_models_are_refused_with_the_list():
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=3, n_embd=12, vocab_size=29))
    with pytest.raises(ValueError, match=r"'llama' .*'mistral' .*'qwen2' .*got 'gpt2'"):
        enable(other, BUDGET)
    with pytest.raises(TypeError, match='expected a language model of transformers, got Linear'):
        enable(torch.nn.Linear(3, 5), BUDGET)
    with pytest.raises(TypeError, match=r'model\.config, got dict'):
        BudgetCache(dict(model_type='llama'), BUDGET)


def test_importing_the_package_loads_neither_torch_nor_transformers():
    heavy = ('torch', 'transformers', 'numpy')
    code = f'import sys, lzero_kv.llm\nprint(*[name for name in {heavy!r} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
