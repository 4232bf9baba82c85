"""`lzero-kv doctor` as a person runs it, against the host that is installed."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lzero_kv
from lzero_kv.cli import main
from lzero_kv.cli.doctor import (
    Mark,
    _entry_check,
    distribution_check,
    package_folder,
    python_check,
    rom_check,
)
from lzero_kv.cli.training_call import ConfigError, TrainingCall, training_call
from lzero_kv.lightzero import host
from testing.families import FAMILIES, policy_config

pytest.importorskip('lzero', reason='the doctor is tested against an installed LightZero')

CONFIG = """
from easydict import EasyDict
main_config = EasyDict(policy=dict(model=dict(world_model_cfg=dict(embed_dim=64, {world_model}))))
create_config = EasyDict(policy=dict(type={policy!r}, import_names={names!r}))
if __name__ == '__main__':
    from lzero.entry import {entry}
    {entry}([main_config, create_config], seed=0, max_env_step=100)
    open('trained', 'w').close()
"""
REPOSITORY = str(Path(lzero_kv.__file__).parent.parent)
PLUGIN = ['lzero.policy.unizero', 'lzero_kv.plugin']
FLAG = 'use_new_cache_manager=True'


def write_config(
    folder: Path,
    *,
    world_model: str = FLAG,
    policy: str = 'unizero',
    names: tuple[str, ...] | list[str] = tuple(PLUGIN),
    entry: str = 'train_unizero',
) -> Path:
    path = folder / 'my_config.py'
    path.write_text(CONFIG.format(world_model=world_model, policy=policy, names=list(names), entry=entry))
    return path


def run(python: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [python, '-m', 'lzero_kv.cli', 'doctor', *map(str, arguments)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=variables)


def marks(output: str) -> dict[str, str]:
    """Subject -> mark of the printed table."""
    rows = [line.strip('│').split('│') for line in output.splitlines() if line.startswith('│')]
    return {row[1].strip(): row[0].strip() for row in rows}


def diagnose(capsys: pytest.CaptureFixture[str], path: Path) -> tuple[int, str]:
    code = main(['doctor', str(path)])
    return code, capsys.readouterr().out


def test_the_installation_alone(warm_python: str) -> None:
    done = run(warm_python)
    assert done.returncode == 0, done.stdout + done.stderr
    found = marks(done.stdout)
    assert 'fail' not in found.values()
    for subject in ('Python', 'torch', 'numpy', 'tensorboard', 'host', 'DI-engine', 'plugin', 'ale-py'):
        assert subject in found
    assert 'LightZero 0.2.0 (as tested)' in done.stdout
    assert done.stdout.splitlines()[-1].startswith('The plugin can engage here.')


def test_what_imports_of_the_host_warn_of_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = host.check_supported

    def warning() -> object:
        sys.stderr.write('FutureWarning: of a library\n')
        return checked()

    monkeypatch.setattr(host, 'check_supported', warning)
    assert main(['doctor']) == 0
    assert capsys.readouterr().err == ''


def test_a_config_for_which_the_plugin_engages(tmp_path: Path, warm_python: str) -> None:
    choices = "kv_cache=dict(policy='lfu', max_bytes=1000000), cache_validation_mode='model'"
    path = write_config(tmp_path, world_model=f'{FLAG}, {choices}')
    done = run(warm_python, path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'policy=lfu, max_bytes=1000000' in done.stdout
    assert re.search(r'│ ok +│ validation +│ model ', done.stdout)
    assert re.search(r'│ ok +│ backend +│ (eager on cpu|cudagraph on cuda) \(auto\) ', done.stdout)
    assert done.stdout.splitlines()[-1] == f'The plugin would engage for {path}.'
    assert not (tmp_path / 'trained').exists()


def test_a_plan_for_a_gpu_asks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is touched takes seconds and memory of its own."""
    from lzero_kv.lightzero.start import planned

    config = policy_config(FAMILIES['tiny'], True, None, dict(cuda=True), {})
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    before = torch.cuda.is_initialized()
    assert 'backend=cudagraph' in str(planned(config)) and torch.cuda.is_initialized() == before


@pytest.mark.parametrize('backend', ['compile', 'cudagraph'])
def test_the_backend_that_a_config_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    path = write_config(tmp_path, world_model=f"{FLAG}, kv_cache=dict(backend='{backend}')")
    code, output = diagnose(capsys, path)
    assert code == 0 and f'{backend} on {device}' in output
    warned = 'warn backend: there is no CUDA device' in output
    assert warned == (backend == 'cudagraph' and device == 'cpu')


