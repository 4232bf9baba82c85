"""`import lzero_kv` loads no host: neither LightZero nor DI-engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ('lzero', 'ding', 'zoo', 'gym', 'gymnasium', 'transformers')

REPORT = 'import sys; print(*[name for name in {hosts!r} if name in sys.modules])'


def hosts_loaded_by(statement: str) -> list[str]:
    """The hosts that a fresh interpreter has loaded after `statement`."""
    code = f'{statement}\n{REPORT.format(hosts=HOSTS)}'
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize(
    'statement',
    [
        'import lzero_kv',
        'from lzero_kv import *',
        'from lzero_kv import install, uninstall',
        'import lzero_kv.telemetry.tensorboard, lzero_kv.telemetry.table',
        'import lzero_kv.cli',
        'import lzero_kv.budget',
        'import lzero_kv.llm',
        'import lzero_kv.cache.manager, lzero_kv.config',
    ],
)
def test_no_host_is_loaded(statement: str) -> None:
    assert hosts_loaded_by(statement) == []


def test_a_loaded_host_is_seen() -> None:
    assert 'gymnasium' in hosts_loaded_by('import gymnasium')
