"""`lzero-kv report` as a person runs it."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import matplotlib.image
import pytest

from lzero_kv.cli import main
from lzero_kv.telemetry.metrics import METRICS

from .driving import write_experiment, write_stock_experiment


def run(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [python, '-m', 'lzero_kv.cli', *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_report_prints_tables_and_writes_the_plot(tmp_path: Path, warm_python: str) -> None:
    folder = write_experiment(tmp_path / 'exp')
    done = run(warm_python, 'report', tmp_path / 'exp')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f'log: {folder}, 120 environment steps, 42 training iterations'
    assert lines[-1] == f'plot: {tmp_path / "exp" / "kv_cache.png"}'
    queries = [line.replace(' ', '').strip('│').split('│') for line in lines if line.startswith('│ queries')]
    meaning = METRICS['queries'].sentence.replace(' ', '')  # told once
    assert queries == [['queries', '120', '600', '720', meaning], ['queries', '20', '100', '120']]
    assert matplotlib.image.imread(tmp_path / 'exp' / 'kv_cache.png').shape[2] == 4


def test_out_names_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(tmp_path / 'exp', points=2)
    assert main(['report', str(tmp_path / 'exp' / 'log'), '--out', str(tmp_path / 'chosen.png')]) == 0
    assert (tmp_path / 'chosen.png').is_file()
    assert not (tmp_path / 'exp' / 'log' / 'kv_cache.png').exists()
    assert capsys.readouterr().out.splitlines()[-1] == f'plot: {tmp_path / "chosen.png"}'


def test_a_log_of_one_point_has_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(tmp_path, points=1)
    assert main(['report', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert 'Whole run' in out and 'Last point' not in out


def test_every_run_of_a_parent_gets_its_own_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_experiment(tmp_path / name, points=2) for name in ('a', 'b')]
    stock = write_stock_experiment(tmp_path / 'c')
    assert main(['report', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for folder in folders:
        assert f'log: {folder}, ' in out
        assert f'plot: {folder.parent.parent / "kv_cache.png"}' in out
        assert (folder.parent.parent / 'kv_cache.png').is_file()
    assert f'{stock}: no chart of the KV cache, left out' in out


def test_a_resumed_run_in_the_same_folder_is_a_run_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Six points and four: the second training makes the first one's steps again."""
    folder = write_experiment(tmp_path, points=6)
    time.sleep(1.1)  # TensorBoard names its files by the second
    write_experiment(tmp_path, points=4)
    assert main(['report', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = [line.replace(' ', '') for line in out.splitlines() if line.startswith('│ queries')]
    queries = [line.split('│')[2] for line in lines]
    assert queries == ['120', '20', '80', '20']
    assert out.count(f'log: {folder}, ') == 2
    for number, file in enumerate(sorted(folder.glob('events*')), 1):
        assert f'run {number} of 2 in its folder, told apart by file: {file.name}' in out
        assert (tmp_path / f'kv_cache_{number}.png').is_file()
    assert main(['report', str(file), '--out', str(tmp_path / 'second.png')]) == 0
    assert 'log: ' in capsys.readouterr().out


def test_a_log_of_a_training_without_the_plugin_says_what_to_write(tmp_path: Path, warm_python: str) -> None:
    write_stock_experiment(tmp_path)
    done = run(warm_python, 'report', tmp_path)
    assert done.returncode == 1
    assert done.stdout == ''
    assert 'Traceback' not in done.stderr
    assert f'lzero-kv: {tmp_path}: the log has no chart of the KV cache' in done.stderr
    for words in ('use_new_cache_manager=True', "'lzero_kv.plugin'", 'lzero-kv doctor CONFIG.py'):
        assert words in done.stderr


@pytest.mark.parametrize(
    ('make', 'arguments', 'message'),
    [
        (False, ['missing'], 'is not a folder; give the experiment folder'),
        (False, ['.'], 'no TensorBoard event file'),
        (True, ['a', '--out', 'missing/plot.png'], 'cannot write the plot to missing/plot.png'),
        (True, ['a', '--out', 'plot.pdf'], 'must be a .png file'),
        (True, ['.', '--out', 'plot.png'], '--out is for one run, but . holds 2'),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: bool,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if make:
        for name in ('a', 'b'):
            write_experiment(Path(name), points=1)
    assert main(['report', *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith('lzero-kv: ')
    assert error.count('\n') == 1
    assert message in error
    assert list(tmp_path.rglob('*.png')) == []
