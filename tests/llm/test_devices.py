"""A model whose layers stand on several devices, as transformers' ``device_map`` puts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lzero_kv.llm import BudgetCache
from testing.emulated_cuda import emulated_cuda

from .models import batch, generate, make
from .test_cache import METHODS, budget


def moved(value: Any, device: str) -> Any:
    """Tensors in nested tuples, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


def spread(model: Any, number: int) -> None:
    """Put one layer on the other device; what it is called with follows, as accelerate moves it."""
    for at, module in enumerate([*model.model.layers, model.model.norm]):
        where = 'cuda' if at == number else 'cpu'

        def follow(_: Any, args: Any, kwargs: Any, where: str = where) -> Any:
            return moved(args, where), {name: moved(value, where) for name, value in kwargs.items()}

        module.to(where)
        module.register_forward_pre_hook(follow, with_kwargs=True)


@pytest.mark.parametrize('method', METHODS, ids=lambda method: '-'.join(map(str, method.values())))
def test_layers_on_two_devices_keep_what_those_of_one_do(method: dict[str, Any]) -> None:
    model, (ids, mask) = make('llama'), batch()
    caches = [BudgetCache(model.config, budget(method)) for _ in range(2)]
    expected = generate(model, ids, mask, caches[0])
    with emulated_cuda():  # refuses tensors of the CPU beside its own
        spread(model, 1)
        logits = generate(model, ids, mask, caches[1])
        there, spread_out = ([cache[number] for number in range(3)] for cache in caches)
        assert [layer.keys.device.type for layer in spread_out] == ['cpu', 'cuda', 'cpu']
        for own, layer in zip(spread_out, there, strict=True):
            assert torch.equal(own.positions.cpu(), layer.positions)
        assert torch.equal(logits.cpu(), expected)
        assert caches[1].bytes == caches[0].bytes
