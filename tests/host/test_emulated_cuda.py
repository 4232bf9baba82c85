"""Inference on an emulated CUDA device: no mixed devices, no hidden wait, and captures that equal the eager
backend.

Skipped by a build of torch for CUDA, where ``test_compiled_backend.py`` runs on the device itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from lzero_kv.lightzero.inference import backends
from lzero_kv.lightzero.inference.attention import MASK_ROW
from lzero_kv.lightzero.inference.compiled import CompiledSearch, StaticStep, StepFunction, StepInputs
from lzero_kv.lightzero.inference.expand import Search
from lzero_kv.lightzero.inference.weights import InferenceWeights
from testing.emulated_cuda import Device, emulated_cuda
from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, options_of_device, world_model_of
from testing.reanalysis import reanalyze

from .direct import Drive, Step, largest_difference
from .plays import assert_same_play
from .test_backends import (
    ROWS,
    SCALED,
    SIMULATIONS,
    TOLERANCE,
    UNEVEN,
    expected_answers,
    model_of,
    replace_tensors,
)
from .test_engine import uneven_episodes
from .validated import assert_compared, validated_policy

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason='this torch asks a real device')

ON_CUDA = options_of_device('cuda')
BUDGET = dict(ratio=0.5, allocation='attention_based', alpha=1.0, window=4)


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
    ('family', 'window', 'dtype'),
    [
        ('tiny', 'rebuild', torch.float64),
        ('tiny', 'shift', torch.float64),
        ('cartpole', 'rebuild', torch.float32),
    ],
)
def test_captured_answers_are_those_of_the_eager_backend_on_a_cpu(
    device: Device, family: str, window: str, dtype: torch.dtype
) -> None:
    plays, seen = [], FAMILIES[family].observation
    for backend, where in (('eager', 'cpu'), ('cudagraph', 'cuda')):
        model = model_of(backend, family, dtype=dtype, kv_cache=dict(window=window)).to(where)
        plays.append(Drive(model, ROWS, SIMULATIONS, observation=seen).play(SCALED))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[dtype]
    assert device.counts.replays == SIMULATIONS * len(SCALED), 'every simulation is one replay'


@pytest.mark.parametrize(
    ('family', 'kv_cache', 'options'),
    [('tiny', dict(window='shift'), {}), ('memory', dict(budget=BUDGET), dict(infer_context_length=9))],
)
def test_auto_captures_without_a_budget_and_a_policy_searches_as_on_a_cpu(
    device: Device, family: str, kv_cache: dict[str, Any], options: dict[str, Any]
) -> None:
    """The host's own policy and tree on the device."""
    plays, budget = [], 'budget' in kv_cache
    for where in ({}, ON_CUDA):
        policy = policy_of(family, 4, kv_cache=dict(kv_cache), dtype=torch.float64, **options | where)
        episodes = Episodes(policy, range(3), record=False)
        plays.append(episodes.run([range(3), (0, 2), range(3), (1,), range(3)]))
    world_model = world_model_of(policy)
    assert world_model.backend == ('eager' if budget else 'cudagraph')
    assert (world_model.session._static is None) == (device.counts.replays == 0) == budget
    assert world_model.transformer.ln_f.weight.device == torch.device('cuda', 0)
    assert_same_play(plays[1], plays[0])


