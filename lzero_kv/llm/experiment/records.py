"""Documents from local files of LongBench's and RULER's records, JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lzero_kv.llm.experiment.documents import Document, beginning, encode

Record = Mapping[str, Any]
PROMPTS, NEW_TOKENS = 'dataset2prompt.json', 'dataset2maxlen.json'
"""LongBench's own files of prompts and of generated tokens; read where they lie beside the records or in a
folder ``config`` beside them."""
_SHOWN = 10
_SPLITS = ('validation', 'test', 'train')


@dataclass(frozen=True)
class Dataset:
    """One dataset of LongBench."""

    prompt: str
    """With {context} and {input}."""
    metric: str
    new_tokens: int
    stop: str = ''


_QA = (
    'Read the text and answer the question with a few words of it.\n\n{context}\n\nQuestion: {input}\nAnswer:'
)
_SUMMARY = 'Read the text and write a summary of one page.\n\n{context}\n\nSummary:'
_EXAMPLES = '{context}\n{input}'
DATASETS = {
    'narrativeqa': Dataset(_QA, 'f1', 128),
    'qasper': Dataset(_QA, 'f1', 128),
    'multifieldqa_en': Dataset(_QA, 'f1', 64),
    'hotpotqa': Dataset(_QA, 'f1', 32),
    '2wikimqa': Dataset(_QA, 'f1', 32),
    'musique': Dataset(_QA, 'f1', 32),
    'triviaqa': Dataset(_EXAMPLES, 'f1', 32, stop='\n'),
    'gov_report': Dataset(_SUMMARY, 'rouge_l', 512),
    'multi_news': Dataset(_SUMMARY, 'rouge_l', 512),
    'qmsum': Dataset(_QA, 'rouge_l', 512),
    'samsum': Dataset(_EXAMPLES, 'rouge_l', 128, stop='\n'),
    'trec': Dataset(_EXAMPLES, 'class_named', 64, stop='\n'),
    'passage_count': Dataset(
        'Some of these paragraphs may be there more than once.\n\n{context}\n\nNumber of different '
        'paragraphs:',
        'number',
        32,
    ),
    'passage_retrieval_en': Dataset(
        '{context}\n\nAbstract: {input}\n\nThe paragraph of this abstract is Paragraph', 'number', 32
    ),
    'lcc': Dataset('{context}', 'edit', 64),
    'repobench-p': Dataset('{context}{input}', 'edit', 64),
}
"""LongBench's datasets in English and code, with short prompts of our own. Those in Chinese need a word
segmentation and are refused."""
RULER_NEW_TOKENS = {'niah': 128, 'vt': 30, 'cwe': 120, 'fwe': 50, 'qa': 32}
"""Generated tokens by the beginning of a RULER task's name."""


