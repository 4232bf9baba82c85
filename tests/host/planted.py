"""Faults that the manager or a search may have, planted one at a time by patching their own methods.

A plant strikes as soon as there is something to hit: most need histories of some tokens, or parents below the
roots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.cache.keys import NO_SLOT, NodeKey
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.pool import KVCachePool
from lzero_kv.cache.storage import KVStorage
from lzero_kv.lightzero.inference.expand import Search
from lzero_kv.lightzero.inference.positions import LearnedPositions, RotaryPositions
from lzero_kv.lightzero.inference.roots import RootInference
from lzero_kv.lightzero.inference.rows import ResidentRows
from lzero_kv.lightzero.inference.tree import SearchTree
from lzero_kv.telemetry.counters import Fault

Change = Callable[[KVCacheManager, Sequence[Any], np.ndarray], np.ndarray]
"""Slots (int64 ``[B]``) that a lookup of keys gave, to those that it gives with the fault."""


@dataclass(frozen=True)
class Plant:
    """A fault and how it must be recognised.

    Attributes:
        plant: patches the manager or the search.
        fault: what the validation must call it.
        kind: pool in which it must be found first.
        family: whose policy it is planted in.
        layer: the layer that must be named; None where any will do, or none is wrong.
    """

    plant: Callable[[pytest.MonkeyPatch], None]
    fault: Fault
    kind: str
    family: str = 'tiny'
    layer: int | None = None


LOADS = {RootInference: '_load', Search: '_place_windows'}
"""The method of each that brings stored windows beside their rows."""


def within(patch: pytest.MonkeyPatch, owner: type) -> list[Any]:
    """Holds an ``owner`` while it brings windows beside their rows."""
    load, inside = getattr(owner, LOADS[owner]), list[Any]()

    def loading(self: Any, *args: Any) -> Any:
        inside.append(self)
        try:
            return load(self, *args)
        finally:
            inside.pop()

    patch.setattr(owner, LOADS[owner], loading)
    return inside


def looked_up(patch: pytest.MonkeyPatch, owner: type, change: Change) -> None:
    """Apply ``change`` to what the manager finds for ``owner`` (root inference, or a search)."""
    find, inside = KVCachePool.find, within(patch, owner)
    lookup = KVCacheManager.lookup

    def finding(self: KVCachePool, keys: Sequence[Any]) -> list[int]:
        slots = find(self, keys)
        if not inside or owner is not Search:
            return slots
        return change(inside[-1]._manager, keys, np.array(slots)).tolist()

    def looking(self: KVCacheManager, keys: Any) -> np.ndarray:
        keys = list(keys)
        slots = lookup(self, keys)
        return change(self, keys, slots) if inside and owner is RootInference else slots

    patch.setattr(KVCachePool, 'find', finding)
    patch.setattr(KVCacheManager, 'lookup', looking)


def loaded(
    patch: pytest.MonkeyPatch, owner: type, change: Callable[[torch.Tensor], None], tokens: int = 3
) -> None:
    """Apply ``change`` in place to the keys and values ``[2 * layers, heads, tokens, head_dim]`` of the first
    window that ``owner`` loads, where it is at least ``tokens`` long.
    """
    load, inside = ResidentRows.load, within(patch, owner)

    def loading(self: ResidentRows, rows: np.ndarray, slots: np.ndarray, newest: int) -> None:
        load(self, rows, slots, newest)
        length, window = int(self._storage.lengths[slots[0]]), self.geometry.window
        if inside and length >= tokens:
            change(self.buffer[rows[0], ..., window - length : window, :].flatten(0, 1))

    patch.setattr(ResidentRows, 'load', loading)


def another_node(patch: pytest.MonkeyPatch) -> None:
    """A parent's slot is taken for another node of the same row."""

    def change(manager: KVCacheManager, keys: Sequence[Any], slots: np.ndarray) -> np.ndarray:
        for row, key in enumerate(keys):
            if isinstance(key, NodeKey) and key.simulation > 1:
                other = manager.slots([NodeKey(key.row, 1)])[0]
                slots[row] = slots[row] if other == NO_SLOT else other  # a leaf's window may not be there yet
        return slots

    looked_up(patch, Search, change)


def root_for_a_node(patch: pytest.MonkeyPatch) -> None:
    """A parent below the root is taken for the root."""

    def change(manager: KVCacheManager, keys: Sequence[Any], slots: np.ndarray) -> np.ndarray:
        for at, key in enumerate(keys):
            (root,) = manager.init_pools[key.row].keys()
            slots[at] = manager.init_pools[key.row].peek(root)
        return slots

    looked_up(patch, Search, change)


def another_path(patch: pytest.MonkeyPatch) -> None:
    """A row looks at the steps of another of its nodes."""
    right = SearchTree.path

    def path(self: SearchTree, parents: Any) -> np.ndarray:
        steps = right(self, parents).copy()
        steps[0, -1:] = np.where(steps[0, -1:] > 1, steps[0, -1:] - 1, steps[0, -1:])
        return steps

    patch.setattr(SearchTree, 'path', path)


