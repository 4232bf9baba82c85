"""Faults planted in the manager: each is caught by its name, in both modes; and a comparison that cannot see
is noticed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lzero_kv.lightzero.inference.expand import Search
from lzero_kv.lightzero.inference.roots import RootInference
from lzero_kv.telemetry.counters import Fault
from lzero_kv.validation import findings
from lzero_kv.validation.faults import FaultFinder
from lzero_kv.validation.findings import Finding, ValidationError, load_finding
from lzero_kv.validation.tolerance import Deviation, Tolerance
from testing.episodes import Episodes
from testing.reanalysis import reanalyze

from .planted import PLANTS, Plant, perturbed
from .validated import MODES, counters_of, validated_policy

STEPS = 4

EVERY_PLANT = pytest.mark.parametrize('plant', PLANTS.values(), ids=list(PLANTS))
BOTH_MODES = pytest.mark.parametrize('mode', MODES)


def play(policy: Any) -> None:
    """Three environments, enough simulations that parents lie below the roots."""
    Episodes(policy, range(3), record=False).run(STEPS)


def finding_of(plant: Plant, mode: str, folder: Path, **kv_cache: Any) -> Finding:
    """What the error says that the planted fault leads to."""
    policy = validated_policy(mode, folder, family=plant.family, kv_cache=kv_cache, num_simulations=6)
    with pytest.raises(ValidationError) as raised:
        play(policy)
    counters = counters_of(policy)
    assert getattr(counters, raised.value.finding.kind).failures == 1, 'the first one ends the run'
    return raised.value.finding


def assert_named(finding: Finding, plant: Plant) -> None:
    """The finding is of the fault, and its message has everything that a reader needs."""
    assert finding.fault is plant.fault, str(finding)
    assert finding.kind == plant.kind
    text = str(finding)
    assert f'pool {plant.kind}, environment {finding.env_id}' in text
    assert ('node' in finding.where) is (plant.kind == 'nodes')
    assert plant.fault.value in text and plant.fault.sentence in text
    assert f'largest difference {finding.cache.largest:.3g}, mean {finding.cache.mean:.3g}' in text
    assert f'key of the cache: {finding.cache_key}; key of the stock cache: {finding.stock_key}' in text
    assert finding.cache_key.startswith(('RootKey(', 'NodeKey(', 'environment '))
    if plant.fault is not Fault.ENTRY_LOST:
        assert finding.cache.excess > 1
    if plant.layer is not None:
        assert finding.cache.layer == plant.layer
        assert f'in layer {plant.layer}' in text


@BOTH_MODES
@EVERY_PLANT
def test_a_planted_fault_is_an_error_that_names_it(
    plant: Plant, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant.plant(monkeypatch)
    finding = finding_of(plant, mode, tmp_path)
    assert_named(finding, plant)
    assert finding.file is not None and str(finding.file) in str(finding)


@pytest.mark.parametrize(
    'name',
    ['another path', 'stale entry', 'learned positions off', 'rotary positions off', 'lost at roots'],
)
def test_it_is_found_where_windows_are_shifted_too(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant = PLANTS[name]
    plant.plant(monkeypatch)
    assert_named(finding_of(plant, 'store', tmp_path, window='shift'), plant)


@BOTH_MODES
@pytest.mark.parametrize('name', ['another node', 'rows swapped at roots', 'lost at nodes'])
def test_it_can_be_logged_instead_and_the_run_goes_on(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant = PLANTS[name]
    plant.plant(monkeypatch)
    policy = validated_policy(mode, tmp_path, on_failure='log', num_simulations=6)
    with caplog.at_level(logging.WARNING, logger='lzero_kv'):
        play(policy)
    counters = counters_of(policy)
    kind = getattr(counters, plant.kind)
    assert kind.faults[plant.fault] >= 1
    assert kind.cache_wrong == sum(kind.faults.values())
    assert (counters.roots.compared, counters.nodes.compared) == (3 * STEPS, 3 * STEPS * 6)
    assert counters.searches == STEPS
    warnings = [
        record
        for record in caplog.records
        if record.name.startswith('lzero_kv') and record.levelno >= logging.WARNING
    ]
    assert len(warnings) == counters.total.failures
    assert plant.fault.sentence in warnings[0].getMessage()
    files = sorted(tmp_path.iterdir())
    assert len(files) == findings.SAVED
    assert plant.fault in {load_finding(file).fault for file in files}


def test_a_fault_in_reanalysis_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    PLANTS['another path'].plant(monkeypatch)
    policy = validated_policy('store', tmp_path, environments=4, num_simulations=6)
    with pytest.raises(ValidationError) as raised:
        reanalyze(policy, 1)
    finding = raised.value.finding
    assert (finding.fault, finding.kind) == (Fault.ANOTHER_NODE, 'reanalysis')
    counters = policy._target_model.world_model.validation
    assert counters.reanalysis.cache_wrong == 1


@pytest.mark.parametrize('window, times', [('rebuild', 0.5), ('shift', 0.1)])
@pytest.mark.parametrize('owner', [RootInference, Search])
def test_a_perturbation_below_the_tolerance_is_rounding_to_the_recomputation(
    owner: type, window: str, times: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With keys and values of its own the stock model has no equal bits. Half the tolerance, and less
    where shifted windows pass it on from step to step: it grows on its way through the layers."""
    perturbed(owner, times)(monkeypatch)
    policy = validated_policy('model', tmp_path, kv_cache=dict(window=window))
    play(policy)
    assert counters_of(policy).total.failures == 0
    assert counters_of(policy).total.largest_cache > 5e-5, 'it was planted'