def read_records(path: str | Path, tokenizer: Any, length: int) -> list[Document]:
    """Documents of a file of records.

    A record with ``input``, ``context``, ``answers`` and ``dataset`` is LongBench's, one with ``input`` and
    ``outputs`` RULER's; the name of a RULER task is that of the file, or of the folder of a file
    ``validation.jsonl``.

    Args:
        path: JSON lines.
        tokenizer: of the model.
        length: tokens of a prompt, at most: a longer one of LongBench is cut in the middle, a longer one of
            RULER is refused.

    Raises:
        ValueError: lines that are no such records, up to ten of them, or a file that is no UTF-8 or JSON.
        OSError: the file cannot be read.
    """
    path = Path(path).expanduser()
    datasets = _with_own_prompts(path)
    made, problems = [], []
    # JSON may hold other separators of lines inside its texts
    for number, line in enumerate(_text_of(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            build = _builder(_record(line), path, datasets)
            made.append(build(f'{number}', tokenizer, length))
        except ValueError as error:
            problems.append(f'line {number}: {error}')
    if problems or not made:
        raise ValueError(
            '\n  '.join([f'{path}:', *(problems[:_SHOWN] or ['expected a record on each line'])])
        )
    return made


def cut_in_the_middle(tokens: list[int], length: int) -> list[int]:
    """The first and the last half of ``length`` tokens, as LongBench truncates prompts."""
    half = length // 2
    return tokens if len(tokens) <= length else [*tokens[:half], *tokens[-half:]]


def _builder(
    record: Record, path: Path, datasets: Mapping[str, Dataset]
) -> Callable[[str, Any, int], Document]:
    if 'outputs' in record:
        return partial(_of_ruler, record, _ruler_task(path))
    if 'context' in record or 'dataset' in record:
        return partial(_of_longbench, record, datasets)
    raise ValueError(
        f'expected the fields input, context, answers and dataset (LongBench) or input and outputs (RULER), '
        f'got {sorted(record)}'
    )


def _of_longbench(
    record: Record, datasets: Mapping[str, Dataset], number: str, tokenizer: Any, length: int
) -> Document:
    name = _text(record, 'dataset').removesuffix('_e')
    if name not in datasets:
        raise ValueError(f'dataset: expected one of {list(datasets)}, got {name!r}')
    dataset, answers = datasets[name], _texts(record, 'answers')
    classes = _texts(record, 'all_classes') if dataset.metric == 'class_named' else []
    values = {field: _text(record, field) for field in ('context', 'input')}
    text = re.sub(r'\{(context|input)\}', lambda match: values[match[1]], dataset.prompt)
    target = answers[0] if dataset.metric == 'edit' else f' {answers[0]}'
    return Document(
        task=f'longbench/{name}',
        id=f'longbench-{name}-{length}-{record.get("_id") or number}',
        prompt=tuple(cut_in_the_middle([*beginning(tokenizer), *encode(tokenizer, text)], length)),
        target=tuple(encode(tokenizer, target)[: dataset.new_tokens]),
        answers=tuple(answers),
        metric=dataset.metric,
        new_tokens=dataset.new_tokens,
        stop=dataset.stop,
        classes=tuple(classes),
    )


def _of_ruler(record: Record, task: str, number: str, tokenizer: Any, length: int) -> Document:
    answers = _texts(record, 'outputs')
    prefix = _text(record, 'answer_prefix') if 'answer_prefix' in record else ''
    prompt = [*beginning(tokenizer), *encode(tokenizer, _text(record, 'input') + prefix)]
    if len(prompt) > length:
        raise ValueError(
            f'expected a prompt of at most {length} tokens, got {len(prompt)}; give a larger length, or make '
            f"RULER's data for this one"
        )
    kind = next((kind for kind in RULER_NEW_TOKENS if task.startswith(kind)), 'niah')
    new_tokens = RULER_NEW_TOKENS[kind]
    target = answers[0] if kind == 'qa' else ', '.join(answers)
    return Document(
        task=f'ruler/{task}',
        id=f'ruler-{task}-{record.get("index", number)}',
        prompt=tuple(prompt),
        target=tuple(encode(tokenizer, f' {target}')[:new_tokens]),
        answers=tuple(answers),
        metric='found_any' if kind == 'qa' else 'found',
        new_tokens=new_tokens,
    )


def _ruler_task(path: Path) -> str:
    return path.resolve().parent.name if path.stem in _SPLITS else path.stem


def _with_own_prompts(path: Path) -> dict[str, Dataset]:
    """:data:`DATASETS` with LongBench's own prompts, where its files are there."""
    prompts, new_tokens = (_beside(path, name) for name in (PROMPTS, NEW_TOKENS))
    return {
        name: Dataset(
            prompts.get(name, one.prompt), one.metric, new_tokens.get(name, one.new_tokens), one.stop
        )
        for name, one in DATASETS.items()
    }


def _beside(path: Path, name: str) -> dict[str, Any]:
    for file in (path.parent / name, path.parent / 'config' / name):
        if file.is_file():
            return _values_by_dataset(file, str if name == PROMPTS else int)
    return {}


def _values_by_dataset(file: Path, kind: type) -> dict[str, Any]:
    try:
        values = _record(_text_of(file))
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from None
    if wrong := {name: value for name, value in values.items() if not isinstance(value, kind)}:
        raise ValueError(f'{file}: expected for each dataset a value of type {kind.__name__}, got {wrong}')
    return dict(values)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise ValueError(f'{file}:\n  line {line}: expected UTF-8, {error.reason}') from None


def _record(line: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'expected one JSON object, {error}') from None
    if not isinstance(record, dict):
        raise ValueError(f'expected one JSON object, got {type(record).__name__}')
    return record


def _text(record: Record, name: str) -> str:
    if not isinstance(value := record.get(name), str):
        raise ValueError(f'{name}: expected a text, got {value!r}')
    return value


def _texts(record: Record, name: str) -> list[str]:
    value = record.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f'{name}: expected a list of one text or more, got {value!r}')
    return value
