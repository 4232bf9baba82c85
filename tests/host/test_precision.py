"""Planning with large weights in float16, bfloat16 or int8."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lzero_kv.lightzero.inference import precision
from lzero_kv.lightzero.inference.precision import lacking, reduced
from lzero_kv.lightzero.settings import check_world_model_config
from lzero_kv.validation.findings import ValidationError
from lzero_kv.validation.oracle import Oracle
from testing import judging
from testing.episodes import Episodes
from testing.families import FAMILIES, policy_config
from testing.judging import judge_nodes, judge_roots
from testing.models import collect_model, make_policy, world_model_of

from .planted import PLANTS
from .plays import assert_same_play
from .test_weights import CHANGES
from .validated import assert_accounted, counters_of, validated_policy


def cannot(name: Any) -> bool:
    """Whether this processor cannot compute in a precision, be it slowly."""
    if name == 'bfloat16':
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(lacking(name, 768))


REDUCED = [
    pytest.param(name, marks=pytest.mark.skipif(cannot(name), reason=f'no {name} on this processor'))
    for name in precision.REDUCED
]
PRECISIONS = pytest.mark.parametrize('name', REDUCED)
INPUTS_ROUNDED = pytest.mark.parametrize('name', [one for one in REDUCED if 'float16' not in one.values])
FROM_FLOAT32 = dict(float16=0.1, bfloat16=1.0, int8=5.0)
"""Largest difference of a logit from float32 in small random models; seen: 0.09, 0.7 and 4.5."""
BEYOND_ROUNDING = dict(float16=0.0, bfloat16=0.06, int8=0.05)
"""Part of the answers of a search that one number at the edge of two levels may move; seen: one of 18 roots
and 0.01 of the nodes in bfloat16 (by 0.05 at most), 0.02 of the nodes in int8."""


@pytest.fixture
def everything_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are narrower than those whose weights are reduced by default."""
    monkeypatch.setattr(precision, 'ELEMENTS', 1)
    monkeypatch.setattr('lzero_kv.lightzero.settings.lacking', lambda name, embed_dim: None)


def reduced_policy(family: str, name: str, window: str = 'rebuild', **options: Any) -> Any:
    cache = dict(window=window, precision=name)
    return make_policy(
        family,
        kv=True,
        kv_cache=cache,
        num_simulations=10,
        collector_env_num=3,
        evaluator_env_num=1,
        **options,
    )


def play(policy: Any, family: str, steps: int = 6, seed: int = 0) -> Any:
    episodes = Episodes(
        policy, range(3), lengths={1: [3], 2: [4, 2]}, timesteps=FAMILIES[family].timesteps, seed=seed
    )
    return episodes.run(steps)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, name: str) -> torch.Tensor:
    """The same product in the open."""
    if name == 'float16':
        return F.linear(x, weight.half().float(), bias)
    if name == 'bfloat16':
        return bias + F.linear(x.bfloat16().float(), weight.bfloat16().float()).bfloat16()
    scales = weight.abs().amax(1, keepdim=True) / 127
    largest = x.abs().amax(-1, keepdim=True)
    steps = precision.input_levels()
    levels = (x / largest * steps).round().double() @ (weight / scales).round().double().T
    return (levels * largest / steps * scales.T + bias).float()


@PRECISIONS
@pytest.mark.parametrize('rows', [1, 3, 8, 41])
def test_a_product_is_that_of_rounded_numbers(name: Any, rows: int) -> None:
    weight, bias, x = drawn(42, 30), drawn(42), drawn(rows, 30) * drawn(rows, 1)
    product = reduced(weight, bias, name)(x)
    torch.testing.assert_close(product, by_hand(x, weight, bias, name), rtol=1e-5, atol=1e-5)
    assert (product - F.linear(x, weight, bias)).abs().max() > 1e-4


