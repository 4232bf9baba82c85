"""Contestants are compared only when they are alike, and by the right ratios."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmark_kv_cache
import pytest
import torch
from cache_growth import BASE
from measuring import collection
from measuring.collection import SEGMENTS, Collection
from measuring.contestants import EAGER, contestant
from measuring.players import Player
from measuring.rounds import compared, require_equal_values, take_turns
from measuring.upstream import CACHES, Checkout, UpstreamPlayer, require_checkout

from testing.models import world_model_of

SMALL = replace(BASE, collectors=3, simulations=7, heads=3, embed=24)
BENCHMARK = Path(__file__).resolve().parents[2] / 'benchmarks' / 'benchmark_kv_cache.py'


def broken_checkout(folder: Path, package: str) -> Path:
    """A folder with the files of a built checkout, whose package holds ``package``."""
    for name in ('mcts/ctree/ctree_muzero/mz_tree.so', 'model/unizero_world_models/kv_cache_manager.py'):
        file = folder / 'lzero' / name
        file.parent.mkdir(parents=True)
        file.touch()
    (folder / 'lzero' / '__init__.py').write_text(package, encoding='utf-8')
    return folder


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'expected a checkout of LightZero .*found none; write the folder'):
        require_checkout(tmp_path)


def test_a_checkout_that_is_not_built_is_refused(tmp_path: Path) -> None:
    (broken_checkout(tmp_path, '') / 'lzero/mcts/ctree/ctree_muzero/mz_tree.so').unlink()
    with pytest.raises(ValueError, match=r'compiled tree search, found none; run\s.*build_ext --inplace'):
        require_checkout(tmp_path)


def test_the_command_refuses_it_in_one_line(tmp_path: Path, warm_python: str) -> None:
    command = [warm_python, str(BENCHMARK), '--upstream', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f'--upstream {tmp_path}: expected a checkout')


def test_what_was_measured_before_stays_in_the_file(tmp_path: Path) -> None:
    out = tmp_path / 'new' / 'bench.json'
    benchmark_kv_cache.write(
        out, {'shapes': {'atari': {'stock': 3}, 'memory': {}}, 'reanalysis': {'2/2/64': 5}}
    )
    benchmark_kv_cache.write(out, {'shapes': {'atari': {'floor': 2}}, 'collection': {}})
    assert json.loads(out.read_text()) == {
        'shapes': {'atari': {'floor': 2}, 'memory': {}},
        'reanalysis': {'2/2/64': 5},
        'collection': {},
    }


def test_what_a_worker_dies_of_is_told(tmp_path: Path) -> None:
    folder = broken_checkout(tmp_path, "raise ImportError('nothing works here')")
    with pytest.raises(RuntimeError, match=r'ended with code 1:\n[\s\S]*ImportError: nothing works here'):
        UpstreamPlayer(Checkout(folder), 'upstream', SMALL, {})


def test_a_worker_with_another_package_is_refused(tmp_path: Path) -> None:
    folder = broken_checkout(tmp_path, "__file__ = '/elsewhere/lzero/__init__.py'")
    with pytest.raises(RuntimeError, match=r'expected lzero of .*, got /elsewhere'):
        UpstreamPlayer(Checkout(folder), next(iter(CACHES)), SMALL, {})


def test_contestants_with_other_weights_are_refused() -> None:
    predicted = {cache: Player(contestant(SMALL, cache), SMALL.simulations).begin() for cache in EAGER}
    require_equal_values(predicted)
    assert len({round(value, 3) for value in predicted['stock']}) == SMALL.collectors
    other = contestant(SMALL, 'shift')
    with torch.no_grad():
        world_model_of(other.policy).head_value.head_module[0].weight.mul_(1.1)
    predicted['shift'] = Player(other, SMALL.simulations).begin()
    with pytest.raises(RuntimeError, match='expected the same values of the first roots'):
        require_equal_values(predicted)


def test_a_search_of_another_length_is_refused() -> None:
    player = Player(contestant(SMALL, 'shift'), SMALL.simulations)
    player.contestant.simulations = lambda number: setattr(
        player.contestant.policy._mcts_collect._cfg, 'num_simulations', min(number, 5)
    )
    with pytest.raises(RuntimeError, match=r'expected 7 simulations of each root, got \{5\}'):
        player.warm_up(1)


def test_turns_give_each_as_many_steps() -> None:
    players = [Player(contestant(SMALL, cache), SMALL.simulations) for cache in EAGER]
    rounds = take_turns(players, steps=2, threads=1)
    assert {name: len(times) for name, times in rounds.items()} == dict.fromkeys(EAGER, 2)


def test_ratios_are_those_of_the_same_round() -> None:
    """The machine is slower from the second round on; quotients of the medians would be 3.6 and 1."""
    rounds = {
        'stock': [(120.0, 20.0), (360.0, 60.0), (400.0, 30.0)],
        'shift': [(60.0, 5.0), (180.0, 15.0), (100.0, 12.0)],
        'floor': [(40.0, float('nan')), (120.0, float('nan')), (100.0, float('nan'))],
    }
    numbers = compared(rounds, 'shift', simulations=11)
    assert numbers['times_as_fast'] == 2.0
    assert numbers['over_floor'] == 1.5
    assert numbers['root_times_as_fast'] == 4.0
    assert numbers['step_ms']['median'] == 100.0
    assert numbers['simulation_ms'] == 8.0
    assert 'root_inference_ms' not in compared(rounds, 'floor', simulations=11)


@pytest.mark.parametrize('cache', ['stock', 'shift'])
def test_real_cartpole_is_collected(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are those that the environments took. How many that are is the host's: it goes round by round
    until it has enough segments, and an episode's end closes one early."""
    monkeypatch.setattr(collection, 'SEGMENT', 6)
    taken: list[int] = []
    with closing(Collection('cartpole', cache)) as collected:
        collected.segment()
        environments = collected._collector._env
        play = environments.step

        def step(actions: dict[int, Any]) -> Any:
            taken.append(len(actions))
            return play(actions)

        monkeypatch.setattr(environments, 'step', step)
        steps, seconds = collected.segment()
    assert steps == sum(taken) >= SEGMENTS
    assert seconds > 0
