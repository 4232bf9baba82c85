"""Two processes train on LightZero's git main, where they never meet in a collection."""

from __future__ import annotations

from pathlib import Path

import pytest

from lzero_kv.telemetry.read import find_runs, read_run
from tests.host.processes import ROOT, start
from tests.host.test_processes import check_equal_trainings


@pytest.mark.slow
def test_torchrun_starts_the_config_and_each_process_has_a_log(tmp_path: Path) -> None:
    reports = start(ROOT / 'configs' / 'atari_unizero_ddp_kv_config.py', tmp_path / 'run')
    check_equal_trainings(reports)
    logs = sorted(find_runs(tmp_path), key=lambda folder: folder.name == 'rank_1')
    assert [folder.name for folder in logs] == ['serial', 'rank_1']
    for folder, report in zip(logs, reports, strict=True):
        log, counted = read_run(folder), report['statistics']['roots']
        assert log.ranks == 1 and report['gathers'] == 0
        assert (log.totals()['roots']['queries'], counted['hit_rate']) == (counted['queries'], 1.0)
