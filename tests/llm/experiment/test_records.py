"""Records of LongBench and RULER in small files: whole ones, and broken ones with one error for each file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lzero_kv.llm.experiment.documents import encode
from lzero_kv.llm.experiment.records import DATASETS, cut_in_the_middle, read_records
from lzero_kv.llm.experiment.scoring import SCORES

LENGTH = 150
RECORD: dict[str, Any] = dict(
    dataset='hotpotqa', input='Who sees it?', context='The fox sees the river.', answers=['The fox', 'a fox']
)
RULER: dict[str, Any] = dict(index=7, input='The secret number is 48213. What is it?', outputs=['48213', 'x'])


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return path


def test_every_dataset_of_longbench_has_its_prompt_metric_and_length(tokenizer, tmp_path):
    records = [RECORD | dict(dataset=name, all_classes=['The fox', 'owl']) for name in DATASETS]
    made = read_records(write(tmp_path / 'all.jsonl', *records), tokenizer, LENGTH)
    assert [one.task for one in made] == [f'longbench/{name}' for name in DATASETS]
    assert len({one.id for one in made}) == len(DATASETS)
    for document, dataset in zip(made, DATASETS.values(), strict=True):
        text = tokenizer.decode(document.prompt)
        assert RECORD['context'] in text and 0 < len(document.prompt) <= LENGTH
        assert ('Who sees it?' in text) == ('{input}' in dataset.prompt)
        assert (document.metric, document.new_tokens) == (dataset.metric, dataset.new_tokens)
        assert document.answers == ('The fox', 'a fox') and document.metric in SCORES
        assert document.classes == (('The fox', 'owl') if dataset.metric == 'class_named' else ())
        right = document.answers[0]
        assert tokenizer.decode(document.target) == (right if dataset.metric == 'edit' else f' {right}')


def test_a_long_prompt_is_cut_in_the_middle(tokenizer, tmp_path):
    context = ' '.join(f'The fox sees day {number}.' for number in range(300))
    [made] = read_records(write(tmp_path / 'long.jsonl', RECORD | dict(context=context)), tokenizer, LENGTH)
    whole = encode(tokenizer, DATASETS['hotpotqa'].prompt.format(context=context, input=RECORD['input']))
    assert made.prompt == (*whole[: LENGTH // 2], *whole[-LENGTH // 2 :])
    assert cut_in_the_middle([1, 2, 3, 4, 5], 5) == [1, 2, 3, 4, 5]
    assert cut_in_the_middle([1, 2, 3, 4, 5], 4) == [1, 2, 4, 5]


def test_braces_in_a_context_are_text(tokenizer, tmp_path):
    record = RECORD | dict(dataset='lcc', context='def f(): return {input} {x}')
    [made] = read_records(write(tmp_path / 'code.jsonl', record), tokenizer, LENGTH)
    assert tokenizer.decode(made.prompt) == record['context']


def test_a_line_separator_inside_a_text_ends_no_line(tokenizer, tmp_path):
    record = RECORD | dict(context='The fox\u2028sees\x85the river.')
    [made] = read_records(write(tmp_path / 'lines.jsonl', record, ''), tokenizer, LENGTH)
    assert record['context'] in tokenizer.decode(made.prompt)


@pytest.mark.parametrize('folder', ['', 'config'])
def test_prompts_of_longbench_itself_are_read_beside_the_records(folder, tokenizer, tmp_path):
    own = tmp_path / folder
    own.mkdir(exist_ok=True)
    (own / 'dataset2prompt.json').write_text(json.dumps({'hotpotqa': 'Q: {input} T: {context}'}))
    (own / 'dataset2maxlen.json').write_text(json.dumps({'hotpotqa': 5}))
    records = write(tmp_path / 'a.jsonl', RECORD | dict(dataset='hotpotqa_e', _id='f3'))
    [made] = read_records(records, tokenizer, LENGTH)
    assert tokenizer.decode(made.prompt) == 'Q: Who sees it? T: The fox sees the river.'
    assert (made.task, made.new_tokens, made.id) == ('longbench/hotpotqa', 5, 'longbench-hotpotqa-150-f3')


@pytest.mark.parametrize(
    ('file', 'task', 'new_tokens', 'metric', 'target'),
    [
        ('niah_multikey_1.jsonl', 'niah_multikey_1', 128, 'found', ' 48213, x'),
        ('vt/validation.jsonl', 'vt', 30, 'found', ' 48213, x'),
        ('fwe/test.jsonl', 'fwe', 50, 'found', ' 48213, x'),
        ('qa_1.jsonl', 'qa_1', 32, 'found_any', ' 48213'),
    ],
)
def test_a_task_of_ruler_is_that_of_its_file(file, task, new_tokens, metric, target, tokenizer, tmp_path):
    records = write(tmp_path / file, RULER, RULER | dict(index=8, answer_prefix=' It is'))
    plain, begun = read_records(records, tokenizer, LENGTH)
    assert (plain.task, plain.id) == (f'ruler/{task}', f'ruler-{task}-7')
    assert (plain.new_tokens, plain.metric) == (new_tokens, metric)
    assert (plain.answers, tokenizer.decode(plain.target)) == (('48213', 'x'), target)
    assert tokenizer.decode(plain.prompt) == RULER['input']
    assert tokenizer.decode(begun.prompt) == RULER['input'] + ' It is'


@pytest.mark.parametrize(
    ('record', 'said'),
    [
        ('{"dataset": "hotpotqa", ', 'expected one JSON object, '),
        ('[1, 2]', 'expected one JSON object, got list'),
        (dict(text='no record'), 'expected the fields input, context, .* or input and outputs'),
        (RECORD | dict(dataset='lsht'), r"dataset: expected one of \['narrativeqa', .* got 'lsht'"),
        (RECORD | dict(context=None), 'context: expected a text, got None'),
        (RECORD | dict(answers=[]), r'answers: expected a list of one text or more, got \[\]'),
        (RECORD | dict(dataset='trec'), 'all_classes: expected a list of one text or more, got None'),
        (RULER | dict(outputs='48213'), "outputs: expected a list of one text or more, got '48213'"),
        (RULER | dict(input='The fox. ' * 200), 'expected a prompt of at most 150 tokens, got .*; give'),
        (RULER | dict(answer_prefix=3), 'answer_prefix: expected a text, got 3'),
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_record_is_told_with_file_and_line(record, said, tokenizer, tmp_path):
    path = write(tmp_path / 'broken.jsonl', RECORD, '', record, RULER)
    with pytest.raises(ValueError, match=rf'broken\.jsonl:\n  line 3: {said}') as caught:
        read_records(path, tokenizer, LENGTH)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 2


def test_broken_records_are_told_together_up_to_ten(tokenizer, tmp_path):
    path = write(tmp_path / 'broken.jsonl', *(['no'] * 13))
    with pytest.raises(ValueError) as caught:
        read_records(path, tokenizer, LENGTH)
    assert [line.split(':')[0] for line in str(caught.value).splitlines()[1:]] == [
        f'  line {number}' for number in range(1, 11)
    ]


def test_files_that_are_no_records_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r'empty\.jsonl:\n  expected a record on each line'):
        read_records(write(tmp_path / 'empty.jsonl', ''), tokenizer, LENGTH)
    (tmp_path / 'latin.jsonl').write_bytes(json.dumps(RECORD).encode() + b'\n{"input": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r'latin\.jsonl:\n  line 2: expected UTF-8'):
        read_records(tmp_path / 'latin.jsonl', tokenizer, LENGTH)
    with pytest.raises(FileNotFoundError, match='missing'):
        read_records(tmp_path / 'missing.jsonl', tokenizer, LENGTH)


@pytest.mark.parametrize(
    ('name', 'text', 'said'),
    [
        ('dataset2prompt.json', '{"hotpotqa"', r'dataset2prompt\.json: expected one JSON object, '),
        ('dataset2prompt.json', '{"lcc": 3}', r"prompt\.json: expected .* of type str, got \{'lcc': 3\}"),
        ('dataset2maxlen.json', '{"lcc": "64"}', r'dataset2maxlen\.json: expected .* of type int'),
    ],
)
def test_broken_files_of_prompts_are_refused_by_name(name, text, said, tokenizer, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_records(write(tmp_path / 'a.jsonl', RECORD), tokenizer, LENGTH)
