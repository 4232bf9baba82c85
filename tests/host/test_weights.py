"""Functions in place of the host's modules: the same numbers, by the weights of the moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lzero_kv.lightzero.inference import weights
from lzero_kv.lightzero.inference.backends import RUNNERS
from lzero_kv.lightzero.inference.weights import affine, layers_of
from testing.episodes import Episodes
from testing.judging import judge_nodes, judge_roots
from testing.models import make_policy, world_model_of

ROUNDING = dict(rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rows', [1, 3, 8, 41, 300])
def test_packed_weights_give_the_same_numbers(rows: int) -> None:
    if not weights.has_packed_products():
        pytest.skip('this build of torch has no MKL')
    linear = nn.Linear(30, 42)
    packed = affine(linear.weight, linear.bias)
    x = torch.randn(rows, 2, 30, generator=torch.Generator().manual_seed(rows))[:, 1]  # rows that lie apart
    with torch.no_grad():
        torch.testing.assert_close(packed(x), linear(x), **ROUNDING)
        linear.weight.mul_(2)  # read by an affine layer that is not packed
        assert not torch.allclose(packed(x), linear(x))


def test_a_product_that_is_wrong_for_some_number_of_rows_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(weight: torch.Tensor, bias: torch.Tensor) -> weights.Layer:
        return lambda x: torch.nn.functional.linear(x, weight, bias) + (len(x) == 27)

    monkeypatch.setattr(weights, '_packed_product', wrong)
    weights.has_packed_products.cache_clear()
    try:
        assert not weights.has_packed_products()
    finally:
        weights.has_packed_products.cache_clear()


@pytest.mark.parametrize('gelu', ['none', 'tanh'])
@pytest.mark.parametrize('features', [42, weights.GELU_WIDTH + 1])
def test_a_gelu_is_that_of_its_module(features: int, gelu: str) -> None:
    module = nn.GELU(approximate=gelu)
    _, layer = layers_of([nn.Linear(3, features), module])
    x = torch.randn(7, features) * torch.logspace(-3, 3, 7)[:, None]
    torch.testing.assert_close(layer(x), module(x), **ROUNDING)


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous', 'stack4'])
def test_searches_with_packed_weights_equal_their_recomputation(family: str, window: str) -> None:
    policy = make_policy(
        family, kv=True, kv_cache=dict(window=window), num_simulations=10, collector_env_num=3
    )
    roots = Episodes(policy, range(3), lengths={1: [3], 2: [4, 2]}).run(6)
    for verdict in (judge_roots(policy, roots, window), judge_nodes(policy, roots, window)):
        assert verdict.wrong == 0, str(verdict)


def test_a_sequence_leaves_out_dropout_and_keeps_what_it_does_not_know() -> None:
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    modules = nn.Sequential(
        nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 6, bias=False), Doubling(), nn.Dropout(0.9), nn.Linear(6, 3)
    )
    x = torch.randn(4, 5)
    with torch.no_grad():
        found = x
        for layer in layers_of(modules):
            found = layer(found)
        torch.testing.assert_close(found, modules.eval()(x), **ROUNDING)


def test_a_hook_on_a_layer_is_called() -> None:
    linear, seen = nn.Linear(5, 7), []
    linear.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    (layer,) = layers_of([linear])
    layer(torch.zeros(3, 5))
    assert seen == [(3, 7)]


def write_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.mul_(0.7)


def step_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    sum(parameter.square().sum() for parameter in model.parameters()).backward()
    optimizer.step()


def replace_data(model: Any) -> None:
    for parameter in model.transformer.parameters():
        parameter.data = parameter.data * 0.7


def load_a_state(model: Any) -> None:
    model.load_state_dict({name: 0.7 * tensor for name, tensor in model.state_dict().items()})


def write_around_autograd_and_clear(model: Any) -> None:
    for parameter in model.transformer.parameters():
        parameter.data.mul_(0.7)
    model.clear_caches()


def replace_parameters_and_clear(model: Any) -> None:
    for module in model.transformer.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(0.7 * module.weight.detach())
    model.clear_caches()


CHANGES = [
    *(write_in_place, step_an_optimizer, replace_data, load_a_state),
    *(write_around_autograd_and_clear, replace_parameters_and_clear),
]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_the_next_search_has_the_weights_of_now(change: Any) -> None:
    policy = make_policy('tiny', kv=True, num_simulations=6, collector_env_num=3)
    model = world_model_of(policy)
    Episodes(policy, range(3)).run(2)
    with torch.enable_grad():
        change(model)
    roots = Episodes(policy, range(3), seed=1).run(4)  # other episodes: no root is stored from before
    for verdict in (judge_roots(policy, roots, 'rebuild'), judge_nodes(policy, roots, 'rebuild')):
        assert verdict.wrong == 0, str(verdict)


@pytest.mark.parametrize('backend', ['eager', 'compile'])
@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_the_next_root_has_the_weights_of_now(
    change: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of episodes: roots that the old weights stored are computed again."""
    monkeypatch.setitem(RUNNERS, 'compile', lambda step, inputs: lambda: step(inputs))
    policy = make_policy(
        'tiny', kv=True, num_simulations=6, collector_env_num=3, kv_cache=dict(backend=backend)
    )
    episodes = Episodes(policy, range(3))
    episodes.run(2)
    with torch.enable_grad():
        change(world_model_of(policy))
    roots = episodes.run(2)
    for verdict in (judge_roots(policy, roots, 'rebuild'), judge_nodes(policy, roots, 'rebuild')):
        assert verdict.wrong == 0, str(verdict)


def test_weights_that_did_not_change_are_copied_once() -> None:
    policy = make_policy('tiny', kv=True, num_simulations=3, collector_env_num=2)
    model, episodes = world_model_of(policy), Episodes(policy, range(2))
    episodes.run(1)
    first = model.session.weights
    episodes.run(3)
    assert model.session.weights is first
