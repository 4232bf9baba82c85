"""One history as the host's ``KeysValues`` object looks, and the way between that and a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lzero_kv.cache.layout import KVLayout


class TokenCache:
    """Keys or values of one layer of one history."""

    def __init__(self, cache: torch.Tensor, size: int) -> None:
        self._cache = cache
        """``[1, heads, capacity, head_dim]``, left-aligned, zeros behind the last token."""
        self._size = size
        """Tokens in it."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(1, heads, size, head_dim)``, as the host counts it."""
        rows, heads, _, head_dim = self._cache.shape
        return rows, heads, self._size, head_dim

    def get(self) -> torch.Tensor:
        """The tokens in it: ``[1, heads, size, head_dim]``."""
        return self._cache[:, :, : self._size]


class LayerKV:
    """Keys and values of one layer of one history."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, size: int) -> None:
        self._k_cache = TokenCache(keys, size)
        self._v_cache = TokenCache(values, size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(1, heads, size, head_dim)`` of the keys."""
        return self._k_cache.shape

    def get(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each ``[1, heads, size, head_dim]``."""
        return self._k_cache.get(), self._v_cache.get()


class KVEntry:
    """A private copy of one history that can stand where the host expects a ``KeysValues`` of one sample.

    ``entry[layer]._k_cache._cache`` and ``._v_cache._cache`` are ``[1, heads, capacity, head_dim]``,
    left-aligned and zero-padded; ``len(entry)`` is the number of layers. Changing it changes no pool.
    """

    def __init__(self, layers: Sequence[LayerKV], next_position: int) -> None:
        self._keys_values = tuple(layers)
        self.next_position = next_position
        """Logical position that the next token gets."""

    @property
    def size(self) -> int:
        """Tokens of the history."""
        return self._keys_values[0]._k_cache._size

    def __len__(self) -> int:
        return len(self._keys_values)

    def __getitem__(self, layer: int) -> LayerKV:
        return self._keys_values[layer]

    def clone(self) -> KVEntry:
        """A copy with tensors of its own."""
        pairs = [(layer._k_cache, layer._v_cache) for layer in self._keys_values]
        layers = [LayerKV(keys._cache.clone(), values._cache.clone(), keys._size) for keys, values in pairs]
        return KVEntry(layers, self.next_position)

    @classmethod
    def from_row(cls, layout: KVLayout, row: torch.Tensor, size: int, next_position: int) -> KVEntry:
        """Copy a history out of a row.

        Arguments:
            row: ``[1, 2 * layers, heads, n, head_dim]`` with ``n >= size``.
            size: tokens of the history.
        """
        padded = torch.zeros(
            (2 * layout.layers, 1, layout.heads, layout.tokens, layout.head_dim),
            dtype=row.dtype,
            device=row.device,
        )
        with torch.no_grad():
            padded[:, 0, :, :size] = row[0, :, :, row.shape[3] - size :]
        layers = [LayerKV(keys, values, size) for keys, values in zip(padded[::2], padded[1::2], strict=True)]
        return cls(layers, next_position)


def layout_of(keys_values: Any) -> KVLayout:
    """The layout whose capacity, dtype and device are those of a ``KeysValues``-like object of one sample.

    Raises:
        TypeError: the object does not look like one.
    """
    caches = _caches(keys_values)
    first = caches[0]._cache
    return KVLayout(
        layers=len(caches) // 2,
        heads=first.shape[1],
        head_dim=first.shape[3],
        tokens=first.shape[2],
        dtype=first.dtype,
        device=first.device,
    )


def row_from_keys_values(keys_values: Any, layout: KVLayout) -> tuple[torch.Tensor, int, int]:
    """The row of a ``KeysValues``-like object of one sample.

    Returns:
        The row (``[1, 2 * layers, heads, size, head_dim]``), the tokens of the history, and its next logical
        position (its size where the object does not say).

    Raises:
        TypeError: the object does not look like a ``KeysValues``, or has another dtype than the layout.
        ValueError: layers, heads or head_dim differ from the layout, there are more tokens than a slot holds,
            the layers disagree about the size, or a number is not finite.
    """
    caches = _caches(keys_values)
    if len(caches) != 2 * layout.layers:
        raise ValueError(f'expected the keys and values of {layout.layers} layers, got {len(caches) // 2}')
    size = int(keys_values.size)
    for block, cache in enumerate(caches):
        _check_cache(cache, block, layout, size)
    with torch.no_grad():
        row = torch.cat([cache._cache[:, :, :size] for cache in caches])[None]
    check_finite(row)
    return row, size, int(getattr(keys_values, 'next_position', size))


def check_finite(kv: torch.Tensor) -> None:
    """ValueError where a number is not finite. On a GPU the program waits for the answer."""
    if not bool(torch.isfinite(kv).all()):
        raise ValueError("expected finite keys and values, got NaN or infinity; check the model's outputs")


_ONE_OF_A_BATCH = (
    '; a history is one sample: copy one of a batch with one = copy.deepcopy(batch) and '
    'one.prune(numpy.arange({rows}) == sample), or write all at once with '
    'KVCacheManager.store(keys, kv, lengths, next_positions)'
)


def _caches(keys_values: Any) -> list[Any]:
    """Key cache and value cache of each layer, alternating."""
    try:
        layers = [keys_values[layer] for layer in range(len(keys_values))]
        caches = [cache for layer in layers for cache in (layer._k_cache, layer._v_cache)]
        looks_right = bool(caches) and all(cache._cache.ndim == 4 and cache._size >= 0 for cache in caches)
        looks_right = looks_right and keys_values.size >= 0
    except (AttributeError, TypeError, KeyError, IndexError):
        looks_right, caches = False, []
    if not looks_right:
        raise TypeError(
            f'expected a KeysValues-like object (len, .size, [layer]._k_cache._size, '
            f'[layer]._k_cache._cache [1, heads, tokens, head_dim], [layer]._v_cache), '
            f'got {type(keys_values).__name__}'
        )
    return caches


def _check_cache(cache: Any, block: int, layout: KVLayout, size: int) -> None:
    tensor, where = cache._cache, f'layer {block // 2} {"values" if block % 2 else "keys"}'
    rows, heads, capacity, head_dim = tensor.shape
    if (rows, heads, head_dim) != (1, layout.heads, layout.head_dim):
        raise ValueError(
            f'{where}: expected [1, {layout.heads}, tokens, {layout.head_dim}], got {list(tensor.shape)}'
            + (_ONE_OF_A_BATCH.format(rows=rows) if rows != 1 else '')
        )
    if tensor.dtype != layout.dtype:
        raise TypeError(
            f'{where}: expected {layout.dtype}, got {tensor.dtype}; convert it with .to({layout.dtype})'
        )
    if tensor.device.type != layout.device.type:
        raise ValueError(f'{where}: expected a tensor on {layout.device}, got {tensor.device}')
    if cache._size != size or size > capacity:
        raise ValueError(
            f'{where}: expected {size} tokens of at most {capacity}, got a size of {cache._size}'
        )
    if size > layout.tokens:
        raise ValueError(
            f'{where}: {size} tokens do not fit into a slot of {layout.tokens}; '
            f"drop the oldest steps first, or make the layout's tokens larger"
        )
