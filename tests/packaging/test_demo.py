"""The parts of `make demo` that show and count; the training itself is that of the Atari config."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demonstration.display import Display, hit_rates, show_failure, show_result, stock_table
from demonstration.progress import COMPARED, STEPS, TrainingProgress
from demonstration.stock import Search, compare
from demonstration.watch import watching
from ding.envs import BaseEnvManager
from ding.worker import BaseLearner
from lzero.worker import MuZeroCollector, MuZeroEvaluator

import lzero_kv
from lzero_kv.cli.training import around
from lzero_kv.lightzero.policy import KVPolicy
from testing.models import make_policy

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SIZE = {'max_env_step': 40, 'replay_ratio': 0.1, 'collector_env_num': 2, 'max_episode_steps': 7}
WATCHED = [
    (MuZeroCollector, 'collect'),
    (MuZeroEvaluator, 'eval'),
    (KVPolicy, '_forward_collect'),
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
    assert 'loading' in lines[2]
    assert '12 environment steps' in lines[3]
    assert 'collecting' in lines[3]


def test_the_time_that_is_left_follows_from_what_was_done(screen: io.StringIO) -> None:
    display = Display(screen, SIZE)  # 20 batches, 14 of evaluation, 4 iterations as long as 40, then 280
    assert display.left == ''
    display._began, display.started = 0.0, display.started - 30.0
    display.progress.searches_done, display.progress.train_iterations = 20, 1
    assert display.left == 'about 5 min left'  # 324 batches of a second
    display.progress.searches_done = 350
    assert display.left == 'about 0 s left'


@pytest.fixture
def policy() -> Iterator[Any]:
    yield make_policy('tiny', kv=True, num_simulations=6, collector_env_num=3)
    lzero_kv.uninstall()


def test_searches_are_made_again_with_each_cache(policy: Any, screen: io.StringIO) -> None:
    """Every root and node is compared; LightZero's heads start at zero, so its latent states are equal."""
    weights = policy._collect_model.state_dict()
    zeros = {name: torch.zeros_like(one) for name, one in weights.items() if 'head_observations' in name}
    policy._collect_model.load_state_dict(weights | zeros)
    drawn, heard = np.random.default_rng(0), []
    searches = [
        Search(
            torch.from_numpy(drawn.standard_normal((3, 7), dtype=np.float32)),
            ([np.ones(5, dtype=np.int8)] * 3, 1.0, [-1] * 3, 0.0),
            dict(ready_env_id=np.arange(3), timestep=[step] * 3),
        )
        for step in range(2)
    ]
    beside = compare(policy, searches, 0, heard.append)
    assert sum(heard) * STEPS == COMPARED * len(searches)
    assert beside.stock > 0 < beside.own
    found = beside.counters.total
    assert found.compared == len(searches) * 3 * (1 + 6)
    assert found.different > 0 == found.failures
    display = Display(screen, SIZE)
    display.console.print(stock_table(beside))
    shown = screen.getvalue()
    assert f'{found.different}' in shown and 'equal_latents' in shown


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
