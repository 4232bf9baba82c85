"""Inference on a CUDA device against the CPU's: answers, whole plays, waits, validation and reanalysis.

Skipped without one, where ``test_emulated_cuda.py`` looks at what can be seen on a CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.lightzero.inference.compiled import CompiledSearch
from lzero_kv.lightzero.inference.expand import Search
from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, options_of_device, world_model_of
from testing.reanalysis import reanalyze

from .direct import Drive, largest_difference
from .plays import assert_same_play
from .test_backends import EACH_KIND, ROWS, SCALED, SIMULATIONS, TOLERANCE, UNEVEN, model_of
from .test_engine import uneven_episodes
from .validated import assert_compared, validated_policy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

ON_CUDA = options_of_device('cuda')
BUDGET = dict(ratio=0.5, allocation='attention_based', alpha=1.0, window=4)


@pytest.fixture(autouse=True)
def _float32_stays_float32() -> Iterator[None]:
    """No TF32, and a fall-back, which would hide what is tested, is an error."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize('backend', ['eager', 'cudagraph'])
@pytest.mark.parametrize('window', ['rebuild', 'shift'])
@EACH_KIND
def test_answers_are_those_of_a_cpu(family: str, dtype: torch.dtype, window: str, backend: str) -> None:
    plays, seen = [], FAMILIES[family].observation
    for where in ('cpu', 'cuda'):
        kind = backend if where == 'cuda' else 'eager'
        model = model_of(kind, family, dtype=dtype, kv_cache=dict(window=window)).to(where)
        plays.append(Drive(model, ROWS, SIMULATIONS, observation=seen).play(SCALED))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ('family', 'kv_cache', 'options'),
    [
        ('tiny', dict(window='shift'), {}),
        ('tiny', {}, {}),
        ('memory', dict(budget=BUDGET), dict(infer_context_length=9)),
    ],
)
def test_a_policy_searches_as_on_a_cpu(
    family: str, kv_cache: dict[str, Any], options: dict[str, Any]
) -> None:
    """The host's own policy and tree."""
    plays = []
    for where in ({}, ON_CUDA):
        policy = make_policy(
            family, kv=True, kv_cache=dict(kv_cache), dtype=torch.float64, num_simulations=4,
            collector_env_num=3, evaluator_env_num=1, **options | where,
        )  # fmt: skip
        episodes = Episodes(policy, range(3), record=False)
        plays.append(episodes.run([range(3), (0, 2), range(3), (1,), range(3)]))
    world_model = world_model_of(policy)
    assert world_model.transformer.ln_f.weight.is_cuda
    assert world_model.backend == ('eager' if 'budget' in kv_cache else 'cudagraph')
    assert_same_play(plays[1], plays[0])


@pytest.mark.parametrize(
    ('family', 'backend', 'window'),
    [
        ('tiny', 'cudagraph', 'rebuild'),
        ('cartpole', 'cudagraph', 'shift'),
        ('tiny', 'eager', 'rebuild'),
        ('tiny', 'eager', 'shift'),
        ('memory', 'eager', 'rebuild'),
    ],
)
def test_a_simulation_waits_for_nothing(
    family: str, backend: str, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises where the host would wait for the device."""
    owner = CompiledSearch if backend == 'cudagraph' else Search
    expand, warm, watched = owner.expand, False, 0

    def watching(self: Any, *args: Any) -> Any:
        nonlocal watched
        torch.cuda.set_sync_debug_mode('error' if warm else 'default')
        try:
            return expand(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode('default')
            watched += warm

    monkeypatch.setattr(owner, 'expand', watching)
    seen = FAMILIES[family].observation
    model = model_of(backend, family, dtype=torch.float32, kv_cache=dict(window=window)).to('cuda')
    drive = Drive(model, ROWS, SIMULATIONS, observation=seen)
    drive.play(UNEVEN[:5])
    warm = True
    drive.play(UNEVEN[4:6])
    assert watched == 2 * SIMULATIONS


def test_validation_and_reanalysis_stay_on_the_device(tmp_path: Path) -> None:
    for mode in ('store', 'model', 'recompute'):
        world_model = dict(device='cuda', cache_validation_mode=mode)
        policy = validated_policy(mode, tmp_path, policy=ON_CUDA['policy'], world_model=world_model)
        uneven_episodes(policy, 'tiny', 4)
        assert_compared(policy)
    targets = []
    for where in ({}, ON_CUDA):
        policy = make_policy('tiny', kv=True, num_simulations=4, dtype=torch.float64, **where)
        targets.append(reanalyze(policy, 2).policies)
    assert np.allclose(targets[1], targets[0], rtol=0.0, atol=1e-9)