@pytest.mark.skipif(cannot('int8'), reason='no int8 on this processor')
@pytest.mark.parametrize('instructions', ['AVX2', None])
def test_the_largest_numbers_of_int8_do_not_overflow(instructions: str | None) -> None:
    code = (
        'import torch; from lzero_kv.lightzero.inference.precision import input_levels, reduced; '
        'x = torch.tensor([[1.0], [-1.0]]).expand(2, 70); '
        'weight = torch.tensor([[1.0], [-1.0], [1.0]]).expand(3, 70); '
        'print(reduced(weight, torch.zeros(3), "int8")(x).tolist(), input_levels())'
    )
    chosen = {} if instructions is None else {'FBGEMM_ENABLE_INSTRUCTIONS': instructions}
    run = subprocess.run(
        [sys.executable, '-c', code], env=os.environ | chosen, capture_output=True, text=True, check=True
    )
    product, levels = run.stdout.rsplit(maxsplit=1)
    assert product == '[[70.0, -70.0, 70.0], [-70.0, 70.0, -70.0]]'
    vnni = getattr(torch.cpu, 'get_capabilities', dict)().get('avx512_vnni')
    assert levels == ('127' if vnni and instructions is None else '63') or vnni is None


@PRECISIONS
def test_a_row_does_not_depend_on_who_else_is_in_the_batch(name: Any) -> None:
    layer, x = reduced(drawn(42, 30), drawn(42), name), drawn(13, 30)
    together = layer(x * torch.arange(1, 14)[:, None] ** 3)
    for row in (0, 5, 12):
        alone = layer(x[row : row + 1] * (row + 1) ** 3)[0]
        # float32 sums in another order; those of bfloat16 are rounded then
        rounding = dict(float16=1e-5, bfloat16=2**-7, int8=0.0)[name]
        torch.testing.assert_close(alone, together[row], rtol=rounding, atol=rounding)


