"""The set-up of the environment: what it takes for done, what it repairs, and what it says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import setup_env
from environment import build, commands, installed
from environment.build import claim_folder, digests, read_state, require_space, unfinished, write_state
from environment.commands import Console, SetupError, explain, run_logged
from environment.stages import STATE_NAME, Environment, Stage, all_stages, has_project

ROOT = Path(__file__).resolve().parents[2]


def add_package(site_packages: Path, name: str, version: str, *, recorded: bool = True) -> Path:
    """Write a package as pip leaves it, with one module of three bytes."""
    (site_packages / f'{name}.py').write_text('a=1')
    folder = site_packages / f'{name}-{version}.dist-info'
    folder.mkdir()
    if recorded:
        (folder / 'RECORD').write_text(f'{name}.py,sha256=x,3\n__pycache__/{name}.cpython-311.pyc,,\n')
    return folder


def stages_that_note(work: list[str], *, inputs: str = 'x', broken: str = '') -> list[Stage]:
    """Three stages that append their names to `work`; the one named `broken` raises."""

    def stage(name: str) -> Stage:
        def run(environment: Environment) -> None:
            if name == broken:
                raise SetupError('no network')
            work.append(name)

        return Stage(name, name, inputs if name == 'second' else '', run, bytes_needed=1)

    return [stage(name) for name in ('first', 'second', 'third')]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    folder = tmp_path / 'venv'
    claim_folder(folder)
    return Environment(folder, Console(io.StringIO()))


def bring_up_to_date(environment: Environment, stages: list[Stage]) -> None:
    build.build(environment, stages, unfinished(environment, stages))


class TestInstalledPackages:
    def test_versions_are_read_from_the_folder_names(self, tmp_path: Path) -> None:
        add_package(tmp_path, 'Some_Name', '1.2+cpu')
        assert installed.installed_versions(tmp_path) == {'some-name': '1.2'}
        assert installed.is_installed(tmp_path, ['some.name==1.2'])
        assert not installed.is_installed(tmp_path, ['some.name==1.3'])
        assert not installed.is_installed(tmp_path, ['some.name==1.2', 'other==1'])

    def test_a_complete_package_stays(self, tmp_path: Path) -> None:
        folder = add_package(tmp_path, 'whole', '1.0')
        assert installed.remove_incomplete(tmp_path) == []
        assert folder.is_dir()

    def test_a_package_without_record_is_forgotten(self, tmp_path: Path) -> None:
        add_package(tmp_path, 'part', '1.0', recorded=False)
        assert installed.remove_incomplete(tmp_path) == ['part-1.0.dist-info']
        assert installed.installed_versions(tmp_path) == {}

    @pytest.mark.parametrize('content', [None, '', 'a=12'])
    def test_a_package_with_a_lost_or_cut_file_is_forgotten(
        self, tmp_path: Path, content: str | None
    ) -> None:
        add_package(tmp_path, 'part', '1.0')
        module = tmp_path / 'part.py'
        module.unlink() if content is None else module.write_text(content)
        assert installed.remove_incomplete(tmp_path) == ['part-1.0.dist-info']

    def test_folders_that_pip_moved_aside_go(self, tmp_path: Path) -> None:
        (tmp_path / '~etuptools').mkdir()
        assert installed.remove_incomplete(tmp_path) == []
        assert not (tmp_path / '~etuptools').exists()

    def test_pins_of_this_project_are_pins(self) -> None:
        for path in (ROOT / 'requirements').glob('*.txt'):
            assert all(len(pin.split('==')) == 2 for pin in installed.read_pins(path)), path


class TestStages:
    def test_all_are_done_once(self, environment: Environment) -> None:
        work: list[str] = []
        bring_up_to_date(environment, stages_that_note(work))
        assert work == ['first', 'second', 'third']
        assert unfinished(environment, stages_that_note(work)) == []

    def test_a_failed_stage_is_done_again_and_those_before_it_are_not(self, environment: Environment) -> None:
        work: list[str] = []
        with pytest.raises(SetupError):
            bring_up_to_date(environment, stages_that_note(work, broken='second'))
        assert work == ['first']
        bring_up_to_date(environment, stages_that_note(work))
        assert work == ['first', 'second', 'third']

    def test_changed_inputs_redo_the_stage_and_all_after_it(self, environment: Environment) -> None:
        work: list[str] = []
        bring_up_to_date(environment, stages_that_note(work))
        todo = unfinished(environment, stages_that_note(work, inputs='y'))
        assert [stage.name for stage in todo] == ['second', 'third']

    def test_a_result_that_is_gone_is_made_again(self, environment: Environment) -> None:
        stages = stages_that_note([])
        bring_up_to_date(environment, stages)
        gone = Stage('first', 'first', '', stages[0].work, holds=lambda environment: False)
        assert [stage.name for stage in unfinished(environment, [gone, *stages[1:]])] == [
            'first',
            'second',
            'third',
        ]

    @pytest.mark.parametrize('damage', ['', '{"first": "ab', 'null'])
    def test_a_damaged_memory_counts_as_none(self, environment: Environment, damage: str) -> None:
        bring_up_to_date(environment, stages_that_note([]))
        (environment.folder / STATE_NAME).write_text(damage)
        assert len(unfinished(environment, stages_that_note([]))) == 3

    def test_the_real_stages_have_names_of_their_own(self, environment: Environment) -> None:
        stages = all_stages(environment)
        assert len(digests(stages)) == len(stages)

    def test_a_folder_of_someone_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / 'pyvenv.cfg').write_text('home = /usr/bin')
        with pytest.raises(SetupError, match=r'did not make it, and will not change it'):
            claim_folder(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ['pyvenv.cfg']

    def test_only_this_folder_installed_in_place_counts_as_the_project(
        self, environment: Environment
    ) -> None:
        record = environment.site_packages / 'lzero_kv-0.0.0.dist-info' / 'direct_url.json'
        record.parent.mkdir(parents=True)
        assert not has_project(environment)
        for editable, folder, holds in [(True, ROOT, True), (False, ROOT, False), (True, ROOT.parent, False)]:
            record.write_text(json.dumps({'url': folder.as_uri(), 'dir_info': {'editable': editable}}))
            assert has_project(environment) is holds

    def test_the_memory_is_read_back(self, tmp_path: Path) -> None:
        write_state(tmp_path, {'venv': 'ab'})
        assert read_state(tmp_path) == {'venv': 'ab'}

    def test_missing_room_is_said(self, tmp_path: Path) -> None:
        stage = Stage('torch', 'torch', '', lambda environment: None, bytes_needed=10**18)
        with pytest.raises(SetupError, match=r'GB free in .*, 1000000000\.0 GB needed'):
            require_space(tmp_path, [stage])


class TestWords:
    @pytest.mark.parametrize(
        ('output', 'words'),
        [
            ('NewConnectionError: [Errno -3] Temporary failure in name resolution', 'needs the network'),
            ("OSError: [Errno 28] No space left on device: '/x'", 'the disk is full'),
            ('SSLError(SSLCertVerificationError(1, CERTIFICATE_VERIFY_FAILED', 'PIP_CERT'),
            ('ERROR: No matching distribution found for torch==2.13.0', 'no such version for this system'),
            ('Traceback: something else', 'ended with status 1: pip install'),
        ],
    )
    def test_a_failure_is_explained(self, output: str, words: str) -> None:
        text = explain(['pip', 'install'], 1, [output], Path('setup.log'))
        assert words in text
        assert output in text
        assert 'setup.log' in text

    def test_another_python_is_named_with_the_way_to_get_the_right_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(setup_env, 'EXPECTED', (3, 99))
        with pytest.raises(SystemExit) as refusal:
            setup_env.refuse_wrong_python()
        found = '.'.join(map(str, sys.version_info[:3]))
        assert f'expected Python 3.99, found Python {found} ({sys.executable})' in str(refusal.value)
        assert 'make setup PYTHON=' in str(refusal.value)

    def test_a_command_leaves_its_output_in_the_log(self, tmp_path: Path) -> None:
        log = tmp_path / 'log'
        run_logged([sys.executable, '-c', 'print(6 * 7)'], log, Console(io.StringIO()), cwd=tmp_path)
        assert log.read_text().splitlines()[1:] == ['42']

    def test_a_failed_command_raises_with_its_last_lines(self, tmp_path: Path) -> None:
        command = [sys.executable, '-c', 'raise SystemExit("No space left on device")']
        with pytest.raises(SetupError, match='the disk is full'):
            run_logged(command, tmp_path / 'log', Console(io.StringIO()), cwd=tmp_path)

    def test_the_console_names_stage_and_seconds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        screen = io.StringIO()
        moments = iter([10.0, 12.5])
        monkeypatch.setattr(commands.time, 'monotonic', lambda: next(moments))
        console = Console(screen)
        console.begin('[1/9] torch')
        console.end()
        assert screen.getvalue().split() == ['[1/9]', 'torch', '2.5', 's']


def test_without_a_registry_the_set_up_says_so_and_goes_on_later(tmp_path: Path) -> None:
    """The real thing, in a new folder, with a registry address at which nothing answers."""
    unreachable = {
        'PIP_INDEX_URL': 'http://127.0.0.1:9/simple', 'PIP_CONFIG_FILE': os.devnull, 'PIP_FIND_LINKS': '',
        'PIP_EXTRA_INDEX_URL': '', 'PIP_NO_CACHE_DIR': '1',
    }  # fmt: skip
    folder = tmp_path / 'venv'
    run = subprocess.run(
        [sys.executable, 'tools/setup_env.py', '--venv', str(folder)],
        cwd=ROOT, env={**os.environ, **unreachable}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 1
    assert 'pip could not reach the package registry: this step needs the network' in run.stderr
    assert 'What is finished is kept' in run.stderr
    assert list(read_state(folder)) == ['venv']
    assert '[2/10] torch' in run.stdout
