"""Documents of the tasks: what is asked stands in the text, where it is said to stand, in so many tokens."""

from __future__ import annotations

import argparse
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lzero_kv.llm.experiment.documents import Document, encode
from lzero_kv.llm.experiment.tasks import KEYS, TASKS, documents

FACT = re.compile(r'The secret number of the (\w+) is (\d{5})\.\n')
QUESTION = re.compile(r'\n\nThe secret number of the (\w+) is')
VARIABLE = re.compile(r'VAR (\w\d) = (?:VAR )?(\w+)\.\n')
PROGRAM = Path(argparse.__file__)
LENGTH = 503
every_task = pytest.mark.parametrize('task', TASKS)
# the same documents each time; tokenizer and story are made once
some = settings(
    max_examples=5, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
lengths, numbers = st.integers(480, 560), st.integers(0, 60)


def options(task: str, story: Path) -> dict[str, Any]:
    return {} if task == 'words' else {'text': PROGRAM if task == 'code' else story}


def one(task: str, tokenizer: Any, story: Path, length: int, number: int) -> Document:
    [made] = documents(task, tokenizer, 1, length, number, **options(task, story))
    return made


def where(part: list[int], tokens: tuple[int, ...]) -> list[int]:
    """Places at which tokens stand in others."""
    return [at for at in range(len(tokens)) if tokens[at : at + len(part)] == tuple(part)]


@every_task
def test_documents_are_a_function_of_their_number(task, tokenizer, story):
    six = documents(task, tokenizer, 6, LENGTH, **options(task, story))
    for seed in (0, 1):
        assert documents(task, tokenizer, 3, LENGTH, seed, **options(task, story)) == six[3 * seed :][:3]
    assert len({made.id for made in six}) == len({made.prompt for made in six}) == 6
    longer = documents(task, tokenizer, 1, LENGTH + 29, **options(task, story))
    assert longer[0].id not in {made.id for made in six}


@every_task
@some
@given(length=lengths, number=numbers)
def test_lengths_are_exact_in_tokens(task, tokenizer, story, length, number):
    made = one(task, tokenizer, story, length, number)
    # a word of the list has no more than 10 tokens
    assert length - 10 * (task == 'words') <= len(made.prompt) <= length
    assert made.size == len(made.prompt) + len(made.question) + len(made.target)
    assert bool(made.question) == (task == 'needle_after')
    assert bool(made.answers) == (task != 'continuation')
    # a line of a program may be longer than what is generated
    if made.answers and task != 'code':
        assert made.new_tokens > len(encode(tokenizer, made.answers[0]))


@some
@given(length=lengths, number=numbers)
def test_a_continuation_is_the_text_that_goes_on(tokenizer, story, length, number):
    made = one('continuation', tokenizer, story, length, number)
    assert len(made.target) == 128
    assert tokenizer.decode([*made.prompt, *made.target]) in story.read_text()


@some
@given(length=lengths, number=numbers)
def test_a_needle_stands_in_the_text_and_is_asked_for_at_the_end(tokenizer, story, length, number):
    made = one('needle', tokenizer, story, length, number)
    text = tokenizer.decode(made.prompt)
    [(key, hidden)] = FACT.findall(text)
    asked = QUESTION.search(text)
    assert (key, [hidden], asked.end()) == (asked[1], [*made.answers], len(text))
    fact, question = (encode(tokenizer, part) for part in (FACT.search(text)[0], asked[0]))
    [place] = where(fact, made.prompt)
    # not in the window that every method keeps
    room = length - len(fact) - len(question)
    assert place <= 0.9 * room and where(question, made.prompt) == [length - len(question)]
    assert text.replace(FACT.search(text)[0], '').removesuffix(asked[0]) in story.read_text()
    assert (made.chance, tokenizer.decode(made.target)) == (0.0, f' {hidden}')


@some
@given(length=lengths, number=numbers)
def test_a_question_behind_the_cut_is_not_in_the_prompt(tokenizer, story, length, number):
    after, inside = (one(task, tokenizer, story, length, number) for task in ('needle_after', 'needle'))
    text, asked = tokenizer.decode(after.prompt), tokenizer.decode(after.question)
    assert not QUESTION.search(text) and QUESTION.fullmatch(asked)
    assert FACT.findall(text) == FACT.findall(tokenizer.decode(inside.prompt)) == [
        (QUESTION.fullmatch(asked)[1], after.answers[0])
    ]  # fmt: skip


@some
@given(number=numbers)
def test_one_of_several_needles_is_asked_for(tokenizer, story, number):
    made = one('needles', tokenizer, story, 560, number)
    text = tokenizer.decode(made.prompt)
    facts = dict(FACT.findall(text))
    assert len(facts) == 4 and set(facts) <= set(KEYS)
    assert (facts[QUESTION.search(text)[1]],) == made.answers
    assert made.chance == 1 / 4


@some
@given(number=numbers)
def test_a_number_passes_from_variable_to_variable(tokenizer, story, number):
    made = one('variables', tokenizer, story, 800, number)
    example, text = tokenizer.decode(made.prompt).split('.\n\n', 1)
    names, values = zip(*VARIABLE.findall(text), strict=True)
    assert names == made.answers and len(names) == 3
    assert values[1:] == names[:-1] and re.fullmatch(r'\d{5}', values[0])
    said = f'Question: Which variables are assigned the value {values[0]}?'
    assert text.count(said) == 1 and text.index(said) > max(text.index(f'VAR {name} =') for name in names)
    assert tokenizer.decode(made.target) == ' ' + ', '.join(f'VAR {name}' for name in names)
    # the worked example has other numbers, and its answer
    names = [name for name, _ in VARIABLE.findall(example)]
    assert len(names) == 3 and values[0] not in example
    assert example.endswith(' are ' + ', '.join(f'VAR {name}' for name in names))


@some
@given(length=lengths, number=numbers)
def test_the_most_frequent_word_is_asked_for(tokenizer, story, length, number):
    made = one('words', tokenizer, story, length, number)
    text = tokenizer.decode(made.prompt)
    words = re.findall(r'(\w+),', text)
    counts = Counter(words)
    [answer] = made.answers
    assert counts[answer] == max(counts.values())
    assert made.chance == pytest.approx(counts[answer] / len(words))
    assert text.startswith('A list of words:') and text.endswith('\n\nThe most frequent word of the list is')
    assert tokenizer.decode(made.target) == f' {answer}'


@some
@given(length=lengths, number=numbers)
def test_a_line_of_code_follows_its_program(tokenizer, story, length, number):
    made = one('code', tokenizer, story, length, number)
    assert tokenizer.decode([*made.prompt, *made.target]) + '\n' in PROGRAM.read_text()
    assert tokenizer.decode(made.target) == f'\n{made.answers[0]}'
    assert made.answers[0].strip() and '#' not in made.answers[0]
    # lines of a program are alike, and not the same
    assert 0.1 < made.chance < 0.8


def test_places_of_needles_are_spread_over_the_text(tokenizer, story):
    made = documents('needle', tokenizer, 30, 211, text=story)
    texts = [tokenizer.decode(document.prompt) for document in made]
    places = sorted(FACT.search(text).start() / len(text) for text in texts)
    assert places[0] < 0.1 and places[-1] > 0.6
    assert max(later - earlier for earlier, later in itertools.pairwise(places)) < 0.2


@pytest.mark.parametrize(
    ('task', 'given_', 'said'),
    [
        ('needel', {}, "task must be one of .* got 'needel'; did you mean 'needle'"),
        ('words', dict(text='story'), "text: task 'words' reads none; leave it out"),
        ('needle', dict(length=0), 'count and length must be at least 1, seed at least 0; got 2, 0, 0'),
        ('needle', dict(seed=-1), 'seed at least 0; got 2, 503, -1'),
        ('needle', dict(length=40), 'needle needs a length of more than .* tokens, got 40'),
        ('words', dict(length=30), 'words needs a length for 4 words at least, 30 has room for'),
        ('continuation', dict(length=90_000), 'tokens need about .*; lower the length or give a longer text'),
        ('continuation', dict(count=4000), 'has room for .* documents of .* tokens, 4000 were asked for'),
    ],
)
def test_impossible_documents_are_refused(task, given_, said, tokenizer, story):
    known = {} if task in ('words', 'needel') else {'text': story}
    arguments = dict(count=2, length=LENGTH) | known | given_
    with pytest.raises(ValueError, match=said):
        documents(task, tokenizer, **arguments)


def test_a_program_without_code_is_refused(tokenizer, story):
    with pytest.raises(ValueError, match='has no line of code behind 503 tokens'):
        documents('code', tokenizer, 1, LENGTH, text=story)
