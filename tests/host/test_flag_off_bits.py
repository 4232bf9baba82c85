"""With the plugin imported and the flag off, a training on real Pong equals one of the stock host to the last
bit."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

TIMING = {
    f'{chart}/{name}'
    for chart in ('evaluator_iter', 'evaluator_step')
    for name in ('evaluate_time', 'avg_envstep_per_sec', 'avg_time_per_episode')
} | {'Buffer/memory_usage/process'}
"""What the host measures with the clock, and the memory of its whole process: different in two runs of stock,
too."""

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def results(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, dict[str, Any]]:
    """Both trainings, each in its own process and folder."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / 'configs'), os.environ.get('PYTHONPATH', '')])
    environment = os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS='1')
    runs = {}
    for mode in ('stock', 'off'):
        folder = tmp_path_factory.mktemp(mode)
        command = [warm_python, '-m', 'tests.host.pong_training', mode, str(folder / 'result.json')]
        with (folder / 'output').open('w') as log:
            runs[mode] = (
                folder,
                subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log),
            )
    results = {}
    for mode, (folder, process) in runs.items():
        if process.wait(timeout=600):
            pytest.fail((folder / 'output').read_text()[-3000:])
        results[mode] = json.loads((folder / 'result.json').read_text())
    return results


def test_each_training_ran_as_named(results: dict[str, dict[str, Any]]) -> None:
    assert results['stock']['patches'] == dict(plugin=False, installed=False, engine=False)
    assert results['off']['patches'] == dict(plugin=True, installed=True, engine=False)


def test_all_scalars_are_equal_to_the_last_bit(results: dict[str, dict[str, Any]]) -> None:
    stock, off = results['stock']['scalars'], results['off']['scalars']
    assert stock.keys() == off.keys() >= TIMING
    compared = stock.keys() - TIMING
    assert len(compared) > 100
    assert sum(len(stock[tag]) for tag in compared) > 300
    assert {tag for tag in compared if stock[tag] != off[tag]} == set()


def test_all_weights_are_equal_to_the_last_bit(results: dict[str, dict[str, Any]]) -> None:
    stock, off = results['stock']['weights'], results['off']['weights']
    assert stock == off
    assert (
        sum(stock[f'model.{name}'] != stock[f'target_model.{name}'] for name in names(stock)) > 10
    )  # it trained


def names(weights: dict[str, str]) -> list[str]:
    return [name.removeprefix('model.') for name in weights if name.startswith('model.')]
