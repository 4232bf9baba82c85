"""Finding runs below a folder and adding them up."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.telemetry.metrics import HISTOGRAMS, METRICS, POOLS, TagName, parse_tag, tag
from lzero_kv.telemetry.read import find_runs, read_run

from .driving import ENVIRONMENTS, SIMULATIONS, write_experiment, write_stock_experiment


@pytest.mark.parametrize('below', ['', 'log', 'log/serial'])
def test_a_run_is_found_from_each_folder_of_an_experiment(tmp_path: Path, below: str) -> None:
    folder = write_experiment(tmp_path / 'exp', points=1)
    assert find_runs(tmp_path / 'exp' / below) == [folder]


def test_all_runs_of_a_parent_are_found(tmp_path: Path) -> None:
    folders = [write_experiment(tmp_path / name, points=1) for name in ('b', 'a')]
    stock = write_stock_experiment(tmp_path / 'c')
    assert find_runs(tmp_path) == [folders[1], folders[0], stock]


def test_folders_without_a_log_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'missing is not a folder; give the experiment folder'):
        find_runs(tmp_path / 'missing')
    with pytest.raises(
        ValueError, match=r'no TensorBoard event file in .* its log is in <exp_name>/log/serial'
    ):
        find_runs(tmp_path)


def test_totals_add_the_points_up(tmp_path: Path) -> None:
    points = 6
    log = read_run(write_experiment(tmp_path, points=points))
    steps = 5 * points
    totals = log.totals()
    assert totals['roots']['queries'] == ENVIRONMENTS * steps
    assert totals['roots']['misses'] == ENVIRONMENTS
    assert totals['roots']['hit_rate'] == pytest.approx(1 - 1 / steps)
    assert totals['nodes']['queries'] == ENVIRONMENTS * SIMULATIONS * steps
    assert totals['nodes']['stores'] == ENVIRONMENTS * (SIMULATIONS + 1) * steps
    assert totals['total']['queries'] == totals['roots']['queries'] + totals['nodes']['queries']
    assert totals['nodes']['entries'] == 11
    assert log.last()['nodes']['queries'] == ENVIRONMENTS * SIMULATIONS * 5
    assert (log.last_step, log.train_iterations) == (20 * points, 7 * points)


def test_a_long_log_is_read_whole(tmp_path: Path) -> None:
    # TensorBoard's own reader keeps a sample of 10,000 points by default, which would make totals wrong.
    points = 12_000
    with SummaryWriter(str(tmp_path), max_queue=points) as writer:
        for step in range(points):
            writer.add_scalar(tag('nodes', 'queries'), 3, step)
    assert read_run(tmp_path).totals()['nodes']['queries'] == 3 * points


def test_a_log_in_several_event_files_is_one_run(tmp_path: Path) -> None:
    for part in range(2):
        with SummaryWriter(str(tmp_path), filename_suffix=f'.{part}') as writer:
            writer.add_scalar(tag('nodes', 'queries'), 5, 10 * (part + 1))
    series = read_run(tmp_path).series('nodes', 'queries')
    assert series is not None
    assert series.steps.tolist() == [10, 20]


def test_other_charts_are_left_out(tmp_path: Path) -> None:
    log = read_run(write_stock_experiment(tmp_path))
    assert (log.pools, log.scalars, log.totals(), log.last()) == ((), {}, {}, {})


def test_a_tag_can_be_taken_apart() -> None:
    for pool in POOLS:
        for metric in (*METRICS, *HISTOGRAMS):
            assert parse_tag(tag(pool, metric)) == TagName(pool, metric)


@pytest.mark.parametrize(
    'text',
    [
        'collector_step/reward_mean',
        'kv_cache_step/roots',
        'kv_cache_step/leaves/hits',
        'kv_cache_step/roots/luck',
        '',
    ],
)
def test_a_foreign_tag_is_none(text: str) -> None:
    assert parse_tag(text) is None
