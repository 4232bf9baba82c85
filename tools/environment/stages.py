"""What the environment consists of: the stages of the set-up, in order, and what each does."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from environment.commands import Console, SetupError, run_logged
from environment.installed import is_installed, read_pins, remove_incomplete

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / 'requirements'
PYTHON_VERSION = '{}.{}'.format(*sys.version_info[:2])
STATE_NAME = 'setup-state.json'
ROM_WHEEL = 'ale-py==0.12.1'
TORCH_BYTES = 2_500_000_000
STAGE_BYTES = 300_000_000

CHECK = """
import ale_py.roms, cv2, ding, gym, lzero, torch, numpy, xxhash
import lzero.mcts.ctree.ctree_muzero.mz_tree
gym.make('PongNoFrameskip-v4').reset()
print('torch', torch.__version__, '| numpy', numpy.__version__, '| LightZero', lzero.__version__)
"""


@dataclass
class Environment:
    """Where the environment is built, and with what."""

    folder: Path
    console: Console
    torch_index_url: str = ''
    lock: int = -1  # file descriptor of the held lock; children inherit it

    @property
    def python(self) -> Path:
        return self.folder / 'bin' / 'python'

    @property
    def site_packages(self) -> Path:
        return self.folder / 'lib' / f'python{PYTHON_VERSION}' / 'site-packages'

    @property
    def log(self) -> Path:
        return self.folder / 'setup.log'

    def run(self, *command: str | Path) -> None:
        """Run a command with its output in the log; SetupError with the cause in words if it fails."""
        run_logged([str(part) for part in command], self.log, self.console, cwd=ROOT, keep_open=self.lock)

    def pip(self, *arguments: str | Path) -> None:
        """Run the environment's own pip."""
        flags = ('--disable-pip-version-check', '--no-input', '--progress-bar', 'off', '--retries', '2')
        self.run(self.python, '-m', 'pip', arguments[0], *flags, *arguments[1:])

    def install(self, *arguments: str | Path) -> None:
        """Let pip install. Python compiles a module where it is first imported: compiling all of them here is
        more than half of the set-up's time (135 s of processor time with, 52 s without)."""
        self.pip('install', '--no-compile', *arguments)


@dataclass(frozen=True)
class Stage:
    """One step of the set-up. It is done when its inputs are those remembered and `holds` sees its result."""

    name: str
    title: str
    inputs: str
    work: Callable[[Environment], None]
    holds: Callable[[Environment], bool] = field(default=lambda environment: True)
    bytes_needed: int = STAGE_BYTES


def create_venv(environment: Environment) -> None:
    """Create the virtual environment anew; what a broken-off attempt left is thrown away first."""
    folder = environment.folder
    try:
        import ensurepip  # noqa: F401  (Debian ships it apart, in python3.11-venv)
    except ImportError:
        raise SetupError(
            f'{sys.executable} has no ensurepip, so it cannot make a virtual environment with pip.\n'
            f'On Debian and Ubuntu: apt-get install python{PYTHON_VERSION}-venv'
        ) from None
    for entry in folder.iterdir():
        if entry.name in (STATE_NAME, environment.log.name):
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    environment.run(sys.executable, '-m', 'venv', folder)


def pinned_stage(name: str, title: str, file: str) -> Stage:
    """A stage that installs the pins of requirements/<file>, and nothing that they ask for beside them."""
    path = REQUIREMENTS / file
    pins = read_pins(path)

    def work(environment: Environment) -> None:
        environment.install('--no-deps', '-r', path)

    def holds(environment: Environment) -> bool:
        return is_installed(environment.site_packages, pins)

    return Stage(name, title.format(count=len(pins)), '\n'.join(pins), work, holds)


def torch_stage(torch_index_url: str) -> Stage:
    """The stage that installs torch, its dependencies resolved: the CUDA build names some not pinned here."""
    path = REQUIREMENTS / 'torch.txt'
    pins = read_pins(path)

    def work(environment: Environment) -> None:
        index = ('--extra-index-url', torch_index_url) if torch_index_url else ()
        environment.install(*index, '-r', path)

    def holds(environment: Environment) -> bool:
        return is_installed(environment.site_packages, pins)

    inputs = '\n'.join((*pins, torch_index_url))
    return Stage('torch', pins[0].replace('==', ' '), inputs, work, holds, bytes_needed=TORCH_BYTES)


def copy_roms(environment: Environment) -> None:
    """Copy the Atari game files out of a newer ale-py wheel, which carries them; this repository does not."""
    target = environment.site_packages / 'ale_py' / 'roms'
    with tempfile.TemporaryDirectory(prefix='lzero-kv-roms-') as folder:
        environment.pip('download', '--no-deps', '--only-binary', ':all:', '--dest', folder, ROM_WHEEL)
        (wheel,) = Path(folder).glob('*.whl')
        with zipfile.ZipFile(wheel) as archive:
            roms = [
                name
                for name in archive.namelist()
                if name.startswith('ale_py/roms/') and name.endswith('.bin')
            ]
            if not roms:
                raise SetupError(f'expected game files in {wheel.name}, found none under ale_py/roms')
            for name in roms:
                partial = target / (Path(name).name + '.partial')
                partial.write_bytes(archive.read(name))
                os.replace(partial, target / Path(name).name)


def has_roms(environment: Environment) -> bool:
    return (environment.site_packages / 'ale_py' / 'roms' / 'pong.bin').is_file()


def install_project(environment: Environment) -> None:
    """Install this project in place; its dependencies are there, and nothing may exchange them."""
    environment.install('--no-deps', '--no-build-isolation', '--editable', ROOT)


def has_project(environment: Environment) -> bool:
    """True when the installed project is this folder, in place: a plain `pip install .` puts a copy there."""
    expected = {'url': ROOT.as_uri(), 'dir_info': {'editable': True}}
    records = environment.site_packages.glob('lzero_kv-*.dist-info/direct_url.json')
    return [json.loads(record.read_text()) for record in records] == [expected]


def check(environment: Environment) -> None:
    """Import what was installed and start a real game: a broken environment is seen here and not later."""
    environment.run(environment.python, '-W', 'ignore', '-c', CHECK)


def all_stages(environment: Environment) -> list[Stage]:
    """The stages in order; each rests on those before it."""
    metadata = (ROOT / 'pyproject.toml').read_text()
    place = f'{environment.folder} {PYTHON_VERSION}'
    return [
        Stage('venv', 'virtual environment', place, create_venv, lambda e: e.python.exists()),
        torch_stage(environment.torch_index_url),
        pinned_stage('lightzero', 'LightZero 0.2.0 and what it imports ({count} packages)', 'lightzero.txt'),
        Stage('roms', 'Atari game files', ROM_WHEEL, copy_roms, has_roms),
        pinned_stage('memory', 'memory tasks (pycolab)', 'memory.txt'),
        pinned_stage('library', 'libraries of lzero_kv ({count} packages)', 'library.txt'),
        pinned_stage('llm', 'language models: transformers ({count} packages)', 'llm.txt'),
        pinned_stage('dev', 'test tools ({count} packages)', 'dev.txt'),
        Stage('project', 'lzero_kv itself, editable', f'{ROOT}\n{metadata}', install_project, has_project),
        Stage('check', 'check: imports, tree search, Pong', CHECK, check),
    ]


def prepare(environment: Environment) -> None:
    """Forget packages that a broken-off pip left in part, so that pip installs them again."""
    if environment.site_packages.is_dir():
        remove_incomplete(environment.site_packages)
