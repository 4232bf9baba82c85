"""Saved findings: they load without running code, and their truth is computed again from the file alone."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lzero_kv.validation import findings, histories
from lzero_kv.validation.findings import Finding, load_finding, recomputed, save_finding
from lzero_kv.validation.tolerance import Tolerance
from testing.episodes import Episodes
from testing.reanalysis import reanalyze

from .planted import PLANTS
from .validated import WINDOWS, counters_of, stock_of, validated_policy

NO_FINDING = 'is no finding of a validation; give a file that cache_validation_mode saved'
SHAPES = ('tiny', 'cartpole', 'lunarlander_continuous')


def noisy_stock(policy: Any, patch: pytest.MonkeyPatch) -> None:
    """From now on every value that the stock model predicts is wrong, so that every row is a finding."""
    for method in ('forward_initial_inference', 'forward_recurrent_inference'):
        forward = getattr(stock_of(policy), method)

        def wrong(*args: Any, forward: Any = forward) -> Any:
            *others, value = forward(*args)
            return *others, value + 0.5

        patch.setitem(stock_of(policy).__dict__, method, wrong)


def saved_findings(folder: Path) -> list[Finding]:
    return [load_finding(file) for file in sorted(folder.iterdir())]


def assert_replays(finding: Finding) -> None:
    """All that the file holds of the truth is computed again, on the same machine to rounding."""
    truth = {name: tensor for name, tensor in finding.tensors['truth'].items() if tensor is not None}
    again = recomputed(finding)
    assert set(again) == set(truth)
    for name, tensor in truth.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('family', SHAPES[:2])
def test_of_a_long_episode_with_shifted_windows_the_last_steps_are_taken_again(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(histories, 'REPLAYED', 3)
    policy = validated_policy(
        'model', tmp_path, family=family, environments=2, on_failure='log', kv_cache=dict(window='shift')
    )
    episodes = Episodes(policy, range(2), record=False)
    episodes.run(9)
    noisy_stock(policy, monkeypatch)
    episodes.run(1)
    saved = saved_findings(tmp_path)
    assert len(saved) == findings.SAVED
    assert all(finding.replay['base'] is None and len(finding.replay['window']) == 2 for finding in saved)
    for finding in saved:
        assert_replays(finding)


@pytest.mark.parametrize(
    ('family', 'window'),
    [
        pytest.param(family, window, marks=[pytest.mark.slow] * ((row + column) % 2))
        for row, family in enumerate(SHAPES)
        for column, window in enumerate(WINDOWS)
    ],
)
def test_the_truth_of_a_saved_finding_is_computed_again(
    family: str, window: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a first root, of roots whose windows are full, and of nodes below them."""
    monkeypatch.setattr(findings, 'SAVED', 1000)
    policy = validated_policy(
        'model', tmp_path, family=family, environments=2, on_failure='log', kv_cache=dict(window=window)
    )
    episodes = Episodes(policy, range(2), record=False, lengths={1: [6]})
    logging.getLogger('lzero_kv').setLevel(logging.ERROR)
    try:
        episodes.run(5)  # five observations: full windows
        noisy_stock(policy, monkeypatch)
        episodes.run(2)  # the second begins a new episode of environment 1
    finally:
        logging.getLogger('lzero_kv').setLevel(logging.NOTSET)
    saved = saved_findings(tmp_path)
    assert len(saved) == counters_of(policy).total.failures == 2 * 2 + 2 * 2 * 4
    first = [finding for finding in saved if finding.tensors['truth']['kv'] is None]
    assert len(first) == 1 and first[0].kind == 'roots' and first[0].env_id == 1
    full = [finding for finding in saved if finding not in first and finding.env_id == 0]
    assert {finding.tensors['truth']['kv'].shape[1] for finding in full} == {5}
    assert {finding.node is None for finding in full} == {True, False}
    for finding in saved:
        assert_replays(finding)


