"""The metadata in setup.py says what is true of the source."""

from __future__ import annotations

import re
import subprocess
import sys
from distutils.core import run_setup
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .imports import imported_names, third_party_imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'lzero_kv'

# Imported by lzero_kv.lightzero and lzero_kv.plugin alone, and declared as the extra `lightzero`.
HOST_IMPORTS = {'lzero', 'ding'}
# What comes with LightZero: a config is an EasyDict.
BROUGHT_BY_THE_HOST = {'easydict'}
# Imported by lzero_kv.llm alone, and declared as the extra `llm`.
LLM_IMPORTS = {'transformers'}


@pytest.fixture(scope='module')
def metadata():
    """What setup.py tells setuptools."""
    return run_setup(str(ROOT / 'setup.py'), stop_after='init')


def test_declared_dependencies_are_those_imported(metadata) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in metadata.install_requires}
    imported = {canonicalize_name(name) for name in third_party_imports(PACKAGE)}
    assert declared == imported - HOST_IMPORTS - LLM_IMPORTS - BROUGHT_BY_THE_HOST


def test_only_the_adapter_and_what_runs_a_host_import_one() -> None:
    hosts, imports = HOST_IMPORTS | BROUGHT_BY_THE_HOST, third_party_imports(PACKAGE)
    files = {file for host in hosts for file in imports.get(host, [])}
    # the doctor looks at an installed host, and validation runs its models
    allowed = ('lightzero/', 'cli/', 'validation/')
    assert [file for file in files if not file.startswith(allowed)] == []
    files = {file for name in LLM_IMPORTS for file in third_party_imports(PACKAGE).get(name, [])}
    assert [file for file in files if not file.startswith('llm/')] == []


def test_imports_are_found_wherever_they_stand() -> None:
    source = 'import a.b, c as d\nfrom e.f import g\ndef h():\n    from i import j\nfrom .k import m'
    assert set(imported_names(source)) == {'a', 'c', 'e', 'i'}


def test_bounds_admit_the_pins(metadata) -> None:
    pins = dict(
        line.split('==')
        for path in (ROOT / 'requirements').glob('*.txt')
        for line in path.read_text().splitlines()
        if '==' in line and not line.startswith('#')
    )
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    lines = [
        *metadata.install_requires,
        *(line for extra in metadata.extras_require.values() for line in extra),
    ]
    for line in lines:
        requirement = Requirement(line)
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f'{line} refuses the pinned {version}'


def test_the_version_is_declared_once(metadata) -> None:
    version = metadata.get_version()
    declaration = re.compile(rf"version\s*=\s*['\"]{re.escape(version)}['\"]|__version__\s*=")
    tracked = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '*.py', '*.toml', '*.cfg'],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    declaring = [
        name for name in tracked if (ROOT / name).is_file() and declaration.search((ROOT / name).read_text())
    ]
    assert declaring == ['setup.py']


def test_the_wheel_holds_the_whole_package(metadata) -> None:
    folders = {path.parent for path in PACKAGE.rglob('*.py')}
    names = {str(folder.relative_to(ROOT)).replace('/', '.') for folder in folders}
    assert set(metadata.packages) == names
    assert (PACKAGE / 'py.typed').is_file()
    assert metadata.package_data == {'lzero_kv': ['py.typed']}


def test_the_command_is_declared(metadata) -> None:
    assert metadata.entry_points == {'console_scripts': ['lzero-kv=lzero_kv.cli:main']}
    run = subprocess.run(
        [sys.executable, '-m', 'lzero_kv.cli', '--help'], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert 'doctor' in run.stdout
    assert 'report' in run.stdout