@pytest.mark.parametrize(
    ('family', 'backend', 'window', 'copies'),
    [
        ('tiny', 'cudagraph', 'rebuild', 1),
        ('cartpole', 'cudagraph', 'shift', 2),
        ('tiny', 'eager', 'rebuild', 11),
        ('tiny', 'eager', 'shift', 7),
        ('memory', 'eager', 'rebuild', 6),
    ],
)
def test_a_simulation_waits_for_nothing(
    device: Device, family: str, backend: str, window: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads nothing back, and the host does not wait for what it sends."""
    owner = CompiledSearch if backend == 'cudagraph' else Search
    expand, sent = owner.expand, []

    def counted(self: Any, *args: Any) -> Any:
        before = replace(device.counts)
        outputs = expand(self, *args)
        if warm:
            assert (device.counts.waits, device.counts.to_host) == (before.waits, before.to_host)
            assert device.counts.replays - before.replays == (backend == 'cudagraph')
            sent.append(device.counts.to_device - before.to_device)
        return outputs

    monkeypatch.setattr(owner, 'expand', counted)
    seen = FAMILIES[family].observation
    model = model_of(backend, family, dtype=torch.float32, kv_cache=dict(window=window)).to('cuda')
    drive, warm = Drive(model, ROWS, SIMULATIONS, observation=seen), False
    drive.play(UNEVEN[:5])
    warm = True
    drive.play(UNEVEN[4:6])
    assert len(sent) == 2 * SIMULATIONS
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


def test_validation_and_reanalysis_stay_on_the_device(device: Device, tmp_path: Path) -> None:
    world_model = dict(device='cuda', cache_validation_mode='model')
    policy = validated_policy('model', tmp_path, policy=ON_CUDA['policy'], world_model=world_model)
    uneven_episodes(policy, 'tiny', 4)
    assert_compared(policy)
    targets = []
    for where in ({}, ON_CUDA):
        policy = make_policy('tiny', kv=True, num_simulations=4, dtype=torch.float64, **where)
        targets.append(reanalyze(policy, 2).policies)
    assert np.array_equal(targets[1], targets[0])


@pytest.mark.parametrize('planted', [False, True])
def test_masks_begin_where_a_gpu_can_read_them(planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that hold different numbers of tokens read different columns of one mask: on a GPU it is copied
    where its rows begin anywhere, and read wrongly where its first address alone does (:data:`MASK_ROW`)."""
    attend, read = functional.scaled_dot_product_attention, []

    def attending(*parts: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        if attn_mask is not None and not any(stride % MASK_ROW for stride in attn_mask.stride()[:-1]):
            read.append(attn_mask.storage_offset() % MASK_ROW)
        return attend(*parts, attn_mask=attn_mask)

    def kept(self: torch.Tensor, **options: Any) -> torch.Tensor:
        return self if self.ndim == 4 and self.shape[1] == self.shape[2] == 1 else clone(self, **options)

    clone, budget = torch.Tensor.clone, dict(ratio=0.5, allocation='pyramid', window=4)
    episodes = Episodes(policy_of('memory', 7, kv_cache=dict(budget=budget)), range(3), record=False)
    monkeypatch.setattr(functional, 'scaled_dot_product_attention', attending)
    if planted:
        monkeypatch.setattr(torch.Tensor, 'clone', kept)
    episodes.run([range(3) if step % 3 else (2, 0) for step in range(8)])
    assert read and any(read) == planted


def test_what_cannot_be_captured_falls_back_with_one_warning(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(self: StepFunction, inputs: StepInputs) -> torch.Tensor:
        answers = plain(self, inputs)
        return answers if float(answers[0, 0]) > 0 else answers.clone()

    plain = StepFunction.plain
    monkeypatch.setattr(StepFunction, 'plain', reads)
    with pytest.warns(RuntimeWarning, match='not permitted when stream is capturing') as caught:
        answers = Drive(model_of('cudagraph').to('cuda'), ROWS, SIMULATIONS).play(UNEVEN[:2])
    assert len([each for each in caught if each.category is RuntimeWarning]) == 1
    assert largest_difference(answers, expected_answers(steps=tuple(UNEVEN[:2]))) < TOLERANCE[torch.float64]


def _fill_new_tensors(self: StaticStep, inputs: StepInputs, *args: Any) -> None:
    fill(self, inputs._replace(numbers=inputs.numbers.clone()) if self._runs else inputs, *args)


fill = StaticStep._fill

FAULTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    'weights are those of the capture': (InferenceWeights, 'refresh', lambda self: None),
    'weights are taken to be where they were': (InferenceWeights, 'in_place', lambda self: True),
    'a replay reads what the capture read': (StaticStep, '_fill', _fill_new_tensors),
}
MOVED = (*SCALED, Step((0, 1, 2), before=lambda model: replace_tensors(model, 0.9)))


@pytest.mark.parametrize('fault', [None, *FAULTS])
def test_a_planted_fault_is_seen(device: Device, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = expected_answers(steps=MOVED)
    if fault is not None:
        monkeypatch.setattr(*FAULTS[fault])
    answers = Drive(model_of('cudagraph').to('cuda'), ROWS, SIMULATIONS).play(MOVED)
    difference = largest_difference(answers, expected)
    assert difference > 1e-3 if fault is not None else difference < TOLERANCE[torch.float64]


def test_an_answer_outlives_the_next_replay(device: Device) -> None:
    number = torch.zeros(3, device='cuda')
    run = backends.captured(lambda given: given.storage + 1, StepInputs(*[number] * 7))
    first = run()
    number.fill_(4)
    assert (first.tolist(), run().tolist()) == ([1, 1, 1], [5, 5, 5])
