"""Tasks of the experiments, made offline: text that goes on, needles, variables, frequent words, code.

Document ``i`` of a task is a function of the task, the text, the length, the tokenizer and the number
``seed * count + i``: different seeds give different documents, as long as the text has room for them.

Prompts are written to be continued, not as instructions, so that a base model answers too.
"""

from __future__ import annotations

import bisect
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lzero_kv.llm.experiment.documents import (
    PYTHON,
    SHAKESPEARE,
    Document,
    Stretches,
    beginning,
    encode,
    line_starts,
)
from lzero_kv.llm.experiment.scoring import edit
from lzero_kv.mistakes import did_you_mean

Text = str | Path
KEYS = ['lighthouse', 'garden', 'castle', 'bridge', 'harbour', 'market', 'tower', 'forest']
_SYLLABLES = [consonant + vowel for consonant in 'bdfgklmnprstvz' for vowel in 'aeio']
_LETTERS = 'ABCDEFGHJKLMNPQRSTUVWXYZ'
_NEEDLE = 'The secret number of the {key} is {number}.\n'
_QUESTION = '\n\nThe secret number of the {key} is'
_ASSIGNED = (
    'Question: Which variables are assigned the value {number}?\n'
    'Answer: The variables that are assigned the value {number} are'
)
_MOST_FREQUENT = '\n\nThe most frequent word of the list is'
_STATEMENT = re.compile(
    r'(return|yield|raise|if|elif|for|while|with|def|class|import|from)\b|[\w.\[\]]+( =|\()'
)
_TARGET = 128
"""Tokens of a text that goes on."""
_HIDDEN, _HOPS = 4, 2
_LINES = 400
"""Tokens behind the prompt of a program in which a line of code is looked for."""
_DIGITS = 5
_DEEPEST = 0.9
"""Needles lie in the first part of a prompt: from 1,024 tokens on not in the 68 newest, which every method
keeps by default."""


def documents(
    task: str, tokenizer: Any, count: int, length: int, seed: int = 0, text: Text | None = None
) -> list[Document]:
    """Documents of a task.

    Args:
        task: one of :data:`TASKS`.
        tokenizer: of the model.
        count: documents.
        length: tokens of a prompt.
        seed: the documents ``seed * count`` to ``(seed + 1) * count - 1`` of the task.
        text: a source of :class:`Stretches`; None for the task's own in :data:`TEXTS`.

    Raises:
        ValueError: the task is unknown or reads no text, a number is not positive, or the length is too
            short.
        ImportError: a text's package is missing.
    """
    make = TASKS.get(task)
    if make is None:
        raise ValueError(f'task must be one of {list(TASKS)}, got {task!r}{did_you_mean(task, list(TASKS))}')
    if text is not None and task not in TEXTS:
        raise ValueError(f'text: task {task!r} reads none; leave it out')
    if count < 1 or length < 1 or seed < 0:
        raise ValueError(
            f'count and length must be at least 1, seed at least 0; got {count}, {length}, {seed}'
        )
    numbers = range(seed * count, (seed + 1) * count)
    return make(task, tokenizer, numbers, length, TEXTS.get(task) if text is None else text)


def _continued(task: str, tokenizer: Any, numbers: Sequence[int], length: int, text: Text) -> list[Document]:
    first = beginning(tokenizer)
    stretches = _stretches(text, tokenizer, length - len(first) + _TARGET, numbers)
    made = []
    for number in numbers:
        tokens = [*first, *stretches.tokens(number)]
        made.append(
            Document(
                task=_named(task, stretches),
                id=f'{task}-{stretches.name}-{length}-{number}',
                prompt=tuple(tokens[:length]),
                target=tuple(tokens[length:]),
            )
        )
    return made


def _lists_of_words(
    task: str, tokenizer: Any, numbers: Sequence[int], length: int, text: None
) -> list[Document]:
    return [_frequent_word(tokenizer, number, length) for number in numbers]


def _programs(task: str, tokenizer: Any, numbers: Sequence[int], length: int, text: Text) -> list[Document]:
    stretches = _stretches(text, tokenizer, length + _LINES, numbers)
    return [_next_line(tokenizer, stretches, number, length) for number in numbers]


@dataclass(frozen=True)
class _Plant:
    """What is hidden in a text, and asked."""

    facts: Sequence[str]
    """In their order in the text."""
    question: str
    answers: Sequence[str]
    target: str
    example: str = ''
    """In front of the text."""
    chance: float = 0.0


