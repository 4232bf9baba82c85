"""Operators dispatched for the cache in one simulation: a small number that does not grow with depth."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, world_model_of

VIEWS = {
    *('alias', 'as_strided', 'detach', 'expand', 'permute', 'select', 'slice', 'split', 'squeeze', 't'),
    *('transpose', 'unbind', 'unsqueeze', 'view', '_unsafe_view'),
}
CACHE = {
    'index_select',
    'index_copy_',
    'copy_',
    'add_',
    'add_out',
    'sub_out',
    'addcmul_',
    'index',
    'stack',
    'masked_fill_',
    'zeros',
    'new_zeros',
    'cat',
}
SIMULATIONS = 6
STOCK = {2: 132, 4: 264, 8: 528}
"""Operators of stock's cache work in one simulation, by layers."""
STOCK_MODEL = {2: 126, 4: 206, 8: 366}
"""Operators of stock's model in one simulation, by layers."""
APPENDED = 2
"""Tokens appended in one simulation."""


class Operators(TorchDispatchMode):
    """Counts operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode hands over composed operators whole
            parts = func.decompose(*args, **(kwargs or {}))
        if parts is not NotImplemented:
            return parts
        name = func.overloadpacket.__name__
        name = {'_mkl_linear': 'addmm'}.get(name, name)  # the same product, by packed weights
        if func._overloadname == 'out' and name in ('add', 'sub'):
            name += '_out'  # of keys and values; the model's own residuals return a new tensor
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def per_simulation(layers: int, window: str, environments: int = 4) -> Counter[str]:
    """Operators of one simulation once windows are full: a search of twice the simulations minus one of
    them."""
    family = replace(FAMILIES['tiny'], layers=layers)
    policy = make_policy(
        family,
        kv=True,
        kv_cache=dict(window=window),
        num_simulations=2 * SIMULATIONS,
        collector_env_num=environments,
    )
    episodes = Episodes(policy, range(environments), record=False)
    episodes.run(4)
    counted = []
    for simulations in (SIMULATIONS, 2 * SIMULATIONS):
        policy._mcts_collect._cfg.num_simulations = simulations
        with Operators() as operators:
            episodes.step()
        counted.append(operators.counts)
    short, long = counted
    return Counter({name: round((long[name] - short[name]) / SIMULATIONS) for name in long})


def of_moved_windows(layers: int, asked: list[int]) -> Counter[str]:
    """Operators of one simulation that asks for these of three children of each root, two of them not asked
    for before; their windows moved."""
    family = replace(FAMILIES['tiny'], layers=layers)
    policy = make_policy(family, kv=True, num_simulations=SIMULATIONS, collector_env_num=len(asked))
    Episodes(policy, range(len(asked)), record=False).run(8)
    world_model = world_model_of(policy)
    actions = torch.zeros(len(asked), dtype=torch.int64)
    with torch.no_grad():
        latents = world_model.session.latest.latents.numpy()
        search = world_model.begin_search(latents, np.zeros(len(asked)), SIMULATIONS)
        for parents in (0, 0, 0, 3):
            search.expand(np.full(len(asked), parents), actions)
        with Operators() as operators:
            search.expand(np.array(asked), actions)
    return operators.counts


def cache_work(counts: Counter[str], layers: int, appended: int = APPENDED) -> int:
    """Operators of cache work. Not counted: the copy that puts ``appended`` tokens' keys and values of one
    layer into place, each of which comes instead of two of the host's three projections, and the one that
    joins the logits of value and reward."""
    return sum(counts[name] for name in CACHE) - appended * layers - 1


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
def test_cache_work_is_a_handful_of_operators_at_any_depth(window: str) -> None:
    work = {}
    for layers in STOCK:
        counts = per_simulation(layers, window)
        assert sum(counts.values()) < STOCK[layers] + STOCK_MODEL[layers]
        if window == 'shift':
            work[layers] = cache_work(counts, layers)
            assert counts['index_select'] == 2, 'steps, and what their places add'
            assert counts['index_copy_'] == 0, 'children are stored in a row'
    assert window == 'rebuild' or set(work.values()) == {5}, work


@pytest.mark.parametrize('asked', [[1, 1, 2, 2], [1, 3, 3, 2]], ids=['all', 'some'])
def test_moved_windows_are_computed_beside_the_action(asked: list[int]) -> None:
    """In each layer their keys and values are put into place beside the action's, and their attention joins
    the action's; a pass of their own would take more than all the rest of the layer."""
    work = {}
    for layers in STOCK:
        counts = of_moved_windows(layers, asked)
        joined = layers  # the tokens, and their attention in each layer but the last
        work[layers] = cache_work(counts, layers, APPENDED + 1) - joined
        assert counts['addmm'] == APPENDED * layers * 4 + 4 * 2, 'no pass of its own'
    assert max(work.values()) <= 7, work
    assert len(set(work.values())) == 1, work


def test_what_is_not_cache_work_is_the_models_own() -> None:
    """With shifted windows, everything else is what two tokens cost in the host's modules and its value
    transforms."""
    counts = per_simulation(2, 'shift')
    rest = {name: count for name, count in counts.items() if count and name not in CACHE}
    # Each token in each of two layers: query, key and value at once, projection, two of the MLP; then four
    # heads of two each.
    assert rest['addmm'] == 2 * 2 * 4 + 4 * 2
    assert rest['native_layer_norm'] == 2 * (2 * 2 + 1)
    attention = [name for name in rest if 'scaled_dot_product' in name]
    assert sum(rest[name] for name in attention) == 2 * 2
