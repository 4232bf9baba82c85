"""Several processes train together with the cache, as with LightZero's own, and one log tells of all."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from lzero_kv.lightzero import ranks
from lzero_kv.telemetry.read import RunLog, find_runs, read_run

from .processes import ROOT, WORLD, start, train_together


@pytest.mark.parametrize('name', ['MuZeroCollector', 'MuZeroSegmentCollector'])
def test_processes_meet_in_each_collector(name: str) -> None:
    kind = getattr(importlib.import_module('lzero.worker'), name)
    assert ranks.meet(object.__new__(kind))


@pytest.mark.parametrize('kv', [True, False], ids=['cache on', 'cache off'])
def test_two_processes_train_equal_weights(tmp_path: Path, kv: bool, warm_python: str) -> None:
    reports = train_together(tmp_path / 'run', kv, warm_python)
    check_equal_trainings(reports)
    assert [report['gathers'] for report in reports] == [kv * report['collections'] for report in reports]
    log = read_run(find_runs(tmp_path)[0])
    if kv:
        check_one_log(reports, log)
    else:
        assert log.pools == ()


@pytest.mark.slow
def test_torchrun_starts_the_config_for_several_gpus(tmp_path: Path) -> None:
    reports = start(ROOT / 'configs' / 'atari_unizero_ddp_kv_config.py', tmp_path / 'run')
    check_equal_trainings(reports)
    check_one_log(reports, read_run(find_runs(tmp_path)[0]))


def check_equal_trainings(reports: list[dict[str, Any]]) -> None:
    assert len({report['weights'] for report in reports}) == 1, 'the gradients of both reach both'
    # each process comes to every meeting, or the one that came would wait for the other
    assert len({(report['collections'], report['updates']) for report in reports}) == 1
    assert reports[0]['updates'] > 0


def check_one_log(reports: list[dict[str, Any]], log: RunLog) -> None:
    totals = log.totals()
    for pool in ('roots', 'nodes'):
        parts = [report['statistics'][pool] for report in reports]
        assert all(part['hits'] > 0 for part in parts)
        for name in ('queries', 'hits', 'misses', 'stores', 'window_tokens', 'bytes'):
            assert totals[pool][name] == sum(part[name] for part in parts), (pool, name)
        assert totals[pool]['most_bytes'] == max(part['bytes'] for part in parts)
    assert reports[0]['statistics'] != reports[1]['statistics']
    assert all(report['statistics']['roots']['hit_rate'] == 1.0 for report in reports)
    assert log.ranks == WORLD
