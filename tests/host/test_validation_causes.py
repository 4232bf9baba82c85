"""A cause is named on evidence: an error of the stock cache that none of them explains stays unexplained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation import causes
from lzero_kv.validation.findings import Finding, ValidationError
from testing.episodes import Episodes

from .validated import assert_accounted, counters_of, stock_of, validated_policy

Tamper = Callable[[Any, pytest.MonkeyPatch], None]


def tampered(method: str, output: int, row: int = 1) -> Tamper:
    """An unknown error in what the stock model answers: ``method``'s ``output``, two logits of one row."""

    def tamper(stock: Any, patch: pytest.MonkeyPatch) -> None:
        forward = getattr(stock, method)

        def noisy(*args: Any, **kwargs: Any) -> Any:
            answers = list(forward(*args, **kwargs))
            answers[output] = answers[output].clone()
            answers[output][row, ..., 1:3] += 0.05
            return tuple(answers)

        patch.setitem(stock.__dict__, method, noisy)

    return tamper


def slots_written_over(stock: Any, patch: pytest.MonkeyPatch) -> None:
    """A number in each slot of the stock cache changes after it was stored."""
    for name in ('custom_copy_kv_cache_to_shared_init_envs', 'custom_copy_kv_cache_to_shared_recur'):
        store = getattr(stock, name)

        def storing(source: Any, *env: int, store: Any = store, own: bool = bool('init' in name)) -> int:
            index = store(source, *env)
            entry = (stock.shared_pool_init_infer[env[0]] if own else stock.shared_pool_recur_infer)[index]
            entry[0]._k_cache._cache[0, 1, 0, 2] += 0.05
            return index

        patch.setitem(stock.__dict__, name, storing)


def first_finding(mode: str, tamper: Tamper, folder: Path, patch: pytest.MonkeyPatch) -> Finding:
    """What is found first once the stock cache was tampered with, after two right steps of two
    environments."""
    policy = validated_policy(mode, folder, environments=2, num_simulations=6)
    episodes = Episodes(policy, range(2), record=False)
    episodes.run(2)
    assert_accounted(counters_of(policy).total)
    tamper(stock_of(policy), patch)
    with pytest.raises(ValidationError) as raised:
        episodes.run(2)
    assert counters_of(policy).total.unexplained == 1 and counters_of(policy).total.cache_wrong == 0
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
    # The cache is right: only the other two differ.
    assert finding.cache.within and finding.between.largest >= 0.04


@pytest.mark.parametrize('mode', ['store', 'model'])
def test_an_entry_that_changed_in_its_slot_is_not_attributed(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = first_finding(mode, slots_written_over, tmp_path, monkeypatch)
    assert finding.fault is None and finding.cache.within
    assert finding.between.layer == 0


def test_an_unknown_error_is_not_hidden_by_a_known_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows are restarted, which is proven; but that does not make the noise on top."""
    policy = validated_policy('model', tmp_path, environments=2, num_simulations=6)
    episodes = Episodes(policy, range(2), record=False, lengths={1: [2]})
    episodes.run(2)
    tampered('forward_initial_inference', 4, row=0)(stock_of(policy), monkeypatch)
    with pytest.raises(ValidationError, match='no cause is proven') as raised:
        episodes.step()
    assert raised.value.finding.env_id == 0, 'the one that the end of the other restarted'


def test_a_crash_for_another_reason_is_not_attributed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def breaking(stock: Any, patch: pytest.MonkeyPatch) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError('out of memory')

        patch.setitem(stock.__dict__, 'forward_recurrent_inference', broken)

    finding = first_finding('model', breaking, tmp_path, monkeypatch)
    assert finding.stock_key == 'RuntimeError: out of memory'
    assert 'stock cache no answer' in str(finding)


# A comparison that names causes without evidence: the tests above must notice.


def always(*causes: Cause) -> Callable[..., frozenset[Cause]]:
    return lambda *args, **kwargs: frozenset(causes)


def test_a_cause_that_is_always_found_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(causes, 'served_causes', always(Cause.EQUAL_LATENTS))
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        first_finding('store', slots_written_over, tmp_path, monkeypatch)


def test_steps_that_are_not_repeated_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    true = causes.step_causes

    def by_elimination(*args: Any) -> Any:
        found, result = true(*args)
        return found or frozenset({Cause.ZERO_PADDING}), result

    monkeypatch.setattr(causes, 'step_causes', by_elimination)
    with pytest.raises(pytest.fail.Exception, match='DID NOT RAISE'):
        first_finding('model', tampered('forward_recurrent_inference', 4), tmp_path, monkeypatch)


def test_a_trace_that_does_not_look_at_the_slot_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The names alone say that the entry is right; its bits say that it is not."""
    policy = validated_policy('store', tmp_path, environments=2, num_simulations=100, on_failure='log')
    episodes = Episodes(policy, range(2), record=False)
    episodes.step()
    overwritten = counters_of(policy).nodes.causes[Cause.SLOT_OVERWRITTEN]
    assert overwritten > 0
    slots_written_over(stock_of(policy), monkeypatch)
    episodes.step()
    # Not even the overwritten ones are explained: what was served belongs to no history.
    assert counters_of(policy).nodes.causes[Cause.SLOT_OVERWRITTEN] == overwritten
    assert counters_of(policy).nodes.unexplained > 2 * 90


def test_tensors_of_an_unexplained_difference_are_all_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finding = first_finding('model', tampered('forward_recurrent_inference', 4), tmp_path, monkeypatch)
    cache, stock, truth = (finding.tensors[name] for name in ('cache', 'stock', 'truth'))
    for answers in (cache, stock, truth):
        assert set(answers) == {'kv', 'policy', 'value', 'reward', 'latent'}
    torch.testing.assert_close(stock['value'][1:3] - 0.05, cache['value'][1:3], rtol=0.0, atol=1e-3)
    torch.testing.assert_close(cache['kv'], truth['kv'], rtol=1e-3, atol=1e-3)