@pytest.mark.parametrize('window', WINDOWS)
def test_reanalysed_nodes_are_computed_again(
    window: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    PLANTS['another path'].plant(monkeypatch)
    policy = validated_policy(
        'store', tmp_path, environments=4, num_simulations=6, on_failure='log', kv_cache=dict(window=window)
    )
    reanalyze(policy, 1)
    saved = saved_findings(tmp_path)
    assert saved and all(finding.kind == 'reanalysis' for finding in saved)
    for finding in saved:
        assert_replays(finding)


def test_a_replay_that_went_wrong_would_be_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (finding,) = one_finding(monkeypatch, tmp_path)
    finding.replay['steps']['embeddings'][-1, :3] += 1.0
    with pytest.raises(AssertionError, match='Tensor-likes are not close'):
        assert_replays(finding)


def one_finding(patch: pytest.MonkeyPatch, folder: Path) -> list[Finding]:
    patch.setattr(findings, 'SAVED', 1)
    with patch.context() as planted:
        PLANTS['exchanged at nodes'].plant(planted)
        policy = validated_policy('store', folder, on_failure='log')
        Episodes(policy, range(3), record=False).run(2)
    return saved_findings(folder)


def test_a_finding_is_tensors_numbers_and_strings_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (finding,) = one_finding(monkeypatch, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        content = torch.load(finding.file, weights_only=True)
    assert set(content) == {'format', 'version', 'finding'}
    assert not any(name.startswith('tokenizer.') for name in content['finding']['replay']['weights'])
    # What was loaded is saved again the same.
    again = load_finding(save_finding(finding, tmp_path / 'again.pt').file)
    assert str(again).splitlines()[:-1] == str(finding).splitlines()[:-1]
    assert (again.fault, again.causes, again.cache, again.between) == (
        finding.fault,
        finding.causes,
        finding.cache,
        finding.between,
    )
    assert Tolerance().close(again.tensors['cache']['kv'], finding.tensors['cache']['kv'])


def test_a_finding_without_anything_to_replay_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (finding,) = one_finding(monkeypatch, tmp_path)
    finding.replay.clear()
    with pytest.raises(ValueError, match='holds no tokens and weights; give a file that a validation saved'):
        recomputed(finding)


@pytest.mark.parametrize(
    'content',
    [b'', b'no archive', {'weights': torch.zeros(3)}, [1, 2], {'format': 'another', 'version': 1}],
    ids=['empty', 'text', 'checkpoint', 'list', 'another format'],
)
def test_a_wrong_file_is_refused_with_one_message(content: Any, tmp_path: Path) -> None:
    path = tmp_path / 'wrong.pt'
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError) as refused:
        load_finding(path)
    assert str(refused.value) == f'{path} {NO_FINDING}'


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'model.pt'
    torch.save(torch.nn.Linear(2, 3), path)
    with pytest.raises(ValueError, match=NO_FINDING):
        load_finding(path)


def test_another_version_and_a_missing_file_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (finding,) = one_finding(monkeypatch, tmp_path)
    content = torch.load(finding.file, weights_only=True)
    torch.save(content | {'version': 7}, finding.file)
    with pytest.raises(ValueError, match='has version 7, expected 2; read it with the release'):
        load_finding(finding.file)
    with pytest.raises(FileNotFoundError):
        load_finding(tmp_path / 'nothing.pt')


def test_the_number_of_files_is_bounded_and_none_is_written_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    PLANTS['rows swapped at roots'].plant(monkeypatch)
    for run in (1, 2):
        policy = validated_policy('store', tmp_path, on_failure='log', num_simulations=6)
        Episodes(policy, range(3), record=False).run(3)
        assert counters_of(policy).total.failures > findings.SAVED
        assert len(list(tmp_path.iterdir())) == run * findings.SAVED
    assert len({str(finding).rsplit('\n', 1)[0] for finding in saved_findings(tmp_path)}) == findings.SAVED
