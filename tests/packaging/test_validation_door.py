"""Validation is loaded only where `cache_validation_mode` asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ('install', 'world_model', 'policy', 'search', 'reanalysis', 'reporting')
LOADED = "import sys; print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'lzero_kv'))"


def loaded_by(statement: str) -> list[str]:
    """Modules of the library that a fresh interpreter has loaded after `statement`."""
    run = subprocess.run(
        [sys.executable, '-c', f'{statement}\n{LOADED}'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()[-1].split()


def test_the_adapter_loads_no_validation() -> None:
    loaded = loaded_by('import ' + ', '.join(f'lzero_kv.lightzero.{name}' for name in ADAPTER))
    assert {f'lzero_kv.lightzero.{name}' for name in ADAPTER} <= set(loaded)
    assert not [name for name in loaded if name.startswith('lzero_kv.validation')]


def test_a_loaded_validation_is_seen() -> None:
    assert 'lzero_kv.validation.validator' in loaded_by('import lzero_kv.validation.validator')
