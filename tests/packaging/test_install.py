"""`pip install .` into an environment that trains LightZero: the project comes, torch and numpy stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEPT = ('torch', 'numpy', 'LightZero', 'DI-engine', 'gymnasium', 'tensorboard')


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """The Python of a new environment that has, beside its own, everything installed in this one."""
    subprocess.run([sys.executable, '-m', 'venv', str(tmp_path / 'venv')], check=True)
    site_packages = tmp_path / 'venv' / Path(sysconfig.get_path('purelib')).relative_to(sys.prefix)
    (site_packages / 'installed.pth').write_text(sysconfig.get_path('purelib'))
    return tmp_path / 'venv' / 'bin' / 'python'


@pytest.mark.slow
def test_pip_install_keeps_the_torch_of_lightzero(environment: Path, tmp_path: Path) -> None:
    source = tmp_path / 'source'  # building leaves files behind
    ignored = shutil.ignore_patterns('.*', 'data_lz', 'build', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, source, ignore=ignored)
    install = subprocess.run(
        [str(environment), '-m', 'pip', 'install', str(source)], capture_output=True, text=True
    )
    assert install.returncode == 0, install.stderr
    (line,) = [line for line in install.stdout.splitlines() if line.startswith('Successfully installed')]
    installed = {name.rpartition('-')[0].lower() for name in line.split()[2:]}
    assert 'lzero_kv' in installed
    assert installed.isdisjoint(name.lower() for name in KEPT)

    code = 'from importlib import metadata; import lzero_kv, torch; print(lzero_kv.__file__)\n' + '\n'.join(
        f'print(metadata.version({name!r}))' for name in KEPT
    )
    run = subprocess.run([str(environment), '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    place, *versions = run.stdout.split()
    assert place.startswith(str(tmp_path / 'venv'))
    assert versions == [metadata.version(name) for name in KEPT]
    command = subprocess.run(
        [str(environment.with_name('lzero-kv')), '--help'], capture_output=True, text=True
    )
    assert command.returncode == 0, command.stderr
