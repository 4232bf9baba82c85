"""Scores of a generated answer in [0, 1]: those of RULER and of LongBench (Bai et al., 2024)."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Score = Callable[[str, Sequence[str], Sequence[str]], float]
"""Of a prediction, the right answers, and the classes of a classification."""

_PUNCTUATION = str.maketrans('', '', string.punctuation)


def found(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Part of the answers that occur in the prediction, in any case (RULER's ``string_match_all``)."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def found_any(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Whether one of the answers occurs in the prediction (RULER's ``string_match_part``)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def f1(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of the words, without case, punctuation and articles; the best answer counts."""
    said = _words(prediction)
    return max(
        _harmonic((Counter(said) & Counter(right)).total(), said, right) for right in map(_words, answers)
    )


def rouge_l(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """F1 of the longest common subsequence of words; the best answer counts."""
    said = prediction.split()
    return max(_harmonic(_common(said, right), said, right) for right in map(str.split, answers))


def edit(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Similarity ``2 M / T`` of the first line that is no comment, ``M`` matching characters of ``T``; the
    best answer counts."""
    lines = prediction.lstrip('\n').split('\n')
    line = next((line for line in lines if not any(mark in line for mark in ('`', '#', '//'))), '')
    return max(difflib.SequenceMatcher(None, line, answer, autojunk=False).ratio() for answer in answers)


def class_named(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """One divided by the classes that the prediction names, if the right one is among them; of a class whose
    name is a part of the right one's nothing is held against it. The best answer counts."""
    named = [one for one in classes if one in prediction]
    return max(_share_of_named(named, answer) for answer in answers)


def number(prediction: str, answers: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Part of the numbers in the prediction that are the number in the answer; the best answer counts."""
    said = re.findall(r'\d+', prediction)
    right = [re.findall(r'\d+', answer) for answer in answers]
    return max((said.count(one[0]) / len(said) for one in right if one and said), default=0.0)


SCORES: dict[str, Score] = {
    'found': found,
    'found_any': found_any,
    'f1': f1,
    'rouge_l': rouge_l,
    'edit': edit,
    'class_named': class_named,
    'number': number,
}
"""The score of each name that a document may have as its metric."""


def _words(text: str) -> list[str]:
    return re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(_PUNCTUATION)).split()


def _harmonic(common: int, said: Sequence[str], right: Sequence[str]) -> float:
    """F1 of ``common`` words."""
    return 2 * common / (len(said) + len(right)) if common else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before, row = row, [0]
        for index, other in enumerate(second):
            row.append(before[index] + 1 if word == other else max(before[index + 1], row[index]))
    return row[-1]


def _share_of_named(named: Sequence[str], answer: str) -> float:
    against = [one for one in named if one == answer or one not in answer]
    return 1 / len(against) if answer in against else 0.0
