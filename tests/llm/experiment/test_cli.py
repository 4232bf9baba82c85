"""`lzero-kv llm run` on a tiny real model: rows, resuming, an interrupt, refusals; the tools."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lzero_kv.cli import main
from lzero_kv.cli.llm import _parsed, duration
from lzero_kv.sweep.rows import ROWS, read_rows

ROOT = Path(__file__).resolve().parents[3]
METHODS = ['full', 'cake attention_based 0.9', 'h2o attention_based 0.9']


@pytest.fixture(scope='module')
def checkpoint(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer as a folder."""
    folder = tmp_path_factory.mktemp('checkpoint')
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(checkpoint: Path, story: Path, out: Path, *more: str) -> list[str]:
    return [
        *(
            'llm',
            'run',
            '--model',
            str(checkpoint),
            '--data',
            str(story),
            '--algorithm',
            'full',
            'cake',
            'h2o',
        ),
        *('--ratios', '0.9', '--length', '90', '--documents', '3', '--seed', '2', '--out', str(out), *more),
    ]


def process(python: str, arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        [python, '-m', 'lzero_kv.cli', *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_sweep_ends_with_table_and_report_and_is_not_repeated(
    checkpoint: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = words(checkpoint, story, tmp_path, '--tasks', 'continuation', 'needle', '--speed', '1')
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert '7 documents x 3 methods, 21 rows\n' in shown
    assert shown.rstrip().endswith(f'report: {tmp_path / "report.md"}')
    header, rows = read_rows(tmp_path)
    assert header['methods'] == METHODS
    assert [row['method'] for row in rows] == METHODS * 7
    assert [row['task'] for row in rows[::3]] == ['continuation/story', 'needle/story'] * 3 + ['speed']
    kls = {row['method']: row['kl'] for row in rows[:3]}
    assert kls['full'] == 0 < min(kls[METHODS[1]], kls[METHODS[2]])
    assert all(row['next_token'] > 0 for row in rows[-3:])
    before = (tmp_path / ROWS).read_bytes()
    assert main(arguments) == 0
    assert '21 rows; 7 documents are there already\n' in capsys.readouterr().out
    assert (tmp_path / ROWS).read_bytes() == before


def test_another_grid_is_refused_with_what_differs(
    tmp_path: Path, story: Path, capsys: pytest.CaptureFixture
) -> None:
    none = tmp_path / 'no model'
    assert main(words(none, story, tmp_path)) == 1
    assert "got '" in capsys.readouterr().err  # the model, which is looked for behind the folder
    assert main(words(none, story, tmp_path, '--ratios', '0.9', '0.95', '--seed', '3')) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f'lzero-kv: {tmp_path / ROWS} holds another sweep:'
    assert said[1:3] == [
        '  seed: 2 in the file, 3 now',
        '  methods: added "cake attention_based 0.95", "h2o attention_based 0.95"',
    ]


def test_seconds_of_another_device_are_refused(
    tmp_path: Path, story: Path, capsys: pytest.CaptureFixture
) -> None:
    for speed, device, refused in (
        (1, 'cpu', False),
        (1, 'meta', True),
        (0, 'cpu', False),
        (0, 'meta', False),
    ):
        arguments = words(tmp_path / 'no model', story, tmp_path / str(speed))
        assert main([*arguments, '--speed', str(speed), '--device', device]) == 1
        assert ('device: "cpu" in the file, "meta" now' in capsys.readouterr().err) == refused


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        (['--algorithm', 'cakes'], "algorithm: expected one of .* got 'cakes'; did you mean 'cake'?"),
        (['--allocation', 'even'], "allocation: expected one of .* got 'even'"),
        (['--tasks', 'needel'], "tasks: expected one of .* got 'needel'; did you mean 'needle'?"),
        (['--ratios', '0.5', '1.5'], 'ratios: expected numbers greater than 0 and at most 1, got 1.5'),
        (
            ['--ratios', '0.25'],
            'cake attention_based 0.25: window=64, sinks=4 and minimum=8 of a layer need 76 slots, the '
            'budget for 90 tokens has 23; write ratio=0.845 or more',
        ),
        (
            ['--data', 'nowhere.txt'],
            "data: expected 'shakespeare', 'python', a file or a folder, got 'nowhere",
        ),
        (['--parameters', 'gamma'], '--parameters: expected NAME=VALUE,VALUE..., got gamma'),
        (['--parameters', 'gama=3'], "parameters.gama: there is no such field .*; did you mean 'gamma'?"),
        (['--parameters', 'ratio=0.5'], 'parameters.ratio: it has a word of its own; write ratios'),
        (['--parameters', 'mix=0.5'], 'parameters: none of the methods reads mix'),
        (['--parameters', 'gamma=-1'], 'gamma: expected a number of at least 0, got -1'),
        (['--methods', 'h2o heavy_ratio=0.1'], 'heavy_ratio: it needs the other one'),
        (['--ratios', '0.83'], 'minimum=8 of a layer need 76 slots, the budget for 90 tokens has 75'),
        (
            ['--methods', 'h2o heavy_ratio=0.08 recent_ratio=0.2'],
            'window=18, sinks=4 and minimum=8 of a layer need 30 slots, .* has 29; write heavy_ratio=0.089',
        ),
        (['--documents', '0'], 'documents: expected an integer of at least 1, got 0'),
        (['--dtype', 'int8'], r"dtype: expected one of \['float32', .* got 'int8'"),
        (['--grid', 'grid.yaml'], r'a grid must be a file that ends in .toml or .json, got grid.yaml'),
        (['--device', 'gpu'], "--device: expected a device of torch such as cpu or cuda:0, got 'gpu'"),
    ],
)
def test_wrong_words_are_refused_before_the_model_is_looked_for(
    flags: list[str], expected: str, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(words(tmp_path / 'no model', story, tmp_path / 'out', *flags)) == 1
    said = capsys.readouterr()
    assert re.search(expected, said.err), said.err
    assert 'loading' not in said.out
    assert not (tmp_path / 'out').exists()


def test_a_parameter_that_is_given_again_adds_to_its_values() -> None:
    assert _parsed(('gamma=0.8', 'window=16', 'gamma=200,3')) == dict(gamma=[0.8, 200, 3], window=[16])


def test_several_mistakes_are_told_at_once(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = words(tmp_path, story, tmp_path / 'out', '--ratios', '0', '--documents', '-1')
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert '2 mistake(s) in sweep:' in said
    assert 'ratios: expected' in said and 'documents: expected' in said


def test_only_the_first_process_of_a_torchrun_speaks(
    checkpoint: Path,
    story: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('RANK', '1')
    assert main(words(checkpoint, story, tmp_path, '--documents', '1')) == 0
    assert capsys.readouterr().out == ''
    assert [path.name for path in sorted(tmp_path.iterdir())] == ['claims.lock', ROWS]


def wait_for_rows(folder: Path, count: int, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while not (folder / ROWS).exists() or (folder / ROWS).read_bytes().count(b'\n') <= count:
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.002)


def test_an_interrupted_sweep_says_how_to_go_on(
    checkpoint: Path, story: Path, tmp_path: Path, warm_python: str
) -> None:
    running = process(warm_python, words(checkpoint, story, tmp_path, '--documents', '16'))
    wait_for_rows(tmp_path, len(METHODS))
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=600)
    assert running.returncode == 130
    assert said[1].endswith('lzero-kv: interrupted; the same command goes on where it stopped\n')


@pytest.mark.parametrize('name', ['grid.toml', 'grid.json'])
def test_a_grid_in_a_file_and_flags_that_go_before_it(
    name: str, checkpoint: Path, story: Path, tmp_path: Path
) -> None:
    grid = dict(
        model='elsewhere', algorithm=['cake', 'snapkv', 'hace'], ratios=[0.5], allocation='uniform',
        data=str(story), parameters=dict(gamma=[0.8, 200], window=16),
        methods='h2o heavy_ratio=0.2 recent_ratio=0.1 uniform', documents=1, length=90,
    )  # fmt: skip
    toml = ''.join(f'{key} = {json.dumps(value)}\n' for key, value in grid.items() if key != 'parameters')
    toml += '[parameters]\ngamma = [0.8, 200]\nwindow = 16\n'
    (tmp_path / name).write_text(json.dumps(grid) if name.endswith('json') else toml)
    flags = ['--grid', str(tmp_path / name), '--model', str(checkpoint), '--algorithm', 'cake', 'snapkv']
    assert main(['llm', 'run', *flags, '--out', str(tmp_path / 'out')]) == 0
    header, rows = read_rows(tmp_path / 'out')
    assert header['methods'] == [
        'full',
        'cake uniform gamma=0.8 window=16 0.5',
        'cake uniform gamma=200 window=16 0.5',
        'snapkv uniform window=16 0.5',
        'h2o uniform heavy_ratio=0.2 recent_ratio=0.1',
    ]
    assert [sum(row['slots']) for row in rows[1:]] == [3 * 45, 3 * 45, 3 * 45, 3 * (4 + 18 + 9)]


def test_the_configuration_of_a_cake_experiment_is_a_grid(
    checkpoint: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = {
        'cake_experiment_config': {
            'h2o_ratios': [0.2, 0.3],
            'layer_allocation_strategies': ['uniform', 'adaptive'],
            'cache_budgets': [0.4, 60],
        },
        'cake_model_specific_config': {'window_size': 16, 'gamma': 0.8},
    }
    (tmp_path / 'cake.json').write_text(json.dumps(grid))
    common = ['--model', str(checkpoint), '--data', str(story), '--length', '90', '--documents', '1']
    arguments = ['llm', 'run', '--grid', str(tmp_path / 'cake.json'), '--out', str(tmp_path / 'out'), *common]
    assert main(arguments) == 0
    header, rows = read_rows(tmp_path / 'out')
    assert header['methods'] == [
        'full',
        'h2o uniform heavy_ratio=0.2 recent_ratio=0.2 sinks=0',
        'hace uniform gamma=0.8 sinks=0 window=16 0.4',
        'h2o uniform heavy_ratio=0.3 recent_ratio=0.3 sinks=0',
        'hace uniform gamma=0.8 sinks=0 window=16 0.6',
        'cake uniform gamma=0.8 sinks=0 window=16 0.4',
        'cake uniform gamma=0.8 sinks=0 window=16 tokens=60',
        'cake adaptive gamma=0.8 sinks=0 window=16 0.4',
        'cake adaptive gamma=0.8 sinks=0 window=16 tokens=60',
    ]
    assert [sum(row['slots']) for row in rows] == [270, 108, 108, 162, 162, 108, 180, 108, 180]
    grid['cake_experiment_config']['cake_enable'] = True
    (tmp_path / 'cake.json').write_text(json.dumps(grid))
    assert main(arguments) == 1
    assert "cake_enable: there is no such field; did you mean 'cake_enabled'?" in capsys.readouterr().err


def test_records_bring_tasks_of_their_own(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = dict(
        dataset='hotpotqa', input='Who sees?', context='The fox sees the river. ' * 9, answers=['The fox']
    )
    (tmp_path / 'hotpotqa.jsonl').write_text(json.dumps(record) + '\n')
    arguments = words(checkpoint, tmp_path / 'hotpotqa.jsonl', tmp_path / 'out')
    assert main(arguments) == 0
    rows = read_rows(tmp_path / 'out')[1]
    assert {row['task'] for row in rows} == {'longbench/hotpotqa'}
    assert 'longbench/hotpotqa: 1 documents' in capsys.readouterr().out


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (7.4, 89, 700, 9000)] == ['7 s', '89 s', '12 min', '2.5 h']


def run_tool(python: str, name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, str(ROOT / 'tools' / name), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=300,
    )


def test_quick_check_of_tiny_models_ends_with_all_of_them(warm_python: str) -> None:
    done = run_tool(warm_python, 'quick_cake_test.py', '--skip-model')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == '5/5'
    assert [line.split()[0] for line in lines[:5]] == ['ok'] * 5
    assert all(line.endswith('(llama, mistral, qwen2)') for line in lines[:5])


def test_quick_check_names_what_is_missing(tmp_path: Path, warm_python: str) -> None:
    done = run_tool(warm_python, 'quick_cake_test.py', '--model', str(tmp_path / 'none'))
    assert done.returncode == 1
    assert '--skip-model checks tiny models alone' in done.stderr
    assert 'Traceback' not in done.stderr


def test_run_experiment_takes_the_same_words(
    checkpoint: Path, story: Path, tmp_path: Path, warm_python: str
) -> None:
    arguments = words(checkpoint, story, tmp_path, '--documents', '1')[2:]
    done = run_tool(warm_python, 'run_experiment.py', *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith(f'report: {tmp_path / "report.md"}')


@pytest.mark.slow
def test_quick_check_of_the_real_model() -> None:
    done = run_tool(sys.executable, 'quick_cake_test.py')
    assert done.stdout.splitlines()[-1] == '10/10', done.stdout + done.stderr
