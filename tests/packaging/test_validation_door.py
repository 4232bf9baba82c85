"""`lzero_kv.validation` is loaded where `cache_validation_mode` asks for it, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ('lightzero', 'lightzero.policy', 'lightzero.reporting', 'lightzero.search', 'lightzero.world_model')
SHOW = "import sys; print('loaded:', *sorted(n for n in sys.modules if n.startswith('lzero_kv.validation')))"


def loaded_by(code: str) -> list[str]:
    """The modules of validation that a fresh interpreter has loaded after `code`."""
    run = subprocess.run(
        [sys.executable, '-c', f'{code}\n{SHOW}'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize('statement', ['', "from lzero_kv import install; install(); import lzero_kv.plugin"])
def test_the_adapter_loads_none_of_it(statement: str) -> None:
    imports = 'import ' + ', '.join(f'lzero_kv.{name}' for name in ADAPTER)
    assert loaded_by(f'{statement}\n{imports}') == []


@pytest.mark.parametrize('mode, loaded', [(False, False), ('store', True)])
def test_a_world_model_loads_it_where_the_mode_is_set(mode: str | bool, loaded: bool) -> None:
    found = loaded_by(
        'from testing.models import make_policy\n'
        f"make_policy('tiny', kv=True, world_model=dict(cache_validation_mode={mode!r}))"
    )
    assert ('lzero_kv.validation.validator' in found) == loaded
    assert bool(found) == loaded
