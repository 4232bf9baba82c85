"""Rows of a document against what transformers itself computes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from lzero_kv.llm import BudgetCache
from lzero_kv.llm.experiment import scoring
from lzero_kv.llm.experiment.documents import Document, encode
from lzero_kv.llm.experiment.methods import ALGORITHMS, Method
from lzero_kv.llm.experiment.scoring import BINS, forced, score, timing
from lzero_kv.llm.experiment.tasks import documents
from tests.llm.experiment.tiny import tiny_llama

PROMPT, TARGET = 203, 29
CUT = [
    Method.parse(text)
    for text in ('cake uniform window=8 0.25', 'streaming uniform window=8 sinks=0 tokens=41')
]
COVERING = [Method.parse(f'{name} {more}') for name in ALGORITHMS[1:] for more in ('ratio=1.0', 'tokens=400')]


@pytest.fixture(scope='module')
def document(tokenizer, story) -> Document:
    [made] = documents('continuation', tokenizer, 1, PROMPT, text=story)
    return replace(made, target=made.target[:TARGET])


@pytest.fixture(scope='module')
def asked(tokenizer, story) -> Document:
    """With an answer that is generated: 7 tokens that the model may choose freely."""
    [made] = documents('needle_after', tokenizer, 1, PROMPT, text=story)
    return replace(made, stop='', new_tokens=7)


def rows_of(model, tokenizer, document, methods, **options):
    return {row['method']: row for row in score(model, tokenizer, document, methods, **options)}


@torch.no_grad()
def stock_logits(model, document):
    """Of each token of the target, by one pass of transformers without any cache of ours."""
    before = [*document.prompt, *document.question]
    logits = model(torch.tensor([[*before, *document.target]])).logits[0]
    return logits[len(before) - 1 : -1]


def test_the_full_cache_comes_first_and_once(model, tokenizer, document):
    rows = list(score(model, tokenizer, document, [*CUT, Method('full')]))
    assert [row['method'] for row in rows] == ['full', *(method.name for method in CUT)]


def test_the_control_is_what_transformers_computes(model, tokenizer, document):
    row = rows_of(model, tokenizer, document, [])['full']
    logits, target = stock_logits(model, document)[1:], torch.tensor(document.target[1:])
    assert row['perplexity'] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, target).exp().item(), rel=1e-4
    )
    assert (
        row['forced'] == row['score'] == pytest.approx((logits.argmax(-1) == target).double().mean().item())
    )
    assert (row['kl'], row['agreement'], row['tokens'], row['chance']) == (0.0, 1.0, PROMPT, 0.0)
    # keys and values of 3 layers with 2 heads of 8 numbers of 4 bytes
    assert row['full_bytes'] == 2 * 3 * PROMPT * 2 * 8 * 4 == row['peak_bytes']
    assert row['slots'] == [PROMPT] * 3 and row['peak_tokens'] == 3 * PROMPT
    assert row['kept'] == [[1.0] * BINS] * 3


def test_a_budget_that_covers_the_context_changes_nothing(model, tokenizer, document, asked):
    for one in (document, asked):
        rows = rows_of(model, tokenizer, one, COVERING)
        assert len(rows) == 1 + len(COVERING)
        for name, row in rows.items():
            assert (row['kl'], row['agreement']) == (0.0, 1.0), name
            for field in ('score', 'forced', 'perplexity', 'prediction'):
                assert row[field] == rows['full'][field], (name, field)


@pytest.mark.parametrize('method', CUT, ids=lambda method: method.algorithm)
@torch.no_grad()
def test_a_cut_cache_is_scored_as_if_it_were_alone(model, tokenizer, document, method):
    row = rows_of(model, tokenizer, document, CUT)[method.name]
    cache = BudgetCache(model.config, method.budget())
    model(torch.tensor([document.prompt]), past_key_values=cache)
    assert row['bytes'] == cache.bytes
    assert row['slots'] == list(cache.slots[0])
    assert row['peak_tokens'] == cache.peak_tokens < 3 * PROMPT
    target = list(document.target)
    said = model(torch.tensor([target[:-1]]), past_key_values=cache).logits[0]
    full = stock_logits(model, document)[1:]
    kl = torch.nn.functional.kl_div(
        said.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction='batchmean'
    )
    assert row['kl'] == pytest.approx(kl.item(), rel=1e-3) and row['kl'] > 1e-3
    assert row['agreement'] == pytest.approx((said.argmax(-1) == full.argmax(-1)).double().mean().item())
    loss = torch.nn.functional.cross_entropy(said, torch.tensor(target[1:]))
    assert row['perplexity'] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_kept_is_the_part_of_the_prompt_that_stays(model, tokenizer, document):
    [row] = [row for row in score(model, tokenizer, document, CUT) if row['algorithm'] == 'streaming']
    # 41 newest of 203 tokens: the last six and a half of 32 parts
    assert row['slots'] == [41] * 3
    for layer in row['kept']:
        assert layer[:25] == [0.0] * 25 and layer[26:] == [1.0] * 6 and 0 < layer[25] < 1


def test_preferences_are_there_where_the_allocation_reads_them(model, tokenizer, document):
    measured = Method.parse('snapkv attention_based window=8 0.5')
    rows = rows_of(model, tokenizer, document, [measured, CUT[0]])
    assert len(rows[measured.name]['dispersion']) == len(rows[measured.name]['shift']) == 3
    assert min(rows[measured.name]['shift']) > 0
    assert rows[CUT[0].name]['dispersion'] is None and rows['full']['shift'] is None


@torch.no_grad()
def test_an_answer_is_what_generate_writes(model, tokenizer, asked):
    rows = rows_of(model, tokenizer, asked, CUT)
    prompt, question = torch.tensor([asked.prompt]), torch.tensor([asked.question])
    for method in [Method('full'), *CUT]:
        budget = method.budget()
        cache = DynamicCache() if budget is None else BudgetCache(model.config, budget)
        model(prompt, past_key_values=cache)
        logits = model(question, past_key_values=cache).logits[0, -1]
        made = [int(logits.argmax())]
        while len(made) < 7:
            logits = model(torch.tensor([made[-1:]]), past_key_values=cache).logits[0, -1]
            made.append(int(logits.argmax()))
        if tokenizer.eos_token_id in made:
            made = made[: made.index(tokenizer.eos_token_id)]
        assert rows[method.name]['prediction'] == tokenizer.decode(made, skip_special_tokens=True)
    assert len({row['prediction'] for row in rows.values()}) > 1


def test_an_answer_that_the_model_writes_scores_everything(model, tokenizer, document):
    text = tokenizer.decode(_greedy(model, document.prompt, 5))
    answered = replace(document, answers=(text, 'never ever'), metric='found', new_tokens=5)
    row = rows_of(model, tokenizer, answered, [])['full']
    assert (row['prediction'], row['score']) == (text, 0.5)
    ended = replace(answered, stop=text[2:4])
    assert rows_of(model, tokenizer, ended, [])['full']['prediction'] == text.partition(text[2:4])[0]


@torch.no_grad()
def _greedy(model, prompt, count):
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_the_first_token_counts_only_behind_a_question(model, tokenizer, document, asked):
    single = replace(document, target=document.target[:1])
    row = rows_of(model, tokenizer, single, CUT)[CUT[0].name]
    assert (row['kl'], row['perplexity'], row['forced'], row['score']) == (None,) * 4
    behind = replace(asked, target=asked.target[:1])
    row = rows_of(model, tokenizer, behind, CUT)[CUT[0].name]
    assert row['kl'] > 0 and row['forced'] in (0.0, 1.0)


def test_groups_of_caches_change_nothing(model, tokenizer, asked, monkeypatch):
    many = [*CUT, Method.parse('hace adaptive window=8 0.3'), Method.parse('h2o uniform window=8 0.4')]
    together = list(score(model, tokenizer, asked, many))
    monkeypatch.setattr(scoring, 'TOGETHER', 2)
    assert list(score(model, tokenizer, asked, many)) == together


def test_a_prompt_of_one_token_is_measured(model, tokenizer, document):
    single = replace(document, prompt=document.prompt[:1])
    rows = rows_of(model, tokenizer, single, CUT)
    assert {row['tokens'] for row in rows.values()} == {1}
    assert rows['full']['kl'] == 0.0 <= rows[CUT[0].name]['kl']


def test_a_divergence_that_is_no_number_stays_none(document):
    logits = torch.zeros(len(document.target), 11)
    logits[:, 10] = -math.inf
    row = forced(replace(document, target=(1,) * len(document.target)), logits, logits)
    assert math.isnan(row['kl']) and math.isfinite(row['perplexity'])


def test_rows_are_json(model, tokenizer, asked, document):
    for one in (asked, document):
        rows = list(score(model, tokenizer, one, CUT))
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_half_precision_is_scored_in_float32(tokenizer, document):
    half = tiny_llama(tokenizer).to(torch.bfloat16)
    rows = rows_of(half, tokenizer, document, CUT)
    assert rows['full']['full_bytes'] == 2 * 3 * PROMPT * 2 * 8 * 2
    assert rows['full']['kl'] == 0.0 < rows[CUT[0].name]['kl']


def test_mistakes_are_refused_before_the_prompt_is_read(model, tokenizer, document):
    with pytest.raises(ValueError, match=f"given once, got twice: .'{CUT[0].name}'"):
        list(score(model, tokenizer, document, [CUT[0], CUT[0]]))


@pytest.mark.parametrize('method', [Method('full'), CUT[0]], ids=lambda method: method.algorithm)
def test_times_of_a_method(model, document, method, monkeypatch):
    monkeypatch.setattr(scoring, 'TIMED_TOKENS', 5)
    monkeypatch.setattr(scoring, 'TIMED_REPEATS', 2)
    row = timing(model, document, method)
    assert row['method'] == method.name and row['document'] == document.id
    assert (row['tokens'], row['new_tokens']) == (PROMPT, 5)
    assert 0 < row['next_token'] < row['first_token'] * 20 and math.isfinite(row['first_token'])


def test_the_prompt_in_a_document_is_the_one_that_was_encoded(tokenizer, asked):
    assert tokenizer.decode(asked.question).startswith('\n\nThe secret number of the ')
    assert list(asked.target) == encode(tokenizer, f' {asked.answers[0]}')
