"""The code for a GPU, on a CUDA device that is emulated: what it computes and captures, how often it waits.

On a machine with a GPU and a build of torch for it these tests are skipped, and those of
``test_compiled_engine.py`` run on the device itself.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lzero_kv.lightzero.inference.nodes import SearchNodes
from lzero_kv.lightzero.inference.static import StaticEngine, StaticNodes, runners
from lzero_kv.lightzero.inference.static.step import StaticStep, StepInputs

from lzero_kv.cache.transfer import refill, to_device
from lzero_kv.lightzero.inference import trees
from lzero_kv.lightzero.inference.weights import Prepared
from testing.emulated_cuda import Device, emulated_cuda
from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, options_of_device, world_model_of
from testing.reanalysis import reanalyze

from .direct import Drive, Step, largest_difference
from .plays import assert_same_play
from .test_engine import uneven_episodes
from .test_engines import ROWS, SIMULATIONS, TOLERANCE, UNEVEN, model_of, random_steps, replace_tensors, scale
from .validated import MODES, assert_accounted, counters_of, validated_policy

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason='this torch asks a real device')

CHANGING = [*UNEVEN[:5], Step((0, 1, 2), before=lambda model: scale(model, 0.9)), *UNEVEN[4:6]]
"""Uneven rows, full windows, environments that come and go, weights that change."""

ON_CUDA = options_of_device('cuda')


def policy_of(family: str, simulations: int, **options: Any) -> Any:
    return make_policy(
        family, kv=True, num_simulations=simulations, collector_env_num=3, evaluator_env_num=1, **options
    )


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated_cuda() as device, warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)  # a fall-back would hide what is tested
        yield device


@pytest.mark.parametrize(
    ('family', 'dtype', 'engine', 'window'),
    [
        ('tiny', torch.float64, 'eager', 'rebuild'),
        ('tiny', torch.float64, 'cudagraph', 'rebuild'),
        ('cartpole', torch.float32, 'cudagraph', 'shift'),
        ('lunarlander_continuous', torch.float64, 'cudagraph', 'rebuild'),
    ],
)
def test_answers_are_those_of_a_cpu(
    device: Device, family: str, dtype: torch.dtype, engine: str, window: str
) -> None:
    plays, seen = [], FAMILIES[family].observation
    for kind, where in (('eager', 'cpu'), (engine, 'cuda')):
        model = model_of(kind, family, dtype=dtype, kv_cache=dict(window=window)).to(where)
        plays.append(Drive(model, ROWS, SIMULATIONS, observation=seen).play(CHANGING))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[dtype]
    simulations = SIMULATIONS * len(CHANGING)
    assert device.counts.replays == simulations * (engine == 'cudagraph'), 'every simulation is one replay'


@settings(max_examples=6, deadline=None)
@given(steps=random_steps(), seed=st.integers(0, 10), window=st.sampled_from(['shift', 'rebuild']))
def test_random_searches(steps: list[Step], seed: int, window: str) -> None:
    eager, captured = (model_of(engine, kv_cache=dict(window=window)) for engine in ('eager', 'cudagraph'))
    expected = Drive(eager, ROWS, SIMULATIONS, seed).play(steps)
    with emulated_cuda(), warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        answers = Drive(captured.to('cuda'), ROWS, SIMULATIONS, seed).play(steps)
    assert largest_difference(answers, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    ('family', 'kv_cache', 'options', 'engine'),
    [
        ('tiny', {}, {}, 'cudagraph'),
        ('cartpole', dict(window='shift'), {}, 'cudagraph'),
        ('lunarlander_continuous', {}, {}, 'cudagraph'),
        ('atari', {}, {}, 'cudagraph'),
        ('memory', {}, {}, 'eager'),
        ('tiny', dict(padding='host'), {}, 'eager'),
        (
            'memory',
            dict(budget=dict(ratio=0.5, allocation='attention_based', alpha=1.0, window=4)),
            dict(infer_context_length=9),
            'eager',
        ),
    ],
)
def test_a_policy_searches_as_on_a_cpu(
    device: Device, family: str, kv_cache: dict[str, Any], options: dict[str, Any], engine: str
) -> None:
    """The host's own policy and tree on the device, with the engine that 'auto' chooses there."""
    plays = []
    for where in ({}, ON_CUDA):
        policy = policy_of(
            family, 4, kv_cache=copy.deepcopy(kv_cache), dtype=torch.float64, **options | where
        )
        episodes = Episodes(policy, range(3), record=False)
        plays.append(episodes.run([range(3), (0, 2), range(3), (1,), range(3)]))
    world_model = world_model_of(policy)
    assert world_model.backend == engine
    assert world_model.transformer.ln_f.weight.device == torch.device('cuda', 0)
    assert_same_play(plays[1], plays[0])


