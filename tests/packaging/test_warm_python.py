"""The stand-in for `python` behaves as the interpreter does, and knows nothing of who started it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLD = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get('COLOUR'), sys.path[0], __name__, sys.stdin.read())
print('aside', file=sys.stderr)
"""


@pytest.mark.parametrize(
    'arguments',
    [['-c', TOLD, 'one', '-m'], ['script.py', 'one', '-c'], ['-m', 'script', 'two']],
    ids=lambda arguments: arguments[0],
)
def test_what_a_program_sees_is_what_the_interpreter_shows_it(
    arguments: list[str], tmp_path: Path, warm_python: str
) -> None:
    (tmp_path / 'script.py').write_text(TOLD)
    told = [
        subprocess.run(
            [python, *arguments], cwd=tmp_path, env=os.environ | dict(COLOUR='grey'), input='typed',
            capture_output=True, text=True,
        )
        for python in (sys.executable, warm_python)
    ]  # fmt: skip
    expected, found = ((done.returncode, done.stdout, done.stderr) for done in told)
    assert found == expected
    assert 'typed' in found[1]


@pytest.mark.parametrize(
    ('code', 'status', 'said'),
    [
        ('import sys; sys.exit(3)', 3, ''),
        ('import sys; sys.exit("no")', 1, 'no\n'),
        ('import os; os._exit(7)', 7, ''),
        ('import os, signal; os.kill(os.getpid(), signal.SIGTERM)', -signal.SIGTERM, ''),
        ('import atexit, sys; atexit.register(sys.stderr.write, "last")', 0, 'last'),
    ],
)
def test_it_ends_as_the_program_ends(code: str, status: int, said: str, warm_python: str) -> None:
    done = subprocess.run([warm_python, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_the_search_path_is_the_callers(tmp_path: Path, warm_python: str) -> None:
    (tmp_path / 'only_here.py').write_text('')
    code = 'import sys, only_here; sys.exit(not {"lzero_kv", "tests", "_pytest"}.isdisjoint(sys.modules))'
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    assert subprocess.run([warm_python, '-c', code], env=environment).returncode == 0
    failed = subprocess.run([warm_python, '-c', code], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.endswith("No module named 'only_here'\n")


def test_a_program_does_not_outlive_its_caller(warm_python: str) -> None:
    code = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'
    with subprocess.Popen([warm_python, '-c', code], stdout=subprocess.PIPE, text=True) as caller:
        program = Path('/proc') / caller.stdout.readline().strip()
        assert program.exists()
        caller.kill()
    wait_until(lambda: not program.exists())


def test_an_interrupt_reaches_the_program(warm_python: str) -> None:
    code = """
import sys, time
try:
    print('waits', flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(5)
"""
    with subprocess.Popen([warm_python, '-c', code], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout.readline() == 'waits\n'
        caller.send_signal(signal.SIGINT)
        assert caller.wait(timeout=60) == 5


def test_the_server_ends_with_its_starter(tmp_path: Path) -> None:
    """Also where the starter has no time to end it."""
    start = (
        'import os, pathlib, sys; from testing.warm_python import warm_python\n'
        'warm_python(pathlib.Path(sys.argv[1])).__enter__(); os._exit(0)'
    )
    subprocess.run([sys.executable, '-c', start, str(tmp_path)], cwd=ROOT, check=True)

    def refuses() -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            return caller.connect_ex(str(tmp_path / 'socket')) == errno.ECONNREFUSED

    wait_until(refuses)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)
