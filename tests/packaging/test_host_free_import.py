"""`import lzero_kv` loads no host: neither LightZero nor DI-engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ('lzero', 'ding', 'zoo', 'gym', 'gymnasium', 'transformers')
STATEMENTS = (
    'import lzero_kv',
    'from lzero_kv import *',
    'from lzero_kv import KVCacheManager, install, uninstall',
    'import lzero_kv.telemetry.tensorboard, lzero_kv.telemetry.table',
    'import lzero_kv.cli',
    'import lzero_kv.budget',
    'import lzero_kv.llm',
    'import lzero_kv.cache.manager, lzero_kv.config',
)
A_HOST = 'import gymnasium'
LOADED = f"""
import json, os, sys
import torch  # the longest part of most statements, and no host
for statement in json.loads(sys.argv[1]):
    if not os.fork():
        exec(statement)
        print(json.dumps([statement, [name for name in {HOSTS!r} if name in sys.modules]]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope='module')
def loaded() -> dict[str, list[str]]:
    """The hosts that a process without `lzero_kv` has loaded after each statement."""
    asked = json.dumps([*STATEMENTS, A_HOST])
    run = subprocess.run(
        [sys.executable, '-c', LOADED, asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return dict(map(json.loads, run.stdout.splitlines()))


@pytest.mark.parametrize('statement', STATEMENTS)
def test_no_host_is_loaded(statement: str, loaded: dict[str, list[str]]) -> None:
    assert loaded[statement] == []


def test_a_loaded_host_is_seen(loaded: dict[str, list[str]]) -> None:
    assert 'gymnasium' in loaded[A_HOST]
