"""The parts of `make demo` that show and count; the training itself is that of the Atari config."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from demonstration.display import Display, hit_rates, show_failure, show_result
from demonstration.progress import TrainingProgress
from demonstration.watch import watching
from ding.envs import BaseEnvManager
from ding.worker import BaseLearner
from lzero.worker import MuZeroCollector, MuZeroEvaluator

from lzero_kv.cli.training import around

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SIZE = {'max_env_step': 40, 'replay_ratio': 0.1}
WATCHED = [
    (MuZeroCollector, 'collect'),
    (MuZeroEvaluator, 'eval'),
    (BaseEnvManager, 'step'),
    (BaseLearner, 'train'),
]


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


def test_the_host_is_whole_again_after_watching() -> None:
    before = [vars(owner)[name] for owner, name in WATCHED]
    with pytest.raises(KeyError), watching(TrainingProgress()):
        assert all(
            vars(owner)[name] is not method for (owner, name), method in zip(WATCHED, before, strict=True)
        )
        raise KeyError
    assert [vars(owner)[name] for owner, name in WATCHED] == before


def test_a_replaced_method_is_called_around_the_original() -> None:
    class Counter:
        def add(self, number: int) -> int:
            return number + 1

    with around(Counter, 'add', lambda original, self, number: 10 * original(self, number)):
        assert Counter().add(1) == 20
    assert Counter().add(1) == 2


def test_without_a_terminal_a_line_tells_each_new_phase(screen: io.StringIO) -> None:
    display = Display(screen, SIZE)
    with display.running('UniZero on Pong'):
        display.progress.phase, display.progress.collected_steps = 'collecting', 12
        display._drawn = -1.0
        display.progress.listener()
    lines = screen.getvalue().splitlines()
    assert lines[0] == 'UniZero on Pong'
    assert '12 environment steps' in lines[2]
    assert 'collecting' in lines[2]


def test_hit_rates_are_those_of_pools_that_were_asked() -> None:
    summary = {'roots': {'queries': 4, 'hit_rate': 0.75}, 'nodes': {'queries': 0, 'hit_rate': 0.0}}
    assert hit_rates(summary) == 'hit rate: roots 75.0 %'
    assert hit_rates({}) == ''


def test_a_failure_shows_the_last_lines_and_the_log(screen: io.StringIO, tmp_path: Path) -> None:
    log = tmp_path / 'host.log'
    log.write_text('[INFO] the last word of the host\n')
    display = Display(screen, SIZE)
    show_failure(display.console, ValueError('no [such] game'), log)
    assert 'the last word of the host' in screen.getvalue()
    assert 'The demo failed: ValueError: no [such] game' in screen.getvalue()
    assert 'ValueError: no [such] game' in log.read_text()


def test_a_cache_that_served_nothing_is_no_success(screen: io.StringIO, tmp_path: Path) -> None:
    assert show_result(Display(screen, SIZE), tmp_path) == 1
    assert 'the cache served nothing' in screen.getvalue()


def test_all_output_but_that_to_the_screen_goes_into_the_file(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from demonstration.quiet import output_into
with output_into(Path(sys.argv[1])) as screen:
    print('printed'); print('complained', file=sys.stderr); os.write(1, b'from C'); screen.write('shown\\n')
print('after')
"""
    log = tmp_path / 'log'
    run = subprocess.run([sys.executable, '-c', code, str(log)], cwd=TOOLS, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ('shown\nafter\n', '')
    assert all(word in log.read_text() for word in ('printed', 'complained', 'from C'))
