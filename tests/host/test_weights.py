"""Functions in place of the host's modules: the same numbers, by the weights of the moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lzero_kv.lightzero.inference import weights
from lzero_kv.lightzero.inference.weights import affine, layers_of
from testing.episodes import Episodes
from testing.judging import judge_nodes, judge_roots
from testing.models import make_policy, world_model_of

ROUNDING = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture
def everything_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are narrower than those whose weights are packed by default."""
    monkeypatch.setattr(weights, 'PACKED_ELEMENTS', 1)


@pytest.mark.parametrize('gelu', [None, 'none', 'tanh'])
@pytest.mark.parametrize('rows', [1, 3, 8, 41])
def test_packed_weights_give_the_same_numbers(everything_packed: None, rows: int, gelu: str | None) -> None:
    if not weights.packs(torch.zeros(1 << 9, 1 << 9)):
        pytest.skip('this build of torch has no oneDNN')
    linear = nn.Linear(30, 42)
    x = torch.randn(rows, 30, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        expected = linear(x) if gelu is None else nn.GELU(approximate=gelu)(linear(x))
        torch.testing.assert_close(affine(linear.weight, linear.bias, gelu)(x), expected, **ROUNDING)


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous', 'stack4'])
def test_searches_with_packed_weights_equal_their_recomputation(
    everything_packed: None, family: str, window: str
) -> None:
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


CHANGES = [write_in_place, step_an_optimizer, replace_data, load_a_state, write_around_autograd_and_clear]


@pytest.mark.parametrize('change', CHANGES, ids=lambda change: change.__name__)
def test_the_next_search_has_the_weights_of_now(everything_packed: None, change: Any) -> None:
    policy = make_policy('tiny', kv=True, num_simulations=6, collector_env_num=3)
    model = world_model_of(policy)
    Episodes(policy, range(3)).run(2)
    with torch.enable_grad():
        change(model)
    roots = Episodes(policy, range(3), seed=1).run(4)  # other episodes: no root is stored from before
    for verdict in (judge_roots(policy, roots, 'rebuild'), judge_nodes(policy, roots, 'rebuild')):
        assert verdict.wrong == 0, str(verdict)


def test_weights_that_did_not_change_are_copied_once() -> None:
    policy = make_policy('tiny', kv=True, num_simulations=3, collector_env_num=2)
    model, episodes = world_model_of(policy), Episodes(policy, range(2))
    episodes.run(1)
    first = model.session.weights
    episodes.run(3)
    assert model.session.weights is first
