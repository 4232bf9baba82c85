"""The stock world model over the weights of another, its caches unchanged and every slot recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lzero.model.unizero_world_models.utils import hash_state
from lzero.model.unizero_world_models.world_model import WorldModel

from lzero_kv.cache.keys import digest_rows
from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation.histories import HistoryName


@dataclass
class Slot:
    """What a slot of the stock rings was written with.

    Attributes:
        key: the key it was written under.
        history: the history it was written for.
        digest: digest of what was written.
        causes: proven reasons for which its content is not that of ``history``; None where they do not
            account for all of the difference.
        exact: whether this cache stored the same numbers.
    """

    key: str
    history: HistoryName
    digest: int
    causes: frozenset[Cause] | None = frozenset()
    exact: bool = True


@dataclass(frozen=True)
class Lookup:
    """One lookup of the stock dictionaries.

    Attributes:
        key: what was looked for.
        found: whether a dictionary has the key.
        slot: what the slot behind it was written with.
        entry: the ``KeysValues`` in that slot.
        intact: whether it holds what was written, to the last bit.
    """

    key: str
    found: bool = False
    slot: Slot | None = None
    entry: Any = None
    intact: bool = True


class StockWorldModel(WorldModel):
    """A stock ``WorldModel`` that shares the modules of another, and none of its caches.

    The dictionaries, rings and methods are LightZero's, unchanged. Subclassed methods only record which
    history each slot was written for, and which keys and values each row was served.

    Attributes:
        naming: names of the histories that the next inference stores, one per row; set by the caller.
        served: keys and values ``[2 * layers, T, embed]`` that each row of the latest inference was handed.
    """

    naming: Sequence[HistoryName]
    served: list[torch.Tensor]
    _root_slots: dict[tuple[int, int], Slot]
    _node_slots: dict[int, Slot]
    _newest: dict[int, tuple[Slot, Any]]
    _keys: dict[int, Any]
    _row: int
    # LightZero annotates neither.
    past_kv_cache_init_infer_envs: list[dict[Any, int]]
    past_kv_cache_recurrent_infer: dict[Any, int]

    @classmethod
    def over(cls, world_model: WorldModel) -> StockWorldModel:
        """A stock model with the parameters of ``world_model`` and empty caches."""
        stock = cls.__new__(cls)
        stock.__dict__.update(world_model.__dict__)
        stock.__dict__['_source'] = world_model  # past nn.Module, which would make it a child of itself
        stock._initialize_cache_structures()
        stock._initialize_statistics()
        stock._initialize_transformer_keys_values()
        stock.shared_pool_recur_infer = [None] * stock.shared_pool_size
        stock.shared_pool_init_infer = [[None] * stock.shared_pool_size_init for _ in range(stock.env_num)]
        stock.shared_pool_index_init_envs = [0] * stock.env_num
        stock.shared_pool_wm = [None] * stock.shared_pool_size_wm
        stock.shared_pool_index = stock.shared_pool_index_wm = 0
        stock.latent_state = None
        stock.naming, stock.served = (), []
        stock._root_slots, stock._node_slots, stock._newest, stock._keys = {}, {}, {}, {}
        return stock

    @property
    def pos_emb_diff_k(self) -> Any:  # type: ignore[override]
        """The position correction of keys, as old as LightZero would have it."""
        return self._source.__dict__['pos_emb_diff_k']

    @property
    def pos_emb_diff_v(self) -> Any:  # type: ignore[override]
        """The position correction of values, likewise."""
        return self._source.__dict__['pos_emb_diff_v']

    def lookup_root(self, row: int, latent: torch.Tensor) -> Lookup:
        """The lookup of root inference in the dictionary of ``row`` under the latent state ``latent``."""
        key = key_of(latent)
        return self._in_roots(row, key) or Lookup(key)

    def lookup_node(self, row: int, latent: torch.Tensor) -> Lookup:
        """The lookup of recurrent inference under the latent state ``latent``: roots first, then nodes."""
        key = key_of(latent)
        index = self.past_kv_cache_recurrent_infer.get(key)
        found = self._in_roots(row, key)
        if found is not None or index is None:
            return found or Lookup(key)
        return _found(key, self._node_slots.get(index), self.shared_pool_recur_infer[index])

    def _in_roots(self, row: int, key: str) -> Lookup | None:
        index = self.past_kv_cache_init_infer_envs[row].get(key) if row < self.env_num else None
        if index is None:
            return None
        return _found(key, self._root_slots.get((row, index)), self.shared_pool_init_infer[row][index])

    def has_root(self, row: int, history: HistoryName) -> bool:
        """Whether the dictionary of ``row`` still leads to the root of ``history``."""
        slots = (self._root_slots.get((row, at)) for at in self.past_kv_cache_init_infer_envs[row].values())
        return any(slot is not None and slot.history == history for slot in slots)

    def newest(self, row: int) -> tuple[Slot, torch.Tensor] | None:
        """What the latest inference stored for ``row``: its slot, and ``[2 * layers, T, embed]``."""
        found = self._newest.get(row)
        return None if found is None else (found[0], contents(found[1]))

    def keep(
        self, row: int, latent: torch.Tensor, kv: torch.Tensor, *, root: bool, exact: bool = True
    ) -> None:
        """Store keys and values ``[2 * layers, T, embed]`` of one row as LightZero stores its own."""
        if self.context_length <= 2:
            return  # LightZero stores nothing then
        entry = self.transformer.generate_empty_keys_values(n=1, max_tokens=self.context_length)
        blocks = kv.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [2 * layers, heads, T, head_dim]
        for layer, caches in enumerate(entry._keys_values):
            for block, cache in enumerate((caches._k_cache, caches._v_cache)):
                assert cache._cache is not None
                cache._cache[0, :, : kv.shape[1]] = blocks[2 * layer + block]
                cache._size = kv.shape[1]
        self._keys, self._row = {row: key_of(latent)}, row
        if root:
            index = self.custom_copy_kv_cache_to_shared_init_envs(entry, row)
            self.past_kv_cache_init_infer_envs[row][self._keys[row]] = index
        else:
            index = self.custom_copy_kv_cache_to_shared_recur(entry)
            self.past_kv_cache_recurrent_infer[self._keys[row]] = index
        self._newest[row][0].exact = exact

    # LightZero's own methods, recorded.

    def update_cache_context(self, latent_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self._keys = {row: key_of(latent) for row, latent in enumerate(latent_state)}
        self._row = 0
        self._newest.clear()
        super().update_cache_context(latent_state, *args, **kwargs)

    def custom_copy_kv_cache_to_shared_init_envs(self, src_kv: Any, env_id: int) -> int:
        index = super().custom_copy_kv_cache_to_shared_init_envs(src_kv, env_id)
        entry = self.shared_pool_init_infer[env_id][index]
        slot = Slot(self._keys[env_id], self.naming[env_id], _digest(entry))
        self._root_slots[env_id, index] = slot
        self._newest[env_id] = slot, entry
        return index

    def custom_copy_kv_cache_to_shared_recur(self, src_kv: Any) -> int:
        index, row = super().custom_copy_kv_cache_to_shared_recur(src_kv), self._row
        entry = self.shared_pool_recur_infer[index]
        slot = Slot(self._keys[row], self.naming[row], _digest(entry))
        self._node_slots[index] = slot
        self._newest[row] = slot, entry
        self._row += 1
        return index

    def trim_and_pad_kv_cache(self, is_init_infer: bool = True) -> list:
        self.served = [contents(entry) for entry in self.keys_values_wm_list]
        return super().trim_and_pad_kv_cache(is_init_infer)

    def clear_caches(self) -> None:
        self.clear_roots()
        self.past_kv_cache_recurrent_infer.clear()
        self.keys_values_wm_list.clear()

    def clear_roots(self) -> None:
        """Empty the dictionaries of the roots, as LightZero does every few hundred steps."""
        for entries in self.past_kv_cache_init_infer_envs:
            entries.clear()


def key_of(latent: torch.Tensor) -> str:
    """The stock key of a latent state ``[1, embed]`` or ``[embed]``."""
    return hash_state(np.ascontiguousarray(latent.detach().cpu().numpy().reshape(-1)))


def _found(key: str, slot: Slot | None, entry: Any) -> Lookup:
    return Lookup(key, True, slot, entry, slot is not None and slot.digest == _digest(entry))


def _digest(entry: Any) -> int:
    return digest_rows(contents(entry)[None])[0]


def contents(entry: Any) -> torch.Tensor:
    """A copy of LightZero's ``KeysValues`` of one row as ``[2 * layers, T, embed]``."""
    size = entry.size
    blocks = [
        cache._cache[0, :, :size].transpose(0, 1).reshape(size, -1)
        for layer in entry
        for cache in (layer._k_cache, layer._v_cache)
    ]
    return torch.stack(blocks)
