"""Which keys and values the stock cache hands to each node, against those it stored for the node's parent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .models import world_model_of
from .recorder import ROOT, replaced
from .repeatable_tree import host_trees


class StockLookups:
    """Counts the lookups of the stock cache below the roots, and those answered with another node's keys
    and values.

    A probe of the stock world model's own methods, so it says nothing about attention, padding or positions.
    """

    def __init__(self, policy: Any) -> None:
        self.total = 0
        self.wrong = 0
        self._model = world_model_of(policy)
        self._tree = host_trees()[1 if policy._cfg.type == 'sampled_unizero' else 0]
        self._stored: dict[tuple[int, int], tuple[int, list[torch.Tensor]]] = {}
        self._parents: list[int] = []
        self._row = 0
        self._node = ROOT

    @contextmanager
    def counted(self) -> Iterator[None]:
        model = self._model
        traverse = self._tree.batch_traverse
        retrieve = model.retrieve_or_generate_kvcache
        store_root, store_node = (
            model.custom_copy_kv_cache_to_shared_init_envs,
            model.custom_copy_kv_cache_to_shared_recur,
        )

        def batch_traverse(*args: Any) -> Any:
            leaves = traverse(*args)
            self._parents = list(leaves[0])
            self._row = 0
            self._node += 1
            return leaves

        def root(source: Any, env: int) -> int:
            self._stored[ROOT, env] = _contents(source)
            self._node = ROOT
            return store_root(source, env)

        def node(source: Any) -> int:
            self._stored[self._node, self._row] = _contents(source)
            self._row += 1
            return store_node(source)

        def retrieve_and_count(*args: Any) -> Any:
            sizes = retrieve(*args)
            for row, served in enumerate(model.keys_values_wm_list):
                self.total += 1
                self.wrong += not _equal(_contents(served), self._stored[self._parents[row], row])
            return sizes

        with ExitStack() as stack:
            for owner, name, function in (
                (self._tree, 'batch_traverse', batch_traverse),
                (model, 'custom_copy_kv_cache_to_shared_init_envs', root),
                (model, 'custom_copy_kv_cache_to_shared_recur', node),
                (model, 'retrieve_or_generate_kvcache', retrieve_and_count),
            ):
                stack.enter_context(replaced(owner, name, function))
            yield


def _contents(keys_values: Any) -> tuple[int, list[torch.Tensor]]:
    size = keys_values.size
    caches = [cache for layer in keys_values for cache in (layer._k_cache, layer._v_cache)]
    return size, [cache._cache[:, :, :size].clone() for cache in caches]


def _equal(one: tuple[int, list[torch.Tensor]], other: tuple[int, list[torch.Tensor]]) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
