"""The builders make real host policies whose dimensions cannot be confused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import collect_model, copy_weights, make_policy, world_model_of
from testing.precision import precision

SMALL: dict[str, Any] = dict(num_simulations=3, collector_env_num=2, evaluator_env_num=1)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_is_built_as_described(name: str) -> None:
    family = FAMILIES[name]
    policy = make_policy(name, kv=False)
    world_model = world_model_of(policy)
    config = world_model.config
    assert (config.num_layers, config.num_heads, config.embed_dim) == (
        family.layers,
        family.heads,
        family.embed,
    )
    assert (config.context_length, config.env_num) == (
        family.context,
        max(family.collectors, family.evaluators),
    )
    assert policy._cfg.num_simulations == family.simulations
    assert bool(config.rotary_emb) is family.rotary
    assert not collect_model(policy).training
    dimensions = [
        family.layers,
        family.heads,
        family.embed // family.heads,
        family.context,
        family.actions,
        family.embed,
    ]
    if name != 'tiny':
        assert len(set(dimensions)) == len(dimensions), 'two dimensions are the same number'


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('mode', ['collect', 'eval'])
def test_a_family_plays_in_both_precisions(name: str, mode: str) -> None:
    visits = []
    for dtype in (torch.float32, torch.float64):
        policy = make_policy(name, kv=False, dtype=dtype, **SMALL)
        roots = Episodes(policy, [0], mode=mode, timesteps=FAMILIES[name].timesteps).run(2)
        assert world_model_of(policy).keys_values_wm._keys_values[0]._k_cache._cache.dtype == dtype
        visits.append([root.visits for root in roots])
    assert visits[0] == visits[1]


def test_no_weight_is_left_at_zero_and_the_seed_decides() -> None:
    one, same, other = (
        collect_model(make_policy('tiny', kv=False, seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    names = [name for name, _ in collect_model(make_policy('tiny', kv=False)).named_parameters()]
    assert all(one[name].abs().min() > 0 for name in names)
    assert all(torch.equal(one[name], same[name]) for name in names)
    assert not any(torch.equal(one[name], other[name]) for name in names)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_copied_weights_are_the_same_weights(dtype: torch.dtype) -> None:
    source, target = make_policy('tiny', kv=False, seed=1), make_policy('tiny', kv=False, seed=2, dtype=dtype)
    copy_weights(source, target)
    expected = collect_model(source).state_dict()
    for model in (collect_model(target), target._target_model):
        assert all(
            torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in _named(model).items()
        )


def test_precision_is_restored_after_an_error() -> None:
    from lzero.model.unizero_world_models import transformer

    rotate = transformer.apply_rotary_emb
    with pytest.raises(KeyError), precision(torch.float64):
        assert torch.get_default_dtype() == torch.float64
        assert transformer.apply_rotary_emb is not rotate
        raise KeyError
    assert torch.get_default_dtype() == torch.float32
    assert transformer.apply_rotary_emb is rotate


def test_a_copied_memory_model_encodes_with_its_own_weights() -> None:
    model = collect_model(make_policy('memory', kv=False, dtype=torch.float64, **SMALL))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    observation = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    assert not torch.equal(twin.tokenizer.encoder(observation), model.tokenizer.encoder(observation))


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix('_orig_mod.'): tensor for name, tensor in model.state_dict().items()}