@PRECISIONS
@pytest.mark.parametrize('broken', ['weight', 'input'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_number_that_is_not_finite_stays_so(name: Any, broken: str, value: float) -> None:
    weight, x = drawn(6, 30), drawn(4, 30)
    (weight if broken == 'weight' else x)[2, 7] = value
    product = reduced(weight, drawn(6), name)(x)
    assert not torch.isfinite(product[2] if broken == 'input' else product[:, 2]).any()


@PRECISIONS
@pytest.mark.parametrize('window', ['rebuild', 'shift'])
@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous'])
def test_roots_and_nodes_equal_their_recomputation_in_that_precision(
    everything_reduced: None, monkeypatch: pytest.MonkeyPatch, name: str, family: str, window: str
) -> None:
    policy = reduced_policy(family, name, window)
    roots = play(policy, family)
    of_roots, of_nodes = judge_roots(policy, roots, window), judge_nodes(policy, roots, window)
    assert of_roots.wrong <= BEYOND_ROUNDING[name] * of_roots.total, str(of_roots)
    assert of_nodes.wrong <= BEYOND_ROUNDING[name] * of_nodes.total, str(of_nodes)
    monkeypatch.setattr(judging, 'oracle_of', Oracle)
    assert 1e-3 < judge_nodes(policy, roots[:9], window).largest < FROM_FLOAT32[name]


@PRECISIONS
@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_the_next_search_has_the_weights_of_now(everything_reduced: None, name: str, change: Any) -> None:
    policy = reduced_policy('tiny', name)
    play(policy, 'tiny', steps=2)
    with torch.enable_grad():
        change(world_model_of(policy))
    roots = play(policy, 'tiny', steps=4, seed=1)
    for judged in (judge_roots(policy, roots, 'rebuild'), judge_nodes(policy, roots, 'rebuild')):
        assert judged.wrong <= BEYOND_ROUNDING[name] * judged.total, str(judged)


@PRECISIONS
def test_training_and_checkpoints_do_not_see_it(everything_reduced: None, name: str) -> None:
    policy, exact = reduced_policy('tiny', name), reduced_policy('tiny', 'float32')
    for one in (policy, exact):
        play(one, 'tiny', steps=2)
    mine, theirs = (collect_model(one).state_dict() for one in (policy, exact))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    tokens = drawn(2, 5, FAMILIES['tiny'].embed)
    outs = [world_model_of(one).transformer(tokens, None, None) for one in (policy, exact)]
    assert torch.equal(*outs)


def test_the_default_is_float32_to_the_last_bit() -> None:
    exact, default = reduced_policy('tiny', 'float32'), make_policy(
        'tiny', kv=True, num_simulations=10, collector_env_num=3, evaluator_env_num=1
    )  # fmt: skip
    assert_same_play(play(exact, 'tiny'), play(default, 'tiny'), tolerance=0.0)


def test_validation_judges_float16_as_strictly_as_float32(everything_reduced: None, tmp_path: Path) -> None:
    policy = validated_policy('recompute', tmp_path, kv_cache=dict(precision='float16'))
    play(policy, 'tiny')
    counters = counters_of(policy)
    assert counters.nodes.compared == counters.nodes.equal > 0
    assert_accounted(counters.total)


@pytest.mark.parametrize('plant', ['another node', 'exchanged at roots', 'rotary positions off'])
def test_a_planted_fault_is_still_named(
    everything_reduced: None, plant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planted = PLANTS[plant]
    planted.plant(monkeypatch)
    policy = validated_policy(
        'recompute', tmp_path, family=planted.family, num_simulations=6, kv_cache=dict(precision='float16')
    )
    with pytest.raises(ValidationError) as raised:
        play(policy, planted.family, steps=4)
    assert (raised.value.finding.fault, raised.value.finding.kind) == (planted.fault, planted.kind)


@INPUTS_ROUNDED
def test_a_fault_is_seen_where_inputs_are_rounded(
    everything_reduced: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTS['another node'].plant(monkeypatch)
    policy = reduced_policy('tiny', name)
    nodes = judge_nodes(policy, play(policy, 'tiny', steps=4), 'rebuild')
    assert nodes.wrong > 2 * BEYOND_ROUNDING[name] * nodes.total


WIDE = dict(embed_dim=768, group_size=8)


@pytest.mark.parametrize(
    ('name', 'model', 'reason'),
    [
        ('int8', dict(), r'pays from 524,288 weights in a matrix on, the largest here has 2,304'),
        *(
            (name, WIDE | dict(cache_validation_mode='recompute'), r"tell them apart; write 'float16' or")
            for name in ('bfloat16', 'int8')
        ),
    ],
    ids=['small', 'bfloat16 validated', 'int8 validated'],
)
def test_what_cannot_pay_or_be_checked_is_refused(name: str, model: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reduced_policy('tiny', name, world_model=model)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('bfloat16', 'this processor has no AMX, without which'),
        ('int8', 'torch has no FBGEMM for this processor'),
    ],
)
def test_a_processor_without_the_instructions_is_refused(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: dict(amx_bf16=False), raising=False)
    monkeypatch.setattr(torch.backends.quantized.__class__, 'supported_engines', ['none'], raising=False)
    with pytest.raises(ValueError, match=f'{name}.*: {reason}.*; leave it out'):
        reduced_policy('tiny', name, world_model=WIDE)


@pytest.mark.parametrize('gpu', [False, True])
def test_a_gpu_is_refused_and_a_config_that_names_one_is_not(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LightZero's configs say 'cuda' and run on the CPU where there is no GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpu)
    named = dict(embed_dim=768, group_size=8, device='cuda')
    config = policy_config(FAMILIES['tiny'], True, dict(precision='float16'), {}, named).model.world_model_cfg
    with pytest.raises(ValueError, match=r"got device='cuda'") if gpu else nullcontext():
        check_world_model_config(config)


def test_modes_that_compare_with_float32_are_refused(everything_reduced: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'store' compares with products in float32; write .*'recompute'"):
        validated_policy('store', tmp_path, kv_cache=dict(precision='float16'))


def test_another_dtype_is_refused_where_weights_are_taken(everything_reduced: None) -> None:
    policy = reduced_policy('tiny', 'float16')
    world_model_of(policy).double()
    with pytest.raises(ValueError, match=r'expected weights in float32 on a CPU, got torch\.float64'):
        assert world_model_of(policy).session.weights


@pytest.mark.parametrize('backend', ['compile', 'cudagraph'])
def test_a_compiled_backend_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=f"precision: 'int8' cannot be combined with backend='{backend}'"):
        make_policy('atari', kv=True, kv_cache=dict(precision='int8', backend=backend))


def test_a_gelu_behind_a_reduced_product_is_kept(everything_reduced: None) -> None:
    from lzero_kv.lightzero.inference.weights import layers_of

    modules = nn.Sequential(nn.Linear(30, 42), nn.GELU(approximate='tanh'), nn.Linear(42, 6))
    with torch.no_grad():
        x = found = drawn(5, 30)
        for layer in layers_of(modules, precision='float16'):
            found = layer(found)
        torch.testing.assert_close(found, modules(x), rtol=5e-3, atol=5e-3)
