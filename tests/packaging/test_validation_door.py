"""`lzero_kv.validation` is loaded where `cache_validation_mode` asks for it, and nowhere else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ('install', 'world_model', 'policy', 'search', 'reanalysis', 'reporting')
LOADED = "import sys; print(*sorted(name for name in sys.modules if name.partition('.')[0] == 'lzero_kv'))"


def loaded_by(python: str, code: str) -> list[str]:
    """Modules of the library that a process has loaded after `code`."""
    run = subprocess.run(
        [python, '-c', f'{code}\n{LOADED}'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()[-1].split()


def test_the_adapter_loads_none_of_it(warm_python: str) -> None:
    adapter = {f'lzero_kv.lightzero.{name}' for name in ADAPTER}
    loaded = loaded_by(warm_python, f'import {", ".join(sorted(adapter))}')
    assert adapter <= set(loaded)
    assert not [name for name in loaded if name.startswith('lzero_kv.validation')]


@pytest.mark.parametrize('mode, expected', [(False, False), ('store', True)])
def test_a_world_model_loads_it_where_the_mode_is_set(
    mode: str | bool, expected: bool, warm_python: str
) -> None:
    loaded = loaded_by(
        warm_python,
        'from testing.models import make_policy\n'
        f"make_policy('tiny', kv=True, world_model=dict(cache_validation_mode={mode!r}))",
    )
    assert ('lzero_kv.validation.validator' in loaded) == expected
    assert any(name.startswith('lzero_kv.validation') for name in loaded) == expected
