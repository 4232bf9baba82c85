"""The parts of `make soak` that record and judge; the training itself is that of the Atari config."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import soak
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from soaking.judging import QUANTITIES, judge, passed, soak_table
from soaking.samples import Recorder, Sample, TimeIsUp, replay_bytes

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
FIRST = Sample(20.0, 600 * 2**20, 0, 3 * 2**20, 0.2, 90, 7, 50, 30, 0, 0)
RATIOS = {quantity.name: quantity.bound for quantity in QUANTITIES}


def run_of(count: int = 16, **growth: float) -> list[Sample]:
    """Samples in which fields grow by a fraction from the second quarter to the last, after a warm-up."""
    samples = []
    for number in range(count):
        changes = {
            name: getattr(FIRST, name) * (0.3 if number < count // 4 else 1 + by * (number >= 3 * count // 4))
            for name, by in growth.items()
        }
        samples.append(dataclasses.replace(FIRST, seconds=20.0 * (number + 1), **changes))
    return samples


@pytest.mark.parametrize(
    ('name', 'field', 'allowed', 'refused'),
    [
        ('memory without replay buffer', 'resident_bytes', 0.02, 0.04),
        ('pool bytes', 'pool_bytes', 0.0, 0.001),
        ('processor time of one search', 'search_seconds', 0.2, 0.3),
    ],
)
def test_each_quantity_has_a_bound(name: str, field: str, allowed: float, refused: float) -> None:
    for growth, expected in ((allowed, True), (refused, False)):
        samples = run_of(**{field: growth})
        judgements = judge(samples)
        (judgement,) = (found for found in judgements if found.quantity.name == name)
        assert judgement.ratio == pytest.approx(1 + growth)
        assert judgement.flat is expected
        assert passed(judgements, samples[-1]) is expected
        assert [found.flat for found in judgements].count(False) == (not expected)


def test_warm_up_and_what_shrinks_do_not_count() -> None:
    samples = run_of(resident_bytes=0.0, search_seconds=-0.5)
    assert samples[0].resident_bytes < samples[5].resident_bytes
    assert passed(judge(samples), samples[-1])


@pytest.mark.parametrize('change', [{'unexplained': 1}, {'cache_wrong': 1}, {'compared': 0}])
def test_a_failure_or_nothing_compared_does_not_pass(change: dict[str, int]) -> None:
    samples = run_of()
    assert passed(judge(samples), samples[-1])
    assert not passed(judge(samples), dataclasses.replace(samples[-1], **change))


def test_what_the_replay_buffer_holds_is_counted_apart() -> None:
    samples = run_of()
    for number in range(4, 16):
        held = number * 10 * 2**20
        samples[number] = dataclasses.replace(
            samples[number], replay_bytes=held, resident_bytes=samples[number].resident_bytes + held
        )
    assert passed(judge(samples), samples[-1])
    replay = SimpleNamespace(game_segment_buffer=[SimpleNamespace(obs_segment=np.zeros((7, 3, 5)))] * 2)
    assert replay_bytes(replay) == 2 * 7 * 3 * 5 * 8


def test_single_outliers_do_not_decide() -> None:
    samples = run_of(20)
    samples[-2] = dataclasses.replace(samples[-2], search_seconds=9.0, resident_bytes=10 * 2**30)
    assert passed(judge(samples), samples[-1])


@given(st.integers(0, 7))
def test_a_short_run_is_not_judged(count: int) -> None:
    with pytest.raises(ValueError, match=f'expected 8 samples or more to judge, got {count}; write a larger'):
        judge(run_of(16)[:count])


def test_a_quarter_without_searches_is_not_judged() -> None:
    samples = [dataclasses.replace(sample, search_seconds=None) for sample in run_of()]
    with pytest.raises(ValueError, match='expected values of processor time of one search in the second'):
        judge(samples)


def test_the_table_shows_what_grows() -> None:
    samples = run_of(search_seconds=0.5)
    console = Console(file=io.StringIO(), width=110)
    console.print(soak_table(judge(samples), samples[-1]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert '5 minutes of training' in text
    (row,) = (line for line in text.splitlines() if 'processor time' in line)
    assert [cell.strip() for cell in row.strip('│').split('│')][1:] == [
        '200.0 ms',
        '300.0 ms',
        '1.500',
        '1.25',
        'GROWS',
    ]


def test_the_end_is_shown_as_table_picture_and_one_line_of_json(tmp_path: Path) -> None:
    for samples, code in ((run_of(), 0), (run_of(resident_bytes=0.2), 1)):
        console = Console(file=io.StringIO(), width=110)
        assert soak.conclude(samples, tmp_path, console) == code
        assert isinstance(console.file, io.StringIO)
        numbers = json.loads(console.file.getvalue().splitlines()[-1])
        assert numbers['passed'] is (code == 0)
        assert numbers['memory_without_replay_buffer_ratio'] == pytest.approx(1.2 if code else 1.0)
        assert (numbers['compared'], numbers['unexplained'], numbers['cache_wrong']) == (50, 0, 0)
        assert matplotlib.image.imread(tmp_path / 'soak.png').shape[0] > 800
        lines = (tmp_path / 'samples.jsonl').read_text().splitlines()
        assert [Sample(**json.loads(line)) for line in lines] == samples


def test_a_run_that_cannot_be_judged_says_why(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=110)
    assert soak.conclude(run_of(16)[:3], tmp_path, console) == 1
    assert isinstance(console.file, io.StringIO)
    assert 'not judged: expected 8 samples or more to judge, got 3' in console.file.getvalue()


def test_time_ends_the_training_and_the_host_is_whole_again() -> None:
    from lzero_kv.lightzero.policy import KVPolicy

    before = vars(KVPolicy)['_forward_collect']
    recorder = Recorder(minutes=0.002, every_seconds=1.0, show=print)
    with pytest.raises(TimeIsUp), recorder.recording():
        assert vars(KVPolicy)['_forward_collect'] is not before
        recorder.progress.listener()  # too early
        time.sleep(0.15)
        recorder.progress.listener()
    assert vars(KVPolicy)['_forward_collect'] is before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--minutes', '0'], '--minutes and --every: expected above 0, got 0 and 20'),
        (['--every', '-1'], '--minutes and --every: expected above 0, got 30 and -1'),
        (['--rate', '1.5'], '--rate: expected a fraction above 0 and up to 1, got 1.5'),
        (['--mode', 'both'], "invalid choice: 'both'"),
    ],
)
def test_impossible_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        soak.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_short_soak_trains_and_compares() -> None:
    run = subprocess.run(
        [sys.executable, str(TOOLS / 'soak.py'), '--minutes', '2', '--every', '5', '--rate', '0.2'],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True,
    )  # fmt: skip
    numbers = json.loads(run.stdout.splitlines()[-1])
    assert numbers['compared'] > 0
    assert (numbers['unexplained'], numbers['cache_wrong']) == (0, 0)
    assert run.returncode == (0 if numbers['passed'] else 1)  # two minutes are within the warm-up


def test_memory_that_is_held_counts_and_memory_that_was_freed_does_not() -> None:
    """In a process of its own: beside other tests' threads and garbage 200 MiB once were 170."""
    measure = """
from soaking.memory import resident_bytes
before = resident_bytes()
held = [bytearray(b'x' * 2**16) for _ in range(200 * 2**4)]  # small enough to lie in the heap
grown = resident_bytes() - before
held.clear()
print(grown, resident_bytes() - before)
"""
    paths = os.pathsep.join([str(TOOLS), str(TOOLS.parent)])
    done = subprocess.run(
        [sys.executable, '-c', measure],
        env=os.environ | dict(PYTHONPATH=paths),
        capture_output=True,
        text=True,
        check=True,
    )
    grown, left = map(int, done.stdout.split()[-2:])
    assert grown > 0.9 * 200 * 2**20
    assert left < 0.2 * 200 * 2**20