@pytest.mark.parametrize(
    ('change', 'failed', 'remedy'),
    [
        (
            {'world_model': ''},
            'use_new_cache_manager',
            'write policy.model.world_model_cfg=dict(..., use_new_',
        ),
        ({'world_model': 'use_new_cache_manager=False'}, 'use_new_cache_manager', 'the stock cache is used'),
        (
            {'names': ['lzero.policy.unizero']},
            'import_names',
            "write policy.import_names=['lzero.policy.unizero', 'lzero_kv.plugin']",
        ),
        ({'policy': 'muzero'}, 'policy', 'must be one of unizero, sampled_unizero'),
        (
            {'entry': 'train_muzero'},
            'training entry',
            'the plugin works in train_unizero and train_unizero_segment',
        ),
        ({'world_model': f'{FLAG}, tokens_per_block=3'}, 'world model', 'tokens_per_block=3: expected 2'),
        ({'world_model': f"{FLAG}, kv_cache=dict(polcy='lru')"}, 'kv_cache', "did you mean 'policy'?"),
        (
            {'world_model': f"{FLAG}, cache_validation_mode='stores'"},
            'world model',
            "expected False, 'recompute'",
        ),
    ],
)
def test_each_reason_for_not_engaging(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, failed: str, remedy: str
) -> None:
    path = write_config(tmp_path, **change)
    code, output = diagnose(capsys, path)
    assert code == 1
    assert [subject for subject, mark in marks(output).items() if mark == 'fail'] == [failed]
    assert remedy in output
    assert output.splitlines()[-1] == f'The plugin would NOT engage for {path}: see the lines marked fail.'


def test_configs_whose_attributes_cannot_be_read_stop_lightzero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace('create_config = EasyDict(', 'create_config = dict('))
    code, output = diagnose(capsys, path)
    assert code == 1
    assert [subject for subject, mark in marks(output).items() if mark == 'fail'] == ['training entry']
    assert 'a dict has not; write create_config = EasyDict(create_config)' in output


@pytest.mark.parametrize(
    ('change', 'subject', 'remedy'),
    [
        ('main_config.policy.model.world_model_cfg.num_heads = "2"', 'config', 'cannot be read: TypeError:'),
        ('main_config.policy.model.world_model_cfg = None', 'config', 'cannot be read: AttributeError:'),
        ('main_config.policy = None', 'config', 'compare it with a config that lzero-kv config prints'),
        ('create_config.policy.import_names = 3', 'import_names', "['lzero.policy.unizero', 'lzero_kv."),
    ],
)
def test_values_of_another_kind_are_a_failed_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, subject: str, remedy: str
) -> None:
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace('if __name__', f'{change}\nif __name__'))
    code, output = diagnose(capsys, path)
    assert code == 1
    assert [subject for subject, mark in marks(output).items() if mark == 'fail'] == [subject]
    assert remedy in output


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (None, 'is no file; give a config file that LightZero can run'),
        ('x = 1', 'ended without calling a training entry'),
        ('import no_such_module', "fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ('import sys; sys.exit(3)', 'exited with code 3 before it called a training entry'),
        (
            'from lzero.entry import train_unizero; train_unizero(dict())',
            'train_unizero must be called with [main_config, create_config], got dict',
        ),
    ],
)
def test_a_file_that_is_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / 'my_config.py'
    if text is not None:
        path.write_text(text)
    code, output = diagnose(capsys, path)
    assert code == 1
    assert message in output


def test_a_config_of_the_host_is_read_as_it_would_train() -> None:
    call = training_call(package_folder('zoo') / 'atari' / 'config' / 'atari_unizero_segment_config.py')
    assert call.entry == 'train_unizero_segment'
    assert call.config['policy']['model']['world_model_cfg']['num_layers'] == 2
    assert call.create_config['policy']['type'] == 'unizero'


@pytest.mark.parametrize('kind', ['', '_segment'])
def test_a_config_of_the_host_for_several_gpus_is_read_without_any(kind: str) -> None:
    call = training_call(package_folder('zoo') / 'atari' / 'config' / f'atari_unizero{kind}_ddp_config.py')
    assert (call.entry, call.config['policy']['multi_gpu']) == (f'train_unizero{kind}', True)


