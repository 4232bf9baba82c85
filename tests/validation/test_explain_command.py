"""`lzero-kv explain`: a finding of a real search, replayed, and files that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.table import Table

from lzero_kv.cli import main
from lzero_kv.cli.console import show_table
from lzero_kv.cli.explain import verdict
from lzero_kv.validation.findings import FORMAT, VERSION, load_finding, save_finding
from testing.episodes import Episodes
from testing.models import make_policy, world_model_of

from ..host.conftest import host_left_as_found  # noqa: F401
from .drawn import LAYERS, a_finding


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What validation saves when the keys of layer 1 are half a unit off in all stored roots."""
    folder = tmp_path_factory.mktemp('findings')
    policy = make_policy(
        'tiny',
        kv=True,
        num_simulations=4,
        collector_env_num=3,
        kv_cache=dict(validation_on_failure='log', validation_folder=str(folder)),
        world_model=dict(cache_validation_mode='store'),
    )
    episodes = Episodes(policy, range(3), record=False)
    episodes.run(2)
    assert not list(folder.iterdir()), 'nothing may be found before the fault is planted'
    storage = world_model_of(policy).kv_cache_manager.storage
    slots = np.arange(storage.slots)
    rows = storage.load(slots)
    rows[:, 2] += 0.5
    storage.store(slots, rows)
    episodes.run(1)
    return sorted(folder.iterdir())[0]


def rows_of(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith('│')]
    return [[cell.strip() for cell in line.strip('│').split('│')] for line in lines]


def test_a_finding_is_replayed_layer_by_layer(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['explain', str(saved)]) == 0
    output = capsys.readouterr().out
    assert output.startswith('the cache is wrong (')
    assert f'lzero-kv explain {saved}' in output
    by_layer = {(row[0], row[1]): [float(cell) for cell in row[2:4]] for row in rows_of(output)[:4]}
    assert by_layer[('1', 'keys')] == pytest.approx([0.5, 0.5], abs=1e-3)
    for place in (('0', 'keys'), ('0', 'values'), ('1', 'values')):
        assert by_layer[place][0] < 1e-4
    assert output.splitlines()[-1].startswith('The recomputation confirms the truth in the file')
    assert 'the cache was wrong' in output.splitlines()[-1]


def test_a_truth_that_the_replay_does_not_confirm(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = load_finding(saved)
    finding.tensors['truth']['kv'][1, 0, 3] += 0.25
    changed = save_finding(finding, tmp_path / 'changed.pt').file
    assert main(['explain', str(changed)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('The recomputation does NOT confirm the truth in the file: they are 0.25 apart')


def test_causes_and_fault_are_said_in_sentences(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(['explain', str(saved)])
    fault = load_finding(saved).fault
    assert fault is not None
    assert f'fault: {fault.value}: {fault.sentence}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda path: None, 'cannot read {path}: No such file or directory; give a file that a validation'),
        (lambda path: path.mkdir(), 'cannot read {path}: Is a directory; give a file that a validation'),
        (lambda path: path.write_text('text'), '{path} is no finding of a validation; give a file that'),
        (lambda path: path.write_bytes(b''), '{path} is no finding of a validation; give a file that'),
        (lambda path: path.write_bytes(bytes(range(256))), '{path} is no finding of a validation; give a'),
        (lambda path: torch.save({'format': FORMAT}, path), '{path} has version None, expected 2; read it'),
        (
            lambda path: torch.save({'format': FORMAT, 'version': VERSION, 'finding': {'row': 3}}, path),
            "give a file that cache_validation_mode saved (KeyError: 'cache')",
        ),
        (lambda path: torch.save([1], path), '{path} is no finding of a validation; give a file that'),
        (lambda path: save_finding(a_finding(), path), 'the finding holds no tokens and weights'),
        (
            lambda path: save_finding(replace(a_finding(), replay={'rule': 'shift'}), path),
            "{path} cannot be computed again (KeyError: 'config')",
        ),
    ],
)
def test_a_file_that_cannot_be_explained_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, message: str
) -> None:
    path = tmp_path / 'finding.pt'
    make(path)  # type: ignore[operator]
    assert main(['explain', str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('lzero-kv: ')
    assert error.count('\n') == 1
    assert message.format(path=path) in error


def test_a_file_that_is_cut_off_or_holds_something_else_is_said_in_one_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, path = torch.load(saved, weights_only=True), tmp_path / 'changed.pt'
    path.write_bytes(saved.read_bytes()[:-700])
    assert main(['explain', str(path)]) == 1
    for part in ('finding', 'replay', 'tensors'):
        place = content['finding'] if part == 'finding' else content['finding'][part]
        for name in list(place):
            before, place[name] = place[name], 'something else'
            torch.save(content, path)
            place[name] = before
            main(['explain', str(path)])
    error = capsys.readouterr().err
    assert error.count('\n') == error.count('lzero-kv: ') > 10
    assert 'Traceback' not in error


def test_an_escape_in_a_name_does_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(['explain', str(tmp_path / '\x1b[31m\udcff\x7f.pt')]) == 1
    show_table(Table('a\x1b]0;b'))
    shown = capsys.readouterr()
    assert '/\u241b[31m\ufffd\u2421.pt' in shown.err and 'a\u241b]0;b' in shown.out
    assert '\x1b' not in shown.err + shown.out


def test_the_verdict_compares_what_both_hold() -> None:
    finding = a_finding(fault=None)
    truth = {name: tensor.clone() for name, tensor in finding.tensors['truth'].items()}
    assert verdict(finding, truth)[0]
    assert 'no cause is proven' in verdict(finding, truth)[1]
    truth['policy'][3] += 0.01
    assert not verdict(finding, truth)[0]
    lost = replace(finding, tensors={})
    assert verdict(lost, truth) == (
        False,
        'The file holds no truth to compare the recomputation with.',
    )
    assert len(truth['kv']) == 2 * LAYERS