@pytest.mark.parametrize('owner', [RootInference, Search])
def test_a_perturbation_below_the_tolerance_is_seen_where_both_hold_the_same_entry(
    owner: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both caches were given the same bits. Which of them changed the number nothing proves: both are within
    the tolerance of the truth. So it is a difference without a cause."""
    perturbed(owner, 0.01)(monkeypatch)
    policy = validated_policy('store', tmp_path)
    with pytest.raises(ValidationError, match='differ and no cause is proven') as raised:
        play(policy)
    finding = raised.value.finding
    assert finding.fault is None and finding.part == 'keys and values'
    assert 0 < finding.between.largest < 1e-4
    assert finding.between.layer == 0 and 'in layer 0' in str(finding)
    assert counters_of(policy).total.unexplained == 1


def test_after_an_error_the_run_can_go_on_from_rebuilt_histories(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = validated_policy('store', tmp_path)
    episodes = Episodes(policy, range(3), record=False)
    episodes.run(2)
    with monkeypatch.context() as patch:
        PLANTS['lost at roots'].plant(patch)
        with pytest.raises(ValidationError):
            episodes.step()
    before = counters_of(policy).snapshot()
    episodes.run(2)
    after = counters_of(policy)
    assert after.total.failures == before.total.failures == 1
    assert after.nodes.compared == before.nodes.compared + 2 * 3 * 4


# A comparison that cannot see: the tests above must notice.


@pytest.mark.parametrize('name', ['exchanged at nodes', 'learned positions off', 'perturbed at roots'])
def test_an_infinite_tolerance_would_be_noticed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    PLANTS[name].plant(monkeypatch)
    tolerant = dict(validation_atol=1e30, validation_rtol=1e30)
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        finding_of(PLANTS[name], 'model', tmp_path, **tolerant)


def test_a_comparison_that_always_agrees_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Tolerance, 'deviation', lambda *args, **kwargs: Deviation())
    plant = PLANTS['another node']
    plant.plant(monkeypatch)
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        finding_of(plant, 'model', tmp_path)


def test_a_diagnosis_that_names_one_fault_for_all_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FaultFinder, 'diagnose', lambda *args: Fault.STALE_ENTRY)
    plant = PLANTS['another node']
    plant.plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_named(finding_of(plant, 'store', tmp_path), plant)


def test_the_manager_serves_what_the_error_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tensors of a finding are what was served, and what should have been."""
    plant = PLANTS['exchanged at nodes']
    plant.plant(monkeypatch)
    finding = finding_of(plant, 'store', tmp_path)
    served, truth = finding.tensors['cache']['kv'], finding.tensors['truth']['kv']
    assert served.shape == truth.shape and served.shape[0] == 2 * 2 and served.shape[2] == 24
    torch.testing.assert_close(served[[0, 1, 3, 2]], truth, rtol=1e-3, atol=1e-3)
    assert float((served - truth).abs().max()) == pytest.approx(finding.cache.largest)
