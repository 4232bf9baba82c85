"""The same files on every promised version of transformers, each in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ('test_cache.py', 'test_switch.py', 'test_compatibility.py')


@pytest.mark.slow
@pytest.mark.parametrize('version', ['4.57.6', '5.0.0', '5.2.0', '5.13.1'])
def test_a_version_of_transformers(version, tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-m', 'venv', tmp_path], check=True)
    (packages,) = (tmp_path / 'lib').glob('python*/site-packages')
    # torch and pytest of this environment stand behind what pip installs there
    (packages / 'behind.pth').write_text(sysconfig.get_path('purelib'))
    python = tmp_path / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', f'transformers=={version}'], check=True)
    files = [ROOT / 'tests' / 'llm' / name for name in FILES]
    run = [
        python,
        '-W',
        'ignore',
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        '-p',
        'no:benchmark',
        *files,
    ]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert version in subprocess.run(
        [python, '-W', 'ignore', '-c', 'import transformers; print(transformers.__version__)'],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