@pytest.mark.parametrize(
    ('family', 'engine', 'window', 'copies'),
    [
        ('tiny', 'cudagraph', 'rebuild', 1),
        ('tiny', 'cudagraph', 'shift', 1),
        ('cartpole', 'cudagraph', 'rebuild', 2),
        ('tiny', 'eager', 'rebuild', 11),
        ('tiny', 'eager', 'shift', 7),
        ('memory', 'eager', 'rebuild', 6),
    ],
)
def test_a_simulation_waits_for_nothing(
    device: Device, family: str, engine: str, window: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step reads nothing back, and nobody waits for what it sends."""
    owner = StaticNodes if engine == 'cudagraph' else SearchNodes
    expand, sent = owner.expand, []

    def counted(self: Any, *args: Any) -> Any:
        before = replace(device.counts)
        outputs = expand(self, *args)
        if warm:
            assert (device.counts.waits, device.counts.to_host) == (before.waits, before.to_host)
            assert device.counts.replays - before.replays == (engine == 'cudagraph')
            sent.append(device.counts.to_device - before.to_device)
        return outputs

    monkeypatch.setattr(owner, 'expand', counted)
    seen = FAMILIES[family].observation
    model = model_of(engine, family, dtype=torch.float32, kv_cache=dict(window=window)).to('cuda')
    drive, warm = Drive(model, ROWS, SIMULATIONS, observation=seen), False
    drive.play(UNEVEN)
    warm = True
    drive.play(UNEVEN[4:])
    assert len(sent) == 4 * SIMULATIONS
    assert max(sent) <= copies, sent


def test_a_search_reads_twice_for_each_simulation(device: Device) -> None:
    """Scalars and priors, which the host's tree adds up in Python lists."""
    reads = []
    for simulations in (5, 12):
        policy = policy_of('tiny', simulations, **ON_CUDA)
        episodes = Episodes(policy, range(3), record=False)
        episodes.step(None)
        before = device.counts.to_host
        episodes.step(None)
        reads.append(device.counts.to_host - before)
    assert reads[1] - reads[0] == 2 * (12 - 5)


@pytest.mark.parametrize('planted', [False, True])
def test_masks_begin_where_attention_can_read_them(
    device: Device, planted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that hold different numbers of tokens read different columns of one mask."""
    if planted:
        monkeypatch.setattr(trees, 'columns_of_mask', lambda mask, first, end: mask[..., first:end])
    budget = dict(ratio=0.5, allocation='pyramid', window=4)
    policy = policy_of('memory', 7, kv_cache=dict(budget=budget), **ON_CUDA)
    episodes = Episodes(policy, range(3), record=False, lengths={1: [3]})
    with pytest.raises(RuntimeError, match='misaligned') if planted else contextlib.nullcontext():
        episodes.run([range(3) if step % 3 else (2, 0) for step in range(8)])


@pytest.mark.parametrize('mode', MODES)
def test_validation_accounts_for_every_row(device: Device, mode: str, tmp_path: Path) -> None:
    world_model = dict(device='cuda', cache_validation_mode=mode)
    policy = validated_policy(mode, tmp_path, policy=ON_CUDA['policy'], world_model=world_model)
    uneven_episodes(policy, 'tiny', 4)
    for counters in (counters_of(policy).roots, counters_of(policy).nodes):
        assert counters.compared > 0
        assert_accounted(counters)


def test_reanalysis_is_that_of_a_cpu(device: Device) -> None:
    targets = []
    for where in ({}, ON_CUDA):
        policy = make_policy('tiny', kv=True, num_simulations=4, dtype=torch.float64, **where)
        targets.append(reanalyze(policy, 2).policies)
    assert np.array_equal(targets[1], targets[0])


def test_what_cannot_be_captured_falls_back_with_one_warning(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(self: StaticStep, inputs: StepInputs) -> torch.Tensor:
        answers = plain(self, inputs)
        return answers if float(answers[0, 0]) > 0 else answers.clone()

    plain = StaticStep.plain
    expected = Drive(model_of('eager'), ROWS, SIMULATIONS).play(UNEVEN[:3])
    monkeypatch.setattr(StaticStep, 'plain', reads)
    with pytest.warns(RuntimeWarning, match='not permitted when stream is capturing') as caught:
        answers = Drive(model_of('cudagraph').to('cuda'), ROWS, SIMULATIONS).play(UNEVEN[:3])
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1
    assert largest_difference(answers, expected) < TOLERANCE[torch.float64]


def _fill_new_tensors(self: StaticEngine, inputs: StepInputs, *args: Any) -> None:
    fill(self, inputs._replace(numbers=inputs.numbers.clone()) if self._runs else inputs, *args)


fill = StaticEngine._fill

FAULTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    'weights are those of the capture': (Prepared, 'refresh', lambda self: None),
    'weights are taken to be where they were': (Prepared, 'in_place', lambda self: True),
    'a replay reads what the capture read': (StaticEngine, '_fill', _fill_new_tensors),
}


@pytest.mark.parametrize('fault', [None, *FAULTS])
def test_a_planted_fault_is_seen(device: Device, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [*CHANGING, Step((0, 1, 2), before=lambda model: replace_tensors(model, 0.9))]
    expected = Drive(model_of('eager'), ROWS, SIMULATIONS).play(steps)
    if fault is not None:
        monkeypatch.setattr(*FAULTS[fault])
    answers = Drive(model_of('cudagraph').to('cuda'), ROWS, SIMULATIONS).play(steps)
    difference = largest_difference(answers, expected)
    assert difference > 1e-3 if fault is not None else difference < TOLERANCE[torch.float64]


def test_an_answer_outlives_the_next_replay(device: Device) -> None:
    number = torch.zeros(3, device='cuda')
    inputs = StepInputs(number, number, number, number, number, number)
    run = runners.captured(lambda given: given.slab + 1, inputs)
    first = run()
    number.fill_(4)
    assert (first.tolist(), run().tolist()) == ([1, 1, 1], [5, 5, 5])


@pytest.mark.parametrize('send', [to_device, lambda array, to: _refilled(array, to)])
def test_what_was_sent_may_change_at_once(device: Device, send: Callable[..., torch.Tensor]) -> None:
    array = np.arange(7)
    sent = send(array, torch.device('cuda'))
    array[:] = 0
    assert device.counts.waits == 0
    assert sent.tolist() == list(range(7))


def _refilled(array: np.ndarray, to: torch.device) -> torch.Tensor:
    tensor = torch.zeros(array.shape, dtype=torch.int64, device=to)
    refill(tensor, array)
    return tensor