@pytest.mark.parametrize(('observations', 'code'), [('image', 0), ('vector', 1)])
def test_several_gpus_and_what_lightzero_cannot_train_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], observations: str, code: int
) -> None:
    path = write_config(tmp_path, world_model=f'{FLAG}, obs_type={observations!r}')
    assert 'multi_gpu' not in marks(diagnose(capsys, path)[1])
    path.write_text(path.read_text().replace('policy=dict(model', 'policy=dict(multi_gpu=True, model'))
    found, output = diagnose(capsys, path)
    assert (found, marks(output)['multi_gpu']) == (code, 'fail' if code else 'ok')
    assert ('fail multi_gpu: LightZero stops at the first update' in output) == bool(code)


def test_asynchronous_collection_is_known_by_name() -> None:
    check = _entry_check(TrainingCall('train_unizero_segment_async', {}, {}))
    assert check.mark is Mark.OK
    assert 'each Ray actor keeps a cache and a log of its own' in check.found


def test_reading_a_config_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    import ding.utils
    import lzero.entry

    def state() -> tuple:
        return lzero.entry.train_unizero, ding.utils.DDPContext, list(sys.argv), list(sys.path), os.getcwd()

    before = state()
    path = write_config(tmp_path)
    path.write_text(f'import os\nos.chdir({str(tmp_path)!r})\n{path.read_text()}')
    training_call(path)
    assert state() == before
    with pytest.raises(ConfigError):
        training_call(tmp_path / 'missing.py')
    assert state() == before


def test_an_unknown_release_of_the_host_is_refused_by_name(tmp_path: Path, warm_python: str) -> None:
    # A distribution that stands earlier on the path is the one Python reports.
    metadata = tmp_path / 'LightZero-0.3.1.dist-info' / 'METADATA'
    metadata.parent.mkdir()
    metadata.write_text('Metadata-Version: 2.1\nName: LightZero\nVersion: 0.3.1\n')
    path = os.pathsep.join([str(tmp_path), REPOSITORY])
    done = run(warm_python, write_config(tmp_path), PYTHONPATH=path)
    assert done.returncode == 1
    assert marks(done.stdout)['host'] == 'fail'
    assert 'fail host: expected LightZero 0.2.0 or main 2026-08, found LightZero 0.3.1' in done.stdout
    assert done.stdout.splitlines()[-1].startswith('The plugin cannot engage here')


def test_missing_game_files_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, real = tmp_path / 'ale_py', Path(importlib.util.find_spec('ale_py').origin)
    package.mkdir()
    # the real package in a folder without game files
    code = f'__path__.append({str(real.parent)!r})\nexec(open({str(real)!r}).read())\n'
    (package / '__init__.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'ale_py', raising=False)
    assert main(['doctor']) == 0
    said = capsys.readouterr().out
    assert marks(said)['Atari ROM files'] == 'warn'
    assert f'and copy ROMS/ale_py/roms/*.bin into {package / "roms"}' in said


def test_game_files_in_a_folder_of_their_own_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'a_game_of_its_own.bin').touch()
    before = rom_check().found
    monkeypatch.setenv('ALE_PY_ROM_DIR', str(tmp_path))
    check = rom_check()
    assert check.mark is Mark.OK
    assert check.found != before


@pytest.mark.parametrize(
    ('version', 'mark'),
    [('3.11.9', Mark.OK), ('3.12.0', Mark.OK), ('3.13.1', Mark.WARN), ('3.1.2', Mark.WARN)],
)
def test_the_pythons_with_which_whole_trainings_ran(
    monkeypatch: pytest.MonkeyPatch, version: str, mark: Mark
) -> None:
    monkeypatch.setattr(platform, 'python_version', lambda: version)
    check = python_check()
    assert check.mark is mark
    assert mark is Mark.OK or check.remedy == 'the plugin was trained with Python 3.11 and 3.12 only'


@pytest.mark.parametrize(
    ('command', 'said'),
    [
        (['compare', 'a.py'], 'interrupted; the same command goes on where it stopped'),
        (['llm', 'run'], 'interrupted; the same command goes on where it stopped'),
        (['llm', 'report', 'a'], 'interrupted'),
        (['validate', 'a.py'], 'interrupted; no report was written'),
        (['doctor'], 'interrupted'),
        ([], 'interrupted'),
    ],
)
def test_only_what_goes_on_says_so_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    def interrupt(given: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr('lzero_kv.cli._run', interrupt)
    assert main(command) == 130
    assert capsys.readouterr().err == f'lzero-kv: {said}\n'


def test_a_missing_distribution_is_marked_as_asked() -> None:
    check = distribution_check('no-such-distribution', Mark.WARN, 'pip install it')
    assert (check.mark, check.found, check.remedy) == (Mark.WARN, 'not installed', 'pip install it')
