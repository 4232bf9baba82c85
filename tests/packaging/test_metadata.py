"""The metadata in pyproject.toml says what is true of the source."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

import lzero_kv
from lzero_kv.cli import main

from .imports import imported_names, third_party_imports

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'lzero_kv'

# Imported by lzero_kv.lightzero and lzero_kv.plugin alone, and not declared: a resolver that installs it
# exchanges torch.
HOST_IMPORTS = {'lzero', 'ding'}
# What comes with LightZero: a config is an EasyDict.
BROUGHT_BY_THE_HOST = {'easydict'}
# Imported by lzero_kv.llm alone, and declared as the extra `llm`.
LLM_IMPORTS = {'transformers'}


@pytest.fixture(scope='module')
def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']


@pytest.fixture(scope='module')
def distribution() -> Distribution:
    """What setuptools makes of pyproject.toml."""
    return apply_configuration(Distribution({'src_root': str(ROOT)}), str(ROOT / 'pyproject.toml'))


def test_declared_dependencies_are_those_imported(project) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in project['dependencies']}
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


def test_bounds_admit_the_pins(project) -> None:
    pins = dict(
        line.split('==')
        for path in (ROOT / 'requirements').glob('*.txt')
        for line in path.read_text().splitlines()
        if '==' in line and not line.startswith('#')
    )
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    lines = [
        *project['dependencies'],
        *(line for extra in project['optional-dependencies'].values() for line in extra),
    ]
    for line in lines:
        requirement = Requirement(line)
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f'{line} refuses the pinned {version}'


def test_the_version_is_declared_once(distribution) -> None:
    declaration = re.compile(r"^\s*(version\s*=\s*['\"]|__version__\s*=\s*['\"])", re.MULTILINE)
    files = [*PACKAGE.rglob('*.py'), ROOT / 'pyproject.toml']
    assert [path for path in files if declaration.search(path.read_text())] == [PACKAGE / '__init__.py']
    assert distribution.get_version() == lzero_kv.__version__


def test_the_wheel_holds_the_whole_package_and_nothing_else(distribution) -> None:
    folders = {path.parent for path in PACKAGE.rglob('*.py')}
    names = {str(folder.relative_to(ROOT)).replace('/', '.') for folder in folders}
    assert set(distribution.packages) == names | {'lzero_kv.configs'}  # in a checkout a link to configs/
    assert (PACKAGE / 'py.typed').is_file()
    assert distribution.package_data == {'lzero_kv': ['py.typed']}


def test_no_older_python_is_promised_than_the_source_runs_on(project) -> None:
    """`typing.Self` is of 3.11: with 3.10 the first import failed."""
    assert project['requires-python'] == '>=3.11'
    named = [line.rpartition(' ')[2] for line in project['classifiers'] if ':: Python :: 3.' in line]
    assert named == ['3.11']


def test_the_workflow_runs_what_is_here() -> None:
    workflow = (ROOT / '.github' / 'workflows' / 'ci.yml').read_text()
    targets = set(re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    assert {'test', 'site'} == set(re.findall(r'run: make (\S+)', workflow)) & targets
    paths = re.findall(r'\b(?:tests|build)/[\w/.]+', workflow)
    assert len(paths) > 3
    assert [path for path in paths if path.startswith('tests') and not (ROOT / path).exists()] == []


def test_licence_and_authors(project) -> None:
    assert project['license'] == 'Apache-2.0'
    assert project['authors'] == [{'name': 'lzero_kv contributors'}]
    text = (ROOT / 'LICENSE').read_text()
    assert 'Apache License' in text and 'TERMS AND CONDITIONS' in text


def test_the_sdist_names_every_folder_that_tests_read() -> None:
    grafted = re.findall(r'^graft (\w+)$', (ROOT / 'MANIFEST.in').read_text(), re.MULTILINE)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob('*.py'))}
    untracked = {'build', 'dist', 'data_lz', 'lzero_kv', 'node_modules'}
    assert {name for name in folders if not name.startswith('.')} - untracked <= set(grafted)
    assert {'docs', 'requirements', 'tests', 'testing'} <= set(grafted)


def test_the_command_is_declared(project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project['scripts'] == {'lzero-kv': 'lzero_kv.cli:main'}
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'lzero-kv {lzero_kv.__version__}\n'
    run = subprocess.run(
        [sys.executable, '-m', 'lzero_kv.cli', '--help'], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert 'doctor' in run.stdout
    assert 'report' in run.stdout
