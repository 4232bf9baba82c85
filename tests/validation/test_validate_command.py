"""`lzero-kv validate` as on a command line: real CartPole, both caches side by side, a bounded training."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lzero_kv.cli import main
from lzero_kv.cli.doctor import package_folder
from lzero_kv.cli.training import TOLD_SECONDS, EnoughSteps, Progress, Request, bounded
from lzero_kv.cli.training_call import ConfigError, training_call
from lzero_kv.cli.validate import NUMBERS, PAGE, PICTURE, compared, failures_in, prepared
from lzero_kv.lightzero import host
from lzero_kv.telemetry.counters import ValidationCounters
from lzero_kv.validation.findings import save_finding
from lzero_kv.validation.report import MODE_RUN, REPORT, ModeRun

from .drawn import a_finding, some_counters

ROOT = Path(__file__).resolve().parents[2]
CARTPOLE = ROOT / 'configs' / 'cartpole_unizero_kv_config.py'
REQUEST = Request(str(CARTPOLE), ('--smoke',), 'model', 40, 'somewhere', rate=0.25)
ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def command(python: str, *arguments: object) -> list[str]:
    return [python, '-m', 'lzero_kv.cli', 'validate', *map(str, arguments)]


def validate(python: str, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(python, *arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )


def test_a_bounded_run_in_both_modes_and_its_report(tmp_path: Path, warm_python: str) -> None:
    options = '--env-steps', 25, '--out', 'report', '--', '--smoke', '--seed', 3
    done = validate(warm_python, tmp_path, CARTPOLE, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ''
    report = REPORT.validate_json((tmp_path / 'report' / NUMBERS).read_text())
    assert report.passed
    assert report.arguments == ('--smoke', '--seed', '3')
    assert [run.mode for run in report.runs] == ['store', 'model']
    for run in report.runs:
        # Two environments act at a time: the bound is passed by one step at most, in the midst of episodes.
        assert 25 <= run.steps <= 26
        assert 1 <= run.evaluated <= 25 // 4 + 1
        assert run.simulations == 8
        assert run.counters.roots.compared == run.steps
        assert run.counters.nodes.compared == 8 * run.steps
        assert run.notes == ()
    page = (tmp_path / 'report' / PAGE).read_text()
    assert report.verdict in page
    assert report.command in page
    assert f'({PICTURE})' in page
    assert (tmp_path / 'report' / PICTURE).read_bytes().startswith(b'\x89PNG')
    assert done.stdout.splitlines()[-2:] == [report.verdict, f'report: report/{PAGE}']
    assert 'Mode store: ' in done.stdout
    assert 'Mode model: ' in done.stdout
    again = report.command.split()
    assert again[:3] == ['lzero-kv', 'validate', str(CARTPOLE)]
    assert again[-4:] == ['--', '--smoke', '--seed', '3']


def test_a_config_with_the_flag_off_is_switched_on_and_says_so(tmp_path: Path, warm_python: str) -> None:
    done = validate(
        warm_python, tmp_path, CARTPOLE, '--env-steps', 10, '--modes', 'store', '--rate', 0.5,
        '--simulations', 5, '--', '--smoke', '--no-kv',
    )  # fmt: skip
    assert 'note: use_new_cache_manager is not True in the config' in done.stdout, done.stderr
    (run,) = REPORT.validate_json((tmp_path / 'data_lz/validation' / NUMBERS).read_text()).runs
    assert run.simulations == 5
    assert run.counters.validated == run.counters.searches // 2 > 0
    assert run.counters.nodes.compared == 2 * 5 * run.counters.validated  # two environments act at a time
    assert run.counters.roots.compared == run.steps


def test_an_interrupted_run_leaves_no_process_and_no_report(tmp_path: Path) -> None:
    started = subprocess.Popen(
        command(sys.executable, CARTPOLE, '--out', tmp_path, '--', '--smoke'),
        env=ENVIRONMENT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell starts what runs in its background with SIGINT ignored, and that is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / 'store.log').exists():
        assert started.poll() is None
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130
    assert error == 'lzero-kv: interrupted; no report was written\n'
    assert not (tmp_path / NUMBERS).exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['missing.py'], 'missing.py is no file; give a config file that LightZero can run'),
        (['a.py', '--env-steps', '0'], '--env-steps: expected 1 or more, got 0'),
        (['a.py', '--rate', '0'], '--rate: expected a fraction above 0 and up to 1, got 0'),
        (['a.py', '--rate', '1.5'], '--rate: expected a fraction above 0 and up to 1, got 1.5'),
        (['a.py', '--simulations', '0'], '--simulations: expected 1 or more, got 0'),
        (
            ['a.py', '--modes', 'store', 'store'],
            '--modes: expected some of recompute, store and model, got store store',
        ),
        (['a.py', '--out', 'a.py/below'], 'cannot write into a.py/below: Not a directory; choose another'),
    ],
)
def test_what_cannot_run_is_said_in_one_line_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.py').write_text('raise RuntimeError\n')
    assert main(['validate', *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith('lzero-kv: ')
    assert error.count('\n') == 1
    assert message in error


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('x = 1', 'a.py ended without calling a training entry'),
        ('import sys; sys.exit("no such game")', 'exited with code no such game before it called'),
        ('raise KeyError("lost")', "a.py fails: KeyError: 'lost'"),
        ('import os; os._exit(7)', 'mode store: the process ended with code 7'),
        (
            'from lzero.entry import train_muzero as t\nt([{}, dict(policy=dict(type="muzero"))], seed=1)',
            "a.py calls train_muzero with the policy 'muzero', for which there is no plugin; give a",
        ),
        (
            'from lzero.entry import train_unizero as t\n'
            't([dict(policy={}), dict(policy=dict(type="unizero"))])',
            'a.py: the entry reads attributes, which a dict has not; write main_config = EasyDict(main_co',
        ),
    ],
)
def test_a_config_that_cannot_be_validated_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    warm_python: str,
    text: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'executable', warm_python)
    (tmp_path / 'a.py').write_text(text + '\n')
    assert main(['validate', 'a.py', '--out', 'report']) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert message in error
    assert error.endswith('(what LightZero wrote: report/store.log)\n')
    assert not (tmp_path / 'report' / NUMBERS).exists()


def test_arguments_of_a_config_are_for_validate_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['report', 'data_lz', '--', '--smoke']) == 2
    said = capsys.readouterr().err
    assert 'only doctor, compare, validate take arguments of a config after --, got --smoke' in said


def test_the_config_is_given_its_arguments() -> None:
    call = training_call(CARTPOLE, ['--smoke', '--seed', '5'])
    assert call.options == {'seed': 5, 'model_path': None, 'max_env_step': 100}
    assert call.config['policy']['num_simulations'] == 8
    with pytest.raises(ConfigError, match=r'exited with code 2 .*: unrecognized arguments: --smok\w* 7'):
        training_call(CARTPOLE, ['--smoking', '7'])


def test_lightzeros_own_config_gets_what_it_needs_and_says_so() -> None:
    path = package_folder('zoo') / 'classic_control' / 'cartpole' / 'config' / 'cartpole_unizero_config.py'
    original = training_call(path)
    call, notes = prepared(original, dataclasses.replace(REQUEST, simulations=100))
    world_model = call.config['policy']['model']['world_model_cfg']
    assert world_model['use_new_cache_manager'] is True
    assert world_model['cache_validation_mode'] == 'model'
    assert world_model['kv_cache'] == {
        'validation_rate': 0.25,
        'validation_on_failure': 'log',
        'validation_folder': 'somewhere/findings/model',
    }
    assert call.config['policy']['num_simulations'] == 100
    assert 'num_simulations' not in world_model  # the stock cache keeps LightZero's 50, as it has there
    assert call.create_config['policy']['import_names'] == ['lzero.policy.unizero', 'lzero_kv.plugin']
    assert call.create_config['env_manager'] == {'type': 'base'}
    assert [note.split(' ')[0] for note in notes] == ['use_new_cache_manager', "'lzero_kv.plugin'", 'the']
    assert 'use_new_cache_manager' not in original.config['policy']['model']['world_model_cfg']


def test_the_configs_own_choices_of_the_cache_are_kept() -> None:
    call = training_call(CARTPOLE, ['--smoke'])
    given = call.config['policy']['model']['world_model_cfg']
    given['kv_cache'], given['num_simulations'] = dict(policy='lfu', validation_rate=0.5), 8
    changed, notes = prepared(call, dataclasses.replace(REQUEST, simulations=6))
    world_model = changed.config['policy']['model']['world_model_cfg']
    assert (world_model['kv_cache']['policy'], world_model['kv_cache']['validation_rate']) == ('lfu', 0.25)
    assert world_model['num_simulations'] == changed.config['policy']['num_simulations'] == 6
    assert notes == []
    phases = [changed.config['policy'][f'{phase}_num_simulations'] for phase in ('collect', 'eval')]
    assert phases == [6, 6]  # what git main searches with
    call.config['policy']['model']['world_model_cfg']['kv_cache'] = dict(polcy='lfu')
    with pytest.raises(ConfigError, match='did you mean'):
        prepared(call, REQUEST)


def without_training(monkeypatch: pytest.MonkeyPatch, *, release: bool = True, error: str = '') -> list[str]:
    """Trainings answer at once, or with an error; their modes are returned."""
    asked = []

    def answer(module: str, request: Request, log: Path, hear: object) -> object:
        asked.append(request.name)
        if error:
            raise ValueError(error)
        run = ModeRun(request.name, some_counters(), 61, 17, 13, 8, 2.6)
        return MODE_RUN.dump_python(run, mode='json')

    monkeypatch.setattr(sys.modules['lzero_kv.cli.validate'], 'answer_of', answer)
    monkeypatch.setattr(host, 'is_release', lambda: release)
    return asked


@pytest.mark.parametrize(
    ('release', 'options', 'modes'),
    [
        (True, [], ['store', 'model']),
        (False, [], ['recompute']),
        (True, ['--modes', 'recompute', 'store'], ['recompute', 'store']),
        (False, ['--modes', 'recompute'], ['recompute']),
    ],
)
def test_the_modes_are_those_of_the_lightzero_that_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: bool,
    options: list[str],
    modes: list[str],
) -> None:
    asked = without_training(monkeypatch, release=release)
    assert main(['validate', str(CARTPOLE), *options, '--out', str(tmp_path)]) == 0
    assert asked == modes


def test_modes_that_need_the_releases_caches_are_refused_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = without_training(monkeypatch, release=False)
    assert main(['validate', str(CARTPOLE), '--modes', 'store', '--out', str(tmp_path / 'report')]) == 1
    assert asked == [] and not (tmp_path / 'report').exists()
    assert 'another LightZero is installed; write --modes recompute\n' in capsys.readouterr().err


def test_a_run_that_fails_leaves_no_report_not_even_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_training(monkeypatch)
    assert main(['validate', str(CARTPOLE), '--out', str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((PAGE, PICTURE, NUMBERS))
    without_training(monkeypatch, error='no such game')
    assert main(['validate', str(CARTPOLE), '--out', str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_compared_nothing_is_no_result() -> None:
    progress = Progress(limit=40, collected=31)
    with pytest.raises(RuntimeError, match='validation did not engage: the training ended after 31'):
        compared(None, progress, REQUEST)
    with pytest.raises(RuntimeError, match='nothing was compared in 31 environment steps and 9 searches'):
        compared(ValidationCounters(searches=9), progress, REQUEST)
    assert compared(some_counters(), progress, REQUEST) == some_counters()


def test_only_findings_of_this_run_are_reported(tmp_path: Path) -> None:
    for name in ('old', 'new'):
        save_finding(a_finding(), tmp_path / 'store' / f'{name}.pt')
    os.utime(tmp_path / 'store' / 'old.pt', (1000, 1000))
    (failure,) = failures_in(tmp_path / 'store', since=time.time() - 60)
    assert failure.file == str(tmp_path / 'store' / 'new.pt')
    assert failure.sentence.startswith('the cache is wrong (stale_entry)')
    assert failures_in(tmp_path / 'missing', since=0.0) == ()


def test_the_host_is_whole_again_after_a_bounded_training() -> None:
    from ding.worker import BaseLearner
    from lzero.worker import MuZeroEvaluator

    from lzero_kv.lightzero.policy import KVPolicy

    places = [(KVPolicy, '_forward_collect'), (KVPolicy, '_forward_eval'), (MuZeroEvaluator, 'eval')]
    places.append((BaseLearner, 'train'))
    before = [vars(owner)[name] for owner, name in places]
    with pytest.raises(EnoughSteps), bounded(Progress(limit=0)):
        assert all(vars(owner)[name] is not was for (owner, name), was in zip(places, before, strict=True))
        KVPolicy._forward_collect(None, None)  # the bound comes before the policy is asked
    assert [vars(owner)[name] for owner, name in places] == before


def test_a_listener_acts_at_most_once_in_its_time() -> None:
    heard: list[Progress] = []
    progress = Progress(limit=1, listener=heard.append)
    for _ in range(3):
        progress.tell()
    assert heard == [progress]
    progress.told -= TOLD_SECONDS
    progress.tell()
    assert len(heard) == 2
