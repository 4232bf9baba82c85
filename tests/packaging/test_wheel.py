"""The wheel beside torch and what ``lzero_kv[llm]`` asks for: language models without LightZero."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_docs import blocks, language_model

ROOT = Path(__file__).resolve().parents[2]
REPORT = """
import importlib, sys
from lzero_kv.cli import main
for name in ('experiment', 'pictures', 'report'):
    importlib.import_module(f'lzero_kv.llm.experiment.{name}')
assert main(['llm', 'report', 'nowhere']) == 1 and main(['config', 'cartpole']) == 0
assert not {'lzero', 'ding', 'gym', 'gymnasium', 'easydict'} & set(sys.modules)
"""


def asked_for(lines: list[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Names of what requirements ask for, and of what that asks for."""
    found: set[str] = set()
    waiting = [(line, extras) for line in lines]
    while waiting:
        line, of = waiting.pop()
        requirement = Requirement(line)
        marker, name = requirement.marker, canonicalize_name(requirement.name)
        wanted = not marker or any(marker.evaluate({'extra': extra}) for extra in of or {''})
        # the pins leave out what is asked for and never imported
        if wanted and name not in found and any(metadata.distributions(name=name)):
            found.add(name)
            more = metadata.requires(name) or []
            waiting += [(one, frozenset(requirement.extras)) for one in more]
    return found


@pytest.fixture(scope='module')
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and what its extra asks for, linked from this one."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'  # building leaves files behind
    ignored = shutil.ignore_patterns('.*', 'data_lz', 'build', '*.egg-info', '__pycache__')
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '--no-deps',
        '--no-build-isolation',
        '-q',
        '-w',
        folder,
        source,
    ]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder / 'venv'], check=True)
    packages = folder / 'venv' / Path(sysconfig.get_path('purelib')).relative_to(sys.prefix)
    [wheel] = folder.glob('*.whl')
    zipfile.ZipFile(wheel).extractall(packages)
    [own] = packages.glob('lzero_kv-*.dist-info')
    for name in asked_for(metadata.Distribution.at(own).requires, frozenset({'llm'})):
        link(metadata.distribution(name), packages)
    return folder / 'venv' / 'bin' / 'python'


def link(distribution: metadata.Distribution, packages: Path) -> None:
    """Link the folders and files of a distribution."""
    for top in {file.parts[0] for file in distribution.files or []} - {'..', '__pycache__'}:
        place = Path(str(distribution.locate_file(top)))
        if not (packages / top).exists():
            (packages / top).symlink_to(place)


@pytest.mark.slow
@pytest.mark.parametrize('page', ['README.md', 'docs/language_models.md'])
def test_the_snippets_of_language_models_run_from_the_wheel(page: str, python: Path, tmp_path: Path) -> None:
    texts = [block.text for block in blocks(ROOT / page) if block.language == 'python']
    snippets = [text for text in texts if 'lzero_kv.llm' in text]
    assert snippets
    code = '\n'.join([language_model(), *snippets, REPORT])
    run = subprocess.run(
        [python, '-I', '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    place = subprocess.run(
        [python, '-I', '-c', 'import lzero_kv; print(lzero_kv.__file__)'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert place.stdout.startswith(str(python.parents[1]))


@pytest.mark.slow
def test_no_host_comes_with_language_models(python: Path) -> None:
    listed = 'from importlib import metadata; print(*{one.name for one in metadata.distributions()})'
    names = subprocess.run(
        [python, '-I', '-c', listed], capture_output=True, text=True, check=True
    ).stdout.lower()
    assert {'torch', 'transformers', 'lzero_kv'} <= set(names.split())
    assert not {'lightzero', 'di-engine', 'gym', 'gymnasium', 'easydict'} & set(names.split())
