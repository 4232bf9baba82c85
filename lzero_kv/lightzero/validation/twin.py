"""The host's own world model over the manager's weights, with caches of its own that know whose entry they
hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from lzero.model.unizero_world_models.utils import hash_state
from lzero.model.unizero_world_models.world_model import WorldModel

from lzero_kv.cache.keys import digest_rows
from lzero_kv.validation.causes import Cause


class HistoryName(NamedTuple):
    """Which history an entry is of."""

    env_id: int
    """Number of the environment at the manager; in reanalysis, the row of the batch."""
    root: int
    """Number of the root inference, counted for all environments together."""
    node: int
    """Simulation that made the node; 0: the root itself."""

    def __str__(self) -> str:
        node = f', node {self.node}' if self.node else ''
        return f'environment {self.env_id}, root {self.root}{node}'


@dataclass
class Owner:
    """Whose entry a slot of the host's rings holds.

    Attributes:
        key: the key it was written under.
        history: the history it was written for.
        digest: digest of what was written.
        causes: proven reasons for which its content is not that of ``history``.
        proven: whether those reasons account for all of the difference.
        exact: whether the manager stored the same numbers.
    """

    key: str
    history: HistoryName
    digest: int
    causes: frozenset[Cause] = field(default_factory=frozenset)
    proven: bool = True
    exact: bool = True


@dataclass(frozen=True)
class Trace:
    """What one lookup of the host's dictionaries meets.

    Attributes:
        key: what was looked for.
        place: ``'roots'`` or ``'nodes'``, None where no dictionary has the key.
        owner: whose entry lies in the slot now.
        entry: the host's ``KeysValues`` in that slot.
        intact: whether it holds what was written for its owner, to the last bit.
    """

    key: str
    place: str | None = None
    owner: Owner | None = None
    entry: Any = None
    intact: bool = True


class HostTwin(WorldModel):
    """A stock ``WorldModel`` that shares the modules of another, and none of its caches.

    The dictionaries, rings and methods are the host's, unchanged. What is added only watches: which history
    each slot was written for, and which keys and values each row was served.

    Attributes:
        naming: names of the histories that the next inference stores, one per row; set by the caller.
        served: keys and values ``[2 * layers, T, embed]`` that each row of the latest inference was handed.
    """

    naming: Sequence[HistoryName]
    served: list[torch.Tensor]
    _root_owners: dict[tuple[int, int], Owner]
    _node_owners: dict[int, Owner]
    _newest: dict[int, tuple[Owner, Any]]
    _keys: dict[int, Any]
    _row: int
    # The host's, which tells nobody what is in them.
    past_kv_cache_init_infer_envs: list[dict[Any, int]]
    past_kv_cache_recurrent_infer: dict[Any, int]

    @classmethod
    def over(cls, world_model: WorldModel) -> HostTwin:
        """A twin of ``world_model``: the same parameters, empty caches."""
        twin = cls.__new__(cls)
        twin.__dict__.update(world_model.__dict__)
        twin.__dict__['_source'] = world_model  # past nn.Module, which would make it a child of itself
        twin._initialize_cache_structures()
        twin._initialize_statistics()
        twin._initialize_transformer_keys_values()
        twin.shared_pool_recur_infer = [None] * twin.shared_pool_size
        twin.shared_pool_init_infer = [[None] * twin.shared_pool_size_init for _ in range(twin.env_num)]
        twin.shared_pool_index_init_envs = [0] * twin.env_num
        twin.shared_pool_wm = [None] * twin.shared_pool_size_wm
        twin.shared_pool_index = twin.shared_pool_index_wm = 0
        twin.latent_state = None
        twin.naming, twin.served = (), []
        twin._root_owners, twin._node_owners, twin._newest, twin._keys = {}, {}, {}, {}
        return twin

    @property
    def pos_emb_diff_k(self) -> Any:  # type: ignore[override]
        """The host's position correction of keys, as old as the host's would be."""
        return self._source.__dict__['pos_emb_diff_k']

    @property
    def pos_emb_diff_v(self) -> Any:  # type: ignore[override]
        """The host's position correction of values."""
        return self._source.__dict__['pos_emb_diff_v']

    def trace_root(self, row: int, latent: torch.Tensor | np.ndarray) -> Trace:
        """What root inference finds in the dictionary of ``row`` under the latent state ``latent``."""
        key = key_of(latent)
        return self._in_roots(row, key) or Trace(key)

    def trace_node(self, row: int, latent: torch.Tensor | np.ndarray) -> Trace:
        """What recurrent inference finds under the latent state ``latent``: roots first, then nodes."""
        key = key_of(latent)
        index = self.past_kv_cache_recurrent_infer.get(key)
        nodes = Trace(key)
        if index is not None:
            nodes = _found(key, 'nodes', self._node_owners.get(index), self.shared_pool_recur_infer[index])
        return self._in_roots(row, key) or nodes

    def _in_roots(self, row: int, key: str) -> Trace | None:
        index = self.past_kv_cache_init_infer_envs[row].get(key) if row < self.env_num else None
        if index is None:
            return None
        entry = self.shared_pool_init_infer[row][index]
        return _found(key, 'roots', self._root_owners.get((row, index)), entry)

    def has_root(self, history: HistoryName) -> list[tuple[int, str]]:
        """Rows and keys under which a dictionary still leads to the root of ``history``."""
        return [
            (row, key)
            for row, entries in enumerate(self.past_kv_cache_init_infer_envs)
            for key, index in entries.items()
            if (owner := self._root_owners.get((row, index))) is not None and owner.history == history
        ]

    def newest(self, row: int) -> tuple[Owner, torch.Tensor] | None:
        """What the latest inference stored for ``row``: its owner, and ``[2 * layers, T, embed]``."""
        found = self._newest.get(row)
        return None if found is None else (found[0], contents(found[1]))

    def keep(
        self, row: int, latent: torch.Tensor, kv: torch.Tensor, *, root: bool, exact: bool = True
    ) -> None:
        """Store keys and values ``[2 * layers, T, embed]`` of one row as the host stores its own."""
        if self.context_length <= 2:
            return  # the host stores nothing then
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

    # What follows watches the host's own methods.

    def update_cache_context(self, latent_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self._keys = {row: key_of(latent) for row, latent in enumerate(latent_state)}
        self._row = 0
        self._newest.clear()
        super().update_cache_context(latent_state, *args, **kwargs)

    def custom_copy_kv_cache_to_shared_init_envs(self, src_kv: Any, env_id: int) -> int:
        index = super().custom_copy_kv_cache_to_shared_init_envs(src_kv, env_id)
        entry = self.shared_pool_init_infer[env_id][index]
        owner = Owner(self._keys[env_id], self.naming[env_id], _digest(entry))
        self._root_owners[env_id, index] = owner
        self._newest[env_id] = owner, entry
        return index

    def custom_copy_kv_cache_to_shared_recur(self, src_kv: Any) -> int:
        index, row = super().custom_copy_kv_cache_to_shared_recur(src_kv), self._row
        entry = self.shared_pool_recur_infer[index]
        owner = Owner(self._keys[row], self.naming[row], _digest(entry))
        self._node_owners[index] = owner
        self._newest[row] = owner, entry
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
        """Empty the dictionaries of the roots, as the host does every few hundred steps."""
        for entries in self.past_kv_cache_init_infer_envs:
            entries.clear()


def key_of(latent: torch.Tensor | np.ndarray) -> str:
    """The host's key of a latent state ``[1, embed]`` or ``[embed]``."""
    array = latent.detach().cpu().numpy() if isinstance(latent, torch.Tensor) else np.asarray(latent)
    return hash_state(np.ascontiguousarray(array.reshape(-1)))


def _found(key: str, place: str, owner: Owner | None, entry: Any) -> Trace:
    return Trace(key, place, owner, entry, owner is not None and owner.digest == _digest(entry))


def _digest(entry: Any) -> int:
    return digest_rows(contents(entry)[None])[0]


def contents(entry: Any) -> torch.Tensor:
    """A copy of the host's ``KeysValues`` of one row as ``[2 * layers, T, embed]``."""
    size = entry.size
    blocks = [
        cache._cache[0, :, :size].transpose(0, 1).reshape(size, -1)
        for layer in entry
        for cache in (layer._k_cache, layer._v_cache)
    ]
    return torch.stack(blocks)
