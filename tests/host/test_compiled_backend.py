"""What torch.compile and a CUDA graph make of the step on static shapes. The first run compiles for about a
minute; later ones take it from torch.compile's cache."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lzero_kv.lightzero.inference import backends
from testing.families import FAMILIES

from .direct import Drive, Step, largest_difference
from .test_backends import ROWS, SIMULATIONS, TOLERANCE, UNEVEN, model_of, scale

CHANGING = [*UNEVEN, Step((0, 1, 2), before=lambda model: scale(model, 0.9)), *UNEVEN[4:]]
"""Uneven rows, full windows, environments that come and go, weights that change."""

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


@pytest.mark.parametrize(
    ('backend', 'device'),
    [
        ('compile', 'cpu'),
        pytest.param('compile', 'cuda', marks=NEEDS_CUDA),
        pytest.param('cudagraph', 'cuda', marks=NEEDS_CUDA),
    ],
)
@pytest.mark.parametrize(
    ('dtype', 'family', 'kinds'),
    [
        (torch.float64, 'tiny', {'plain'}),
        (torch.float32, 'cartpole', {'deriving'}),
        pytest.param(torch.float64, 'tiny', {'plain', 'deriving'}, marks=pytest.mark.slow),
        pytest.param(torch.float32, 'cartpole', {'plain', 'deriving'}, marks=pytest.mark.slow),
    ],
    ids=['learned-float64', 'rotary-float32', 'learned-float64-both', 'rotary-float32-both'],
)
def test_answers_equal_those_of_the_eager_backend(
    dtype: torch.dtype,
    family: str,
    kinds: set[str],
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps of other ``kinds`` run as they are: compiling takes half a minute for each."""
    made = _count(monkeypatch, backend, kinds)
    models = [
        model_of(kind, family, dtype=dtype, kv_cache=dict(window='rebuild')).to(device)
        for kind in ('eager', backend)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)  # a fall-back would hide what is tested
        plays = [Drive(model, ROWS, SIMULATIONS).play(CHANGING[:9]) for model in models]
        compiled = counters['stats']['unique_graphs']
        plays = [Drive(model, ROWS, SIMULATIONS, seed=1).play(CHANGING) for model in models]
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[dtype]
    assert sorted(made) == ['deriving', 'plain'], 'once for each kind of step'
    assert counters['stats']['unique_graphs'] == compiled, 'nothing is compiled again'


def _count(monkeypatch: pytest.MonkeyPatch, backend: str, kinds: set[str]) -> list[str]:
    made: list[str] = []
    make = backends.RUNNERS[backend]

    def counted(function: Any, inputs: Any) -> Any:
        made.append(function.__name__)
        return make(function, inputs) if function.__name__ in kinds else lambda: function(inputs)

    monkeypatch.setitem(backends.RUNNERS, backend, counted)
    return made


def test_without_a_compiler_it_falls_back_with_one_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real failure of torch.compile: there is no such program. It comes behind the whole lowering, whose
    time goes with the layers."""
    import torch._inductor.config as inductor

    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    flat = replace(FAMILIES['tiny'], layers=1)
    expected = Drive(model_of('eager', flat), ROWS, SIMULATIONS).play(UNEVEN)
    with (
        inductor.patch({'cpp.cxx': ('no-such-compiler',), 'fx_graph_cache': False}),
        pytest.warns(RuntimeWarning, match="(?s)backend='compile' does not work.*no-such-compiler") as caught,
    ):
        answers = Drive(model_of('compile', flat), ROWS, SIMULATIONS).play(UNEVEN)
    assert sum(warning.category is RuntimeWarning for warning in caught) == 1
    assert largest_difference(answers, expected) < TOLERANCE[torch.float64]
