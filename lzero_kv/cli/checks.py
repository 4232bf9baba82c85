"""What the installation has, one line each; the check of the host alone imports it."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from lzero_kv.lightzero import host
from lzero_kv.lightzero.fingerprints import changed

TRAINED_PYTHON = '3.11'
ROM_RELEASE = 'ale-py==0.12.1'
PAGE_MODULES = (
    'pkg_resources',
    'markdown',
    'werkzeug',
    'grpc',
)  # setuptools left pkg_resources out from 82 on
PAGE_PACKAGES = ('"setuptools<82"', 'Markdown', 'Werkzeug', 'grpcio')


class Mark(Enum):
    """The result of one check; the value is what the table shows."""

    OK = 'ok'
    WARN = 'warn'
    FAIL = 'fail'


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table; `remedy` says what to write or run and is empty where all is well."""

    mark: Mark
    subject: str
    found: str
    remedy: str = ''


def installation_checks() -> list[Check]:
    """Return the checks that need no config, in the order of the table."""
    return [
        python_check(),
        distribution_check('torch', Mark.FAIL, 'pip install torch'),
        numpy_check(),
        tensorboard_check(),
        host_check(),
        distribution_check('DI-engine', Mark.FAIL, 'pip install "DI-engine==0.5.3"'),
        plugin_check(),
        ale_check(),
        rom_check(),
        distribution_check(
            'pycolab', Mark.WARN, 'needed by the memory tasks only: pip install "pycolab==1.2"'
        ),
    ]


def python_check() -> Check:
    """Return which Python runs."""
    version = platform.python_version()
    if version.startswith(f'{TRAINED_PYTHON}.'):
        return Check(Mark.OK, 'Python', version)
    return Check(Mark.WARN, 'Python', version, f'the plugin was trained with Python {TRAINED_PYTHON} only')


def distribution_check(name: str, if_missing: Mark, remedy: str) -> Check:
    """Return the version of a distribution; `if_missing` and `remedy` say how bad its absence is."""
    version = installed_version(name)
    if version is None:
        return Check(if_missing, name, 'not installed', remedy)
    return Check(Mark.OK, name, version)


def numpy_check() -> Check:
    """Return the version of numpy, which the host needs below 2."""
    check = distribution_check('numpy', Mark.FAIL, 'pip install "numpy<2"')
    if check.mark is Mark.OK and int(check.found.split('.')[0]) >= 2:
        remedy = 'gym 0.25.1 and rotary positions of LightZero fail with numpy 2: pip install "numpy<2"'
        return Check(Mark.WARN, 'numpy', check.found, remedy)
    return check


def tensorboard_check() -> Check:
    """Return TensorBoard's version; its page needs modules that writing a log does not."""
    version = installed_version('tensorboard')
    if version is None:
        return Check(Mark.FAIL, 'tensorboard', 'not installed', 'pip install tensorboard')
    # later releases of it do without
    default = (package_folder('tensorboard') / 'default.py').read_text(encoding='utf-8')
    needed = [name for name in PAGE_MODULES if name != 'pkg_resources' or f'import {name}' in default]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f'the log is written, the page cannot start: pip install {" ".join(PAGE_PACKAGES)}'
        return Check(Mark.WARN, 'tensorboard', f'{version} without {", ".join(missing)}', remedy)
    return Check(Mark.OK, 'tensorboard', version)


def host_check() -> Check:
    """Return which host was found, and whether its functions are those that were tested."""
    version = host.installed_version()
    try:
        profile = host.check_supported()
    except RuntimeError as error:
        return Check(Mark.FAIL, 'host', f'LightZero {version}' if version else 'no LightZero', str(error))
    newer = changed(profile)
    if not newer:
        return Check(Mark.OK, 'host', f'LightZero {profile} (as tested)')
    remedy = (
        f'newer than tested: these functions differ: {", ".join(newer)}; train a while with '
        "cache_validation_mode='recompute'"
    )
    return Check(Mark.WARN, 'host', f'LightZero {profile} (newer than tested)', remedy)


def plugin_check() -> Check:
    """Return the module that a config imports."""
    spec = importlib.util.find_spec('lzero_kv.plugin')
    assert spec is not None
    return Check(Mark.OK, 'plugin', str(spec.origin))


def ale_check() -> Check:
    """Return the Atari emulator; LightZero 0.2.0 builds its environments with gym 0.25.1, which finds ale-py
    below 0.9 only, and its development branch with gymnasium, which wants 0.10.1.
    """
    check = distribution_check('ale-py', Mark.WARN, 'needed by Atari only: pip install "ale-py==0.8.1"')
    if check.mark is not Mark.OK:
        return check
    release, remedy = tuple(int(part) for part in check.found.split('.')[:3]), ''
    if host.is_release() and release >= (0, 9):
        remedy = 'gym 0.25.1 cannot make Atari environments with it: pip install "ale-py==0.8.1"'
    if not host.is_release() and release < (0, 10, 1):
        remedy = 'needed by Atari only: pip install "ale-py>=0.10.1"'
    return Check(Mark.WARN, 'ale-py', check.found, remedy) if remedy else check


def rom_check() -> Check:
    """Return how many Atari ROM files ale-py can find, in its own folder and in ALE_PY_ROM_DIR."""
    if importlib.util.find_spec('ale_py') is None:
        return Check(
            Mark.WARN,
            'Atari ROM files',
            'no ale-py to hold them',
            'needed by Atari only: install ale-py first',
        )
    folder = package_folder('ale_py') / 'roms'
    extra = os.environ.get('ALE_PY_ROM_DIR')
    folders = [folder, *([Path(extra)] if extra else [])]
    files = {path.name for place in folders for path in place.glob('*.bin')}
    if not files:
        remedy = (
            f'needed by Atari only: pip install --no-deps --target ROMS "{ROM_RELEASE}" '
            f'and copy ROMS/ale_py/roms/*.bin into {folder}'
        )
        return Check(Mark.WARN, 'Atari ROM files', f'none in {folder}', remedy)
    return Check(Mark.OK, 'Atari ROM files', f'{len(files)} in {folder}')


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_folder(name: str) -> Path:
    """Return the folder of a package without importing it.

    Raises:
        RuntimeError: there is no such package.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f'expected a package {name}, found none; install it')
    return Path(next(iter(spec.submodule_search_locations)))
