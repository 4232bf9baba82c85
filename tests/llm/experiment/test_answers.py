"""Scores of answers against values worked out by hand."""

from __future__ import annotations

import pytest

from lzero_kv.llm.experiment.scoring import SCORES

CASES = [
    ('found', 'it is 123 or QUITE so', ['123', '456', 'quite'], (), 2 / 3),
    ('found_any', 'it is 123', ['999', '123'], (), 1.0),
    ('found_any', 'it is 12', ['999', '123'], (), 0.0),
    # words: said {red, fox, jumped} of {red, fox}: precision 2/3, recall 1
    ('f1', 'The red fox, jumped!', ['a Red fox', 'nothing here'], (), 0.8),
    ('f1', 'fox fox fox', ['fox'], (), 0.5),
    ('f1', '', ['fox'], (), 0.0),
    # common subsequence: the mat (2) of 3 and 4 words
    ('rouge_l', 'the red mat', ['the cat mat sat'], (), 4 / 7),
    ('rouge_l', 'mat the', ['the mat'], (), 0.5),
    ('rouge_l', '', ['the mat'], (), 0.0),
    ('edit', '\n# a comment\nreturn x\nmore', ['return x'], (), 1.0),
    # 6 matching characters of 6 + 8
    ('edit', 'return', ['return x'], (), 12 / 14),
    ('edit', '# only comments', ['x'], (), 0.0),
    ('class_named', 'Animal or Plant', ['Animal'], ('Animal', 'Plant', 'Stone'), 0.5),
    ('class_named', 'Other animal', ['Other animal'], ('animal', 'Other animal'), 1.0),
    ('class_named', 'Stone', ['Animal'], ('Animal', 'Stone'), 0.0),
    ('number', 'Paragraph 12, perhaps 7', ['Paragraph 12'], (), 0.5),
    ('number', 'none', ['4'], (), 0.0),
]


@pytest.mark.parametrize(('name', 'prediction', 'answers', 'classes', 'expected'), CASES)
def test_score(name, prediction, answers, classes, expected):
    assert SCORES[name](prediction, answers, classes) == pytest.approx(expected)


def test_every_score_has_a_case_of_more_than_nothing():
    assert {case[0] for case in CASES if case[-1] > 0} == set(SCORES)
