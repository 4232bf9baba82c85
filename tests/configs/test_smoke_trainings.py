"""Each config trains to its end in the smoke size, with real environments and the compiled tree search."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lzero_kv.telemetry.read import find_runs, read_run

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    path.stem
    for path in sorted((ROOT / 'configs').glob('*_config.py'))
    if '_ddp_' not in path.stem  # needs a GPU for each process; tests/host/test_processes.py does without
]
COLD = 'cartpole_unizero_kv_config'
"""The config that the real interpreter runs; the import of LightZero is the longest part of each run."""


@pytest.mark.parametrize('config', CONFIGS)
def test_the_smoke_size_trains_with_the_cache(config: str, tmp_path: Path, warm_python: str) -> None:
    script = ROOT / 'configs' / f'{config}.py'
    python = sys.executable if config == COLD else warm_python
    run = subprocess.run(
        [python, str(script), '--smoke'], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    (folder,) = find_runs(tmp_path)
    totals = read_run(folder).totals()
    assert totals['roots']['queries'] > 0
    nodes = totals['nodes']  # few simulations: windows that moved may never be asked for twice
    assert nodes['misses'] == nodes['stores'] and nodes['evictions'] == nodes['rebuilt_tokens'] == 0
    assert list(tmp_path.rglob('ckpt_best.pth.tar')) != []