def rows_swapped(owner: type) -> Callable[[pytest.MonkeyPatch], None]:
    """Two rows' slots are swapped."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def change(manager: KVCacheManager, keys: Sequence[Any], slots: np.ndarray) -> np.ndarray:
            found = np.flatnonzero(slots != NO_SLOT)[:2]
            slots[found] = slots[found[::-1]]
            return slots

        looked_up(patch, owner, change)

    return plant


def store_dropped(patch: pytest.MonkeyPatch) -> None:
    """The fourth root of every environment is not written: its slot still holds the third."""
    write, written = KVStorage.write, [0]

    def writing(self: KVStorage, slots: np.ndarray, rows: Any, lengths: Any, next_positions: Any) -> None:
        roots = slots < 4  # three collectors and an evaluator, a root slot each
        written[0] += bool(roots.all())
        if not (roots.all() and written[0] == 4):
            write(self, slots, rows, lengths, next_positions)

    patch.setattr(KVStorage, 'write', writing)


def exchanged(owner: type) -> Callable[[pytest.MonkeyPatch], None]:
    """Keys and values of layer 1 are exchanged."""

    def change(kv: torch.Tensor) -> None:
        kv[2:4] = kv[2:4].flip(0).clone()

    return lambda patch: loaded(patch, owner, change)


def one_token_off(owner: type) -> Callable[[pytest.MonkeyPatch], None]:
    """Every token is served in the column of the one before it."""

    def change(kv: torch.Tensor) -> None:
        kv[:] = kv.roll(1, dims=2)

    return lambda patch: loaded(patch, owner, change)


def one_token_short(patch: pytest.MonkeyPatch) -> None:
    """Histories are taken to be one token shorter than they are."""
    lengths = KVCacheManager.lengths
    patch.setattr(KVCacheManager, 'lengths', lambda self, slots: np.maximum(lengths(self, slots) - 1, 1))


def positions_off(kind: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Every token stands one place behind its own."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        at = kind.at
        patch.setattr(kind, 'at', lambda self, places, logical: at(self, places + 1, logical + 1))

    return plant


def perturbed(owner: type, times: float) -> Callable[[pytest.MonkeyPatch], None]:
    """One number is off by ``times`` the tolerance of float32."""

    def change(kv: torch.Tensor) -> None:
        number = kv[1, 0, -1, 1]
        number += times * 1e-3 * (1 + number.abs())

    return lambda patch: loaded(patch, owner, change)


def entry_lost(owner: type) -> Callable[[pytest.MonkeyPatch], None]:
    """An entry that is stored is not found."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        def change(manager: KVCacheManager, keys: Sequence[Any], slots: np.ndarray) -> np.ndarray:
            slots[0] = NO_SLOT
            return slots

        looked_up(patch, owner, change)

    return plant


PLANTS = {
    'another node': Plant(another_node, Fault.ANOTHER_NODE, 'nodes'),
    'root for a node': Plant(root_for_a_node, Fault.ANOTHER_NODE, 'nodes'),
    'another path': Plant(another_path, Fault.ANOTHER_NODE, 'nodes'),
    'stale entry': Plant(store_dropped, Fault.STALE_ENTRY, 'nodes'),
    'rows swapped at roots': Plant(rows_swapped(RootInference), Fault.OTHER_ENVIRONMENT, 'roots'),
    'rows swapped at nodes': Plant(rows_swapped(Search), Fault.OTHER_ENVIRONMENT, 'nodes'),
    'exchanged at roots': Plant(exchanged(RootInference), Fault.KEYS_AND_VALUES_EXCHANGED, 'roots', layer=1),
    'exchanged at nodes': Plant(exchanged(Search), Fault.KEYS_AND_VALUES_EXCHANGED, 'nodes', layer=1),
    'one token off at roots': Plant(one_token_off(RootInference), Fault.TOKEN_OFFSET, 'roots'),
    'one token off at nodes': Plant(one_token_off(Search), Fault.TOKEN_OFFSET, 'nodes'),
    'one token short': Plant(one_token_short, Fault.TOKEN_OFFSET, 'roots'),
    'learned positions off': Plant(positions_off(LearnedPositions), Fault.POSITION_OFFSET, 'roots'),
    'rotary positions off': Plant(
        positions_off(RotaryPositions), Fault.POSITION_OFFSET, 'nodes', family='cartpole'
    ),
    'perturbed at roots': Plant(perturbed(RootInference, 1.05), Fault.PERTURBED, 'roots', layer=0),
    'perturbed at nodes': Plant(perturbed(Search, 1.05), Fault.PERTURBED, 'nodes', layer=0),
    'lost at roots': Plant(entry_lost(RootInference), Fault.ENTRY_LOST, 'roots'),
    'lost at nodes': Plant(entry_lost(Search), Fault.ENTRY_LOST, 'nodes'),
}
