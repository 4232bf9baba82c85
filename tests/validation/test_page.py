"""The report of a validation: its verdict, its page, its picture and its numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from pydantic import TypeAdapter

from lzero_kv.telemetry.counters import Cause, Fault, ValidationCounters
from lzero_kv.validation.report import (
    VERDICTS,
    Failure,
    ModeRun,
    ValidationReport,
    plot_validation,
    validation_page,
)

from .drawn import COUNTS, WORDS, some_counters, validation_counters

RUN = ModeRun('store', some_counters(), collected=61, evaluated=17, iterations=13, simulations=8, seconds=2.6)
REPORT = ValidationReport(
    'configs/my_config.py',
    ('--smoke', '--seed', '3'),
    'lzero-kv validate configs/my_config.py -- --smoke --seed 3',
    {'torch': '2.13.0', 'LightZero': '0.2.0'},
    (RUN, dataclasses.replace(RUN, mode='model', counters=some_counters(2), notes=('the flag was off',))),
)


def with_counters(change: ValidationCounters, *failures: Failure) -> ValidationReport:
    return dataclasses.replace(
        REPORT, runs=(RUN, dataclasses.replace(RUN, counters=change, failures=failures))
    )


@st.composite
def runs(draw: st.DrawFn) -> ModeRun:
    failures = draw(st.lists(st.builds(Failure, WORDS, WORDS), max_size=2))
    return ModeRun(
        draw(st.sampled_from(['store', 'model'])),
        draw(validation_counters()),
        draw(COUNTS),
        draw(COUNTS),
        draw(COUNTS),
        draw(COUNTS),
        draw(st.floats(0, 1e4)),
        tuple(failures),
        tuple(draw(st.lists(WORDS, max_size=2))),
    )


# the first draw imports what it draws from, which a busy machine does slowly
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(runs(), max_size=2))
def test_json_gives_the_same_report(drawn: list[ModeRun]) -> None:
    report = dataclasses.replace(REPORT, runs=tuple(drawn))
    assert TypeAdapter(ValidationReport).validate_json(report.as_json()) == report


def test_everything_explained_passes() -> None:
    assert REPORT.passed
    assert REPORT.verdict == (
        'Passed: of 42 rows compared (roots 18, nodes 21, reanalysis 3) 24 are equal and in 18 the stock '
        'cache was wrong, each time for a proven cause; 0 are unexplained, and the cache was never wrong '
        '(its largest rounding error is 3e-07).'
    )


@pytest.mark.parametrize('fault', [None, Fault.PERTURBED])
def test_one_row_that_must_not_be_fails_all(fault: Fault | None) -> None:
    counters = some_counters()
    if fault is None:
        counters.roots.count_unexplained()
    else:
        counters.reanalysis.count_cache_wrong(fault)
    report = with_counters(counters)
    assert not report.passed
    assert report.verdict == (
        f'NOT passed: of 29 rows compared {int(fault is None)} differ without a proven cause, and in '
        f'{int(fault is not None)} the cache was wrong.'
    )


def test_a_mode_that_compared_no_node_has_not_passed() -> None:
    counters = ValidationCounters(searches=8)
    counters.roots.count_equal()
    report = with_counters(counters)
    assert not report.passed
    assert report.verdict == (
        'NOT passed: mode store compared no node in 8 searches: '
        'write a larger --env-steps, or a larger --rate.'
    )
    counters.roots.count_different([Cause.CRASHED])
    assert report.verdict == (
        'NOT passed: mode store compared no node in 8 searches: '
        "LightZero's own code crashed in 1 rows; write an env_num of all environments."
    )
    assert dataclasses.replace(REPORT, runs=()).verdict == 'NOT passed: no mode ran.'


def rows_of(page: str, first: str) -> list[list[str]]:
    lines = [line.strip('| ').split(' | ') for line in page.splitlines() if line.startswith(f'| {first} |')]
    return [cells[1:] for cells in lines]


def test_the_page_says_what_ran_what_was_found_and_how_to_repeat_it() -> None:
    page = validation_page(REPORT, 'validation.png')
    assert page.startswith(f'# Validation of lzero_kv: my_config.py\n\n**{REPORT.verdict}**\n')
    assert '![rows compared and causes](validation.png)' in page
    assert rows_of(page, 'torch') == [['2.13.0', '2.13.0']]
    assert rows_of(page, 'its arguments') == [['`--smoke --seed 3`'] * 2]
    assert rows_of(page, 'environment steps collected') == [['61', '61']]
    assert rows_of(page, 'environment steps evaluated') == [['17', '17']]
    assert rows_of(page, 'training iterations') == [['13', '13']]
    assert rows_of(page, 'searches (with nodes compared)') == [['11 (7)', '22 (14)']]
    assert rows_of(page, 'simulations of a search') == [['8', '8']]
    assert [row[:4] for row in rows_of(page, 'compared')] == [['6', '7', '1', '14'], ['12', '14', '2', '28']]
    assert [row[3] for row in rows_of(page, 'cause_root_lost')] == ['1', '2']
    assert rows_of(page, 'cause_crashed') == []
    assert [row[:4] for row in rows_of(page, 'policy_moved')] == [['-', '0.5', '-', '0.5']] * 2
    assert [row[:4] for row in rows_of(page, 'policy_moved_most')] == [['0', '0.75', '0', '0.75']] * 2
    assert [row[:4] for row in rows_of(page, 'largest_cache')] == [['1e-07', '3e-07', '0', '3e-07']] * 2
    assert '- mode model: the flag was off' in page
    assert '## Failures\n\nNone.\n' in page
    assert f'```bash\n{REPORT.command}\n```' in page


def test_the_page_names_each_failure_and_its_file() -> None:
    counters = some_counters()
    counters.nodes.count_cache_wrong(Fault.STALE_ENTRY)
    page = validation_page(
        with_counters(counters, Failure('out/a.pt', 'the cache is wrong (stale_entry)')), 'v.png'
    )
    assert '- mode store: the cache is wrong (stale_entry)\n  `lzero-kv explain out/a.pt`' in page
    assert 'None.' not in page
    assert 'None of them was saved.' in validation_page(with_counters(counters), 'v.png')


def test_every_table_of_the_page_is_whole() -> None:
    for block in validation_page(REPORT, 'validation.png').split('\n\n'):
        rows = [line for line in block.splitlines() if line.startswith('|')]
        assert len({line.count('|') - line.count('\\|') for line in rows}) <= 1, block


def test_without_the_stock_cache_nothing_is_said_of_it(tmp_path: Path) -> None:
    counters = ValidationCounters(searches=8, validated=8)
    counters.roots.count_equal()
    counters.nodes.count_equal()
    alone = dataclasses.replace(REPORT, runs=(dataclasses.replace(RUN, mode='recompute', counters=counters),))
    assert alone.verdict == (
        'Passed: of 2 rows compared (roots 1, nodes 1) 2 are equal to the recomputation, and the cache was '
        'never wrong (its largest rounding error is 0).'
    )
    page = validation_page(alone, 'v.png')
    assert "LightZero's own (stock) cache was not compared." in page
    assert 'A row with several causes' not in page
    assert [rows_of(page, name)[0][2] for name in ('compared', 'different', 'largest_stock')] == [
        '2',
        '-',
        '-',
    ]
    one, two = (
        matplotlib.image.imread(plot_validation(report, tmp_path / 'v.png'))
        for report in (alone, dataclasses.replace(REPORT, runs=(*alone.runs, RUN)))
    )
    share = len(one[0]) // 2
    assert (one[60:-60, share:, :3] < 0.5).any() and (two[60 : len(two) // 2 - 30, share:, :3] == 1).all()
    counters.nodes.count_cache_wrong(Fault.STALE_ENTRY)
    assert alone.verdict == 'NOT passed: of 3 rows compared in 1 the cache was wrong.'


def test_the_picture_shows_each_mode(tmp_path: Path) -> None:
    counters = some_counters()
    counters.nodes.count_unexplained()
    counters.roots.count_cache_wrong(Fault.STALE_ENTRY)
    picture = matplotlib.image.imread(plot_validation(with_counters(counters), tmp_path / 'validation.png'))
    bands = np.array_split(picture[:, : picture.shape[1] // 2, :3], 2)
    found = {
        verdict: [
            bool((np.abs(band - np.array(to_rgb(colour))).max(axis=2) < 0.02).sum() > 400) for band in bands
        ]
        for verdict, colour in VERDICTS.items()
    }
    # 400 pixels are more than the sample in the legend.
    assert found == {
        'equal': [True, True],
        'different': [True, True],
        'unexplained': [False, True],
        'cache_wrong': [False, True],
    }


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=5)
@given(st.lists(runs(), min_size=1, max_size=2))
def test_any_report_can_be_written(tmp_path: Path, drawn: list[ModeRun]) -> None:
    report = dataclasses.replace(REPORT, runs=tuple(drawn))
    assert report.verdict in validation_page(report, 'v.png')
    assert plot_validation(report, tmp_path / 'v.png').read_bytes().startswith(b'\x89PNG')


def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'cannot write the picture to .*: No such file or directory'):
        plot_validation(REPORT, tmp_path / 'missing' / 'validation.png')
