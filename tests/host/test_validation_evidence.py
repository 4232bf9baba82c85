"""A cause is named on evidence: an error of the old system that none of them explains stays unexplained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lzero_kv.lightzero.validation import evidence
from lzero_kv.validation.causes import Cause
from lzero_kv.validation.finding import Finding, ValidationError
from testing.episodes import Episodes

from .validated import assert_accounted, tally_of, twin_of, validated_policy

Tamper = Callable[[Any, pytest.MonkeyPatch], None]


def tampered(method: str, output: int, row: int = 1) -> Tamper:
    """An unknown error in what the twin answers: ``method``'s ``output``, two logits of one row."""

    def tamper(twin: Any, patch: pytest.MonkeyPatch) -> None:
        forward = getattr(twin, method)

        def noisy(*args: Any, **kwargs: Any) -> Any:
            answers = list(forward(*args, **kwargs))
            answers[output] = answers[output].clone()
            answers[output][row, ..., 1:3] += 0.05
            return tuple(answers)

        patch.setitem(twin.__dict__, method, noisy)

    return tamper


def slots_written_over(twin: Any, patch: pytest.MonkeyPatch) -> None:
    """A number in each of the old system's slots changes after it was stored."""
    for name in ('custom_copy_kv_cache_to_shared_init_envs', 'custom_copy_kv_cache_to_shared_recur'):
        store = getattr(twin, name)

        def storing(source: Any, *env: int, store: Any = store, own: bool = bool('init' in name)) -> int:
            index = store(source, *env)
            entry = (twin.shared_pool_init_infer[env[0]] if own else twin.shared_pool_recur_infer)[index]
            entry[0]._k_cache._cache[0, 1, 0, 2] += 0.05
            return index

        patch.setitem(twin.__dict__, name, storing)


def first_finding(mode: str, tamper: Tamper, folder: Path, patch: pytest.MonkeyPatch) -> Finding:
    """What is found first once the old system was tampered with, after two right steps of two
    environments."""
    policy = validated_policy(mode, folder, environments=2, num_simulations=6)
    episodes = Episodes(policy, range(2), record=False)
    episodes.run(2)
    assert_accounted(tally_of(policy).total)
    tamper(twin_of(policy), patch)
    with pytest.raises(ValidationError) as raised:
        episodes.run(2)
    assert tally_of(policy).total.unexplained == 1 and tally_of(policy).total.manager_off == 0
    return raised.value.finding


ANSWERS = {
    'root value': ('forward_initial_inference', 4, 'roots'),
    'root policy': ('forward_initial_inference', 3, 'roots'),
    'latent state': ('forward_recurrent_inference', 1, 'nodes'),
    'reward': ('forward_recurrent_inference', 2, 'nodes'),
    'value': ('forward_recurrent_inference', 4, 'nodes'),
}


@pytest.mark.parametrize('answer', ANSWERS.values(), ids=list(ANSWERS))
def test_an_unknown_error_in_an_answer_is_not_attributed(
    answer: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    method, output, kind = answer
    finding = first_finding('model', tampered(method, output), tmp_path, monkeypatch)
    assert (finding.fault, finding.kind, finding.row) == (None, kind, 1)
    assert 'no cause is proven' in str(finding)
    # The manager is right: only the other two differ.
    assert finding.manager.within and finding.between.largest >= 0.04


@pytest.mark.parametrize('mode', ['store', 'model'])
def test_an_entry_that_changed_in_its_slot_is_not_attributed(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = first_finding(mode, slots_written_over, tmp_path, monkeypatch)
    assert finding.fault is None and finding.manager.within
    assert finding.between.layer == 0


def test_an_unknown_error_is_not_hidden_by_a_known_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows are restarted, which is proven; but that does not make the noise on top."""
    policy = validated_policy('model', tmp_path, environments=2, num_simulations=6)
    episodes = Episodes(policy, range(2), record=False, lengths={1: [2]})
    episodes.run(2)
    tampered('forward_initial_inference', 4, row=0)(twin_of(policy), monkeypatch)
    with pytest.raises(ValidationError, match='no cause is proven') as raised:
        episodes.step()
    assert raised.value.finding.env_id == 0, 'the one that the end of the other restarted'


def test_a_crash_for_another_reason_is_not_attributed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def breaking(twin: Any, patch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError('out of memory')

        patch.setitem(twin.__dict__, 'forward_recurrent_inference', broken)

    finding = first_finding('model', breaking, tmp_path, monkeypatch)
    assert finding.host_key == 'RuntimeError: out of memory'
    assert 'old system no answer' in str(finding)


# A judge that names causes without evidence: the tests above must notice.


def always(*causes: Cause) -> Callable[..., frozenset[Cause]]:
    return lambda *args, **kwargs: frozenset(causes)


def test_a_cause_that_is_always_found_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(evidence, 'served_causes', always(Cause.EQUAL_LATENTS))
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        first_finding('store', slots_written_over, tmp_path, monkeypatch)


def test_steps_that_are_not_repeated_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    true = evidence.step_causes

    def by_elimination(*args: Any) -> Any:
        causes, enacted = true(*args)
        return causes or frozenset({Cause.ZERO_PADDING}), enacted

    monkeypatch.setattr(evidence, 'step_causes', by_elimination)
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        first_finding('model', tampered('forward_recurrent_inference', 4), tmp_path, monkeypatch)


def test_a_trace_that_does_not_look_at_the_slot_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The names alone say that the entry is right; its bits say that it is not."""
    policy = validated_policy('store', tmp_path, environments=2, num_simulations=100, on_failure='log')
    episodes = Episodes(policy, range(2), record=False)
    episodes.step()
    overwritten = tally_of(policy).nodes.causes[Cause.SLOT_OVERWRITTEN]
    assert overwritten > 0
    slots_written_over(twin_of(policy), monkeypatch)
    episodes.step()
    # Not even the overwritten ones are explained: what was served is nobody's.
    assert tally_of(policy).nodes.causes[Cause.SLOT_OVERWRITTEN] == overwritten
    assert tally_of(policy).nodes.unexplained > 2 * 90


def test_tensors_of_an_unexplained_difference_are_all_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = first_finding('model', tampered('forward_recurrent_inference', 4), tmp_path, monkeypatch)
    manager, host, truth = (finding.tensors[name] for name in ('manager', 'host', 'truth'))
    for answers in (manager, host, truth):
        assert set(answers) == {'kv', 'policy', 'value', 'reward', 'latent'}
    torch.testing.assert_close(host['value'][1:3] - 0.05, manager['value'][1:3], rtol=0.0, atol=1e-3)
    torch.testing.assert_close(manager['kv'], truth['kv'], rtol=1e-3, atol=1e-3)