def _needles(random_: random.Random, hidden: int = _HIDDEN) -> _Plant:
    keys = random_.sample(KEYS, hidden)
    numbers = [_number(random_) for _ in keys]
    facts = [_NEEDLE.format(key=key, number=number) for key, number in zip(keys, numbers, strict=True)]
    asked = random_.randrange(hidden)
    return _Plant(
        facts,
        _QUESTION.format(key=keys[asked]),
        [numbers[asked]],
        f' {numbers[asked]}',
        chance=0.0 if hidden == 1 else 1 / hidden,
    )


def _chain(random_: random.Random) -> _Plant:
    (names, number, facts), example = (_chain_of(random_) for _ in range(2))
    return _Plant(
        facts,
        '\n\n' + _ASSIGNED.format(number=number),
        names,
        ' ' + ', '.join(f'VAR {name}' for name in names),
        _worked(*example),
    )


def _chain_of(random_: random.Random) -> tuple[list[str], str, list[str]]:
    """Names of variables, their number, and a line for each."""
    letters = random_.sample(_LETTERS, _HOPS + 1)
    names = [f'{letter}{random_.randrange(1, 10)}' for letter in letters]
    number = _number(random_)
    values = [number, *(f'VAR {name}' for name in names)]
    return names, number, [f'VAR {name} = {value}.\n' for name, value in zip(names, values, strict=False)]


def _worked(names: Sequence[str], number: str, facts: Sequence[str]) -> str:
    between = 'The grass is green. The sky is blue.\n'
    answer = ', '.join(f'VAR {name}' for name in names)
    return f'{between.join(facts)}{_ASSIGNED.format(number=number)} {answer}.\n\n'


def _frequent_word(tokenizer: Any, number: int, length: int) -> Document:
    random_ = random.Random(f'words {number}')
    kinds = [''.join(random_.choices(_SYLLABLES, k=3)) for _ in range(100)]
    kinds = list(dict.fromkeys(kinds))
    shares = [1 / (place + 1) ** 1.2 for place in range(len(kinds))]
    question = encode(tokenizer, _MOST_FREQUENT)
    tokens = [*beginning(tokenizer), *encode(tokenizer, 'A list of words:')]
    said: list[str] = []
    while True:
        [word] = random_.choices(kinds, shares)
        more = encode(tokenizer, f' {word},')
        if len(tokens) + len(more) + len(question) > length:
            break
        tokens += more
        said.append(word)
    if len(said) < 4:
        raise ValueError(f'words needs a length for 4 words at least, {length} has room for {len(said)}')
    [(answer, count)] = Counter(said).most_common(1)
    target = encode(tokenizer, f' {answer}')
    return Document(
        task='words',
        id=f'words-{length}-{number}',
        prompt=(*tokens, *question),
        target=tuple(target),
        answers=(answer,),
        new_tokens=len(target) + 8,
        stop='\n',
        chance=count / len(said),
    )


def _next_line(tokenizer: Any, stretches: Stretches, number: int, length: int) -> Document:
    text, front = stretches.text(number, pieces=40), beginning(tokenizer)  # past any table
    room = length - len(front)
    behind = len(tokenizer.decode(stretches.tokens(number)[:room]))
    lines = (
        (match.start(), match[1]) for match in re.finditer(r'\n(.*)(?=\n)', text) if match.start() >= behind
    )
    end, line = next(((end, line) for end, line in lines if _is_code(line)), (0, ''))
    before = encode(tokenizer, text[:end])
    if len(before) < room:
        raise ValueError(f'piece {number} of {stretches.source} has no line of code behind {length} tokens')
    prompt = before[-room:]
    others = [edit(other, [line]) for other in tokenizer.decode(prompt).split('\n') if _is_code(other)]
    return Document(
        task=_named('code', stretches),
        id=f'code-{stretches.name}-{length}-{number}',
        prompt=(*front, *prompt),
        # the line's beginning belongs to it: tokens join it with the spaces that follow
        target=tuple(encode(tokenizer, f'\n{line}')),
        answers=(line,),
        metric='edit',
        new_tokens=64,
        stop='\n',
        chance=statistics.fmean(others or [0.0]),
    )


