"""`lzero-kv config`: copies of the configs stand on their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lzero_kv.cli import main
from lzero_kv.cli.config import config_texts

ROOT = Path(__file__).resolve().parents[2]
NAMES = ['atari', 'atari_ddp', 'atari_segment', 'cartpole', 'memory', 'memory_recall', 'pendulum']
COPY_AND_ASK = """
import contextlib, io
from pathlib import Path
from lzero_kv.cli import main
for name in {names}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(['config', name]) == 0
    Path(name + '.py').write_text(text.getvalue())
    main(['doctor', name + '.py', '--', '--smoke'])
"""


def test_a_copy_in_an_empty_folder_engages(tmp_path: Path, warm_python: str) -> None:
    done = subprocess.run(
        [warm_python, '-c', COPY_AND_ASK.format(names=NAMES)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    verdicts = [line for line in done.stdout.splitlines() if line.startswith('The plugin')]
    assert verdicts == [f'The plugin would engage for {name}.py.' for name in NAMES], done.stderr


def test_the_first_lines_say_how_to_see_that_it_is_on() -> None:
    assert list(config_texts()) == NAMES
    for text in config_texts().values():
        assert text.index('Is it on? One line of the log says so') < 400


def test_names_are_listed_and_a_wrong_one_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['config']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert lines[3].startswith("cartpole        UniZero on CartPole with lzero_kv's cache: vector")
    assert main(['config', 'cartpol']) == 1
    assert capsys.readouterr().err == "lzero-kv: there is no config 'cartpol'; did you mean 'cartpole'?\n"