def _is_code(line: str) -> bool:
    """Whether a line is an assignment, a call or a statement with a block, not a comment or prose."""
    clean = line.strip()
    return len(clean) > 9 and bool(_STATEMENT.match(clean)) and not any(mark in line for mark in '`#')


def _planted(
    task: str,
    tokenizer: Any,
    numbers: Sequence[int],
    length: int,
    text: Text,
    *,
    plant_of: Callable[[random.Random], _Plant],
) -> list[Document]:
    """Documents with facts at random lines of a text."""
    stretches, asked_after = _stretches(text, tokenizer, length, numbers), task.endswith('_after')
    made = []
    for number in numbers:
        # the same facts with the question inside and after
        random_ = random.Random(f'{task.removesuffix("_after")} {number}')
        plant = plant_of(random_)
        question = encode(tokenizer, plant.question)
        front = [*beginning(tokenizer), *encode(tokenizer, plant.example)]
        facts = [encode(tokenizer, fact) for fact in plant.facts]
        behind = [] if asked_after else question
        room = length - sum(map(len, [front, behind, *facts]))
        if room < length // 4:
            raise ValueError(
                f'{task} needs a length of more than {(length - room) * 4 // 3} tokens, got {length}'
            )
        filled = _hidden(tokenizer, stretches.tokens(number)[:room], facts, random_)
        made.append(
            Document(
                task=_named(task, stretches),
                id=f'{task}-{stretches.name}-{length}-{number}',
                prompt=(*front, *filled, *behind),
                question=tuple(question) if asked_after else (),
                target=tuple(encode(tokenizer, plant.target)),
                answers=tuple(plant.answers),
                new_tokens=len(encode(tokenizer, plant.target)) + 2,
                stop='\n',
                chance=plant.chance,
            )
        )
    return made


def _hidden(tokenizer: Any, text: list[int], facts: Sequence[list[int]], random_: random.Random) -> list[int]:
    """The text with the facts in front of lines of it, at random depths and in order."""
    starts = list(line_starts(tokenizer, text))
    depths = sorted(random_.uniform(0, _DEEPEST) for _ in facts)
    places = [starts[bisect.bisect_right(starts, depth * len(text)) - 1] for depth in depths]
    pieces: list[int] = []
    for fact, begin, end in zip(facts, [0, *places], places, strict=False):
        pieces += [*text[begin:end], *fact]
    return [*pieces, *text[places[-1] :]]


def _stretches(text: Text, tokenizer: Any, tokens: int, numbers: Sequence[int]) -> Stretches:
    found = Stretches(text, tokenizer, tokens)
    if len(numbers) > len(found):
        raise ValueError(
            f'the text of {text} has room for {len(found)} documents of {tokens} tokens, {len(numbers)} were '
            f'asked for; lower the count or the length, or give a longer text'
        )
    return found


def _named(task: str, stretches: Stretches) -> str:
    """The task's name, with the text's where that is not the task's own."""
    return task if stretches.source == TEXTS[task] else f'{task}/{stretches.name}'


def _number(random_: random.Random) -> str:
    return str(random_.randrange(10 ** (_DIGITS - 1), 10**_DIGITS))


_one_needle = partial(_planted, plant_of=partial(_needles, hidden=1))
TASKS: dict[str, Callable[..., list[Document]]] = {
    'continuation': _continued,
    'needle': _one_needle,
    'needle_after': _one_needle,
    'needles': partial(_planted, plant_of=_needles),
    'variables': partial(_planted, plant_of=_chain),
    'words': _lists_of_words,
    'code': _programs,
}
"""What makes the documents of each task.

``continuation``
    Text that goes on, of which 128 tokens are compared.
``needle``, ``needle_after``
    A number hidden in a text. The question for it stands in the window that every method keeps; or it comes
    after the cut, in a block of its own.
``needles``
    Four numbers, one of which is asked for (RULER's niah_multikey).
``variables``
    A number that is passed from variable to variable, in lines hidden in a text. The names of all three are
    asked for, behind a worked example (RULER's variable tracking, one chain).
``words``
    The most frequent one of made-up words, as often as Zipf's law has it with exponent 1.2; chance is a word
    of the list. RULER asks for three: of models with 135 million parameters one alone is above chance.
``code``
    The next line of a program, scored by its similarity as in LongBench; chance is a line of the prompt.
"""
TEXTS = {task: PYTHON if task == 'code' else SHAKESPEARE for task in TASKS if task != 'words'}
"""The text that a task reads unless another one is given."""
