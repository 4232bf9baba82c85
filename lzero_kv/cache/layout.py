"""The shape of one cached history: how keys and values of all layers lie in one row of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

CPU = torch.device('cpu')


@dataclass(frozen=True)
class KVLayout:
    """Where the keys and values of one history lie in a row.

    A row is ``[k_0 | v_0 | k_1 | v_1 | ...]``. The block of layer ``l`` is ``[tokens_l, heads * head_dim]``,
    token by token, and right-aligned: the newest token of a history is in the last column of every block, and
    the columns that a short history does not fill are in front. When all layers hold the same number of
    tokens the layout is uniform and a batch of rows is also a tensor ``[B, 2 * layers, tokens, embed_dim]``
    (even index: keys, odd index: values).

    Raises:
        ValueError: a size is not positive, or ``tokens`` does not name one number for each layer.
        TypeError: a size is not an integer, or ``dtype`` is not a floating point type.
    """

    layers: int
    """Number of transformer layers."""
    heads: int
    """Number of attention heads of a layer."""
    head_dim: int
    """Numbers of one head of one token."""
    tokens: int | tuple[int, ...]
    """Tokens a layer holds: one number for all layers or one for each. Always a tuple after construction."""
    dtype: torch.dtype = torch.float32
    """Element type of the rows."""
    device: torch.device = CPU
    """Where the rows live. A string is accepted."""

    def __post_init__(self) -> None:
        for name in ('layers', 'heads', 'head_dim'):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        if isinstance(self.tokens, (tuple, list)):
            tokens = tuple(_positive(f'tokens[{layer}]', count) for layer, count in enumerate(self.tokens))
        else:
            tokens = (_positive('tokens', self.tokens),) * self.layers
        if len(tokens) != self.layers:
            raise ValueError(
                f'tokens must be one integer or one for each of the {self.layers} layers, got {tokens}'
            )
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(
                f'dtype must be a floating point torch.dtype such as torch.float32, got {self.dtype!r}'
            )
        object.__setattr__(self, 'tokens', tokens)
        object.__setattr__(self, 'device', torch.device(self.device))

    @cached_property
    def layer_tokens(self) -> tuple[int, ...]:
        """Tokens of each layer, ``layers`` numbers."""
        tokens = self.tokens
        return tokens if isinstance(tokens, tuple) else (tokens,) * self.layers

    @cached_property
    def max_tokens(self) -> int:
        """Tokens of the layer that holds most."""
        return max(self.layer_tokens)

    @cached_property
    def embed_dim(self) -> int:
        """Numbers of one token in one block: ``heads * head_dim``."""
        return self.heads * self.head_dim

    @cached_property
    def uniform(self) -> bool:
        """Whether all layers hold the same number of tokens."""
        return len(set(self.layer_tokens)) == 1

    @cached_property
    def row_elements(self) -> int:
        """Numbers in one row: keys and values of all layers."""
        return 2 * self.embed_dim * sum(self.layer_tokens)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_elements * self.dtype.itemsize

    def batch_shape(self, rows: int, newest: int | None = None) -> tuple[int, ...]:
        """Shape of a batch of histories: ``(rows, 2 * layers, newest, embed_dim)``, or
        ``(rows, row_elements)`` when the layout is not uniform.

        Raises:
            ValueError: ``newest`` is out of range, or given for a layout that is not uniform.
        """
        if not self.uniform:
            if newest is not None:
                raise ValueError(
                    f'newest={newest} needs the same number of tokens in every layer, '
                    f'got tokens={self.tokens}; leave newest out to move whole rows'
                )
            return rows, self.row_elements
        tokens = self.layer_tokens[0]
        if newest is not None and not 0 <= newest <= tokens:
            raise ValueError(f'newest must be in [0, {tokens}], the tokens a layer holds, got {newest}')
        return rows, 2 * self.layers, tokens if newest is None else newest, self.embed_dim

    def keys(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        """Keys of one layer: a view ``[B, tokens_l, heads, head_dim]`` of ``rows``.

        Arguments:
            rows: ``[B, row_elements]``, or for a uniform layout also ``[B, 2 * layers, n, embed_dim]``.
            layer: number of the layer, from 0.
        """
        return self._block(rows, layer, 0)

    def values(self, rows: torch.Tensor, layer: int) -> torch.Tensor:
        """Values of one layer: a view ``[B, tokens_l, heads, head_dim]``; arguments as :meth:`keys`."""
        return self._block(rows, layer, 1)

    def _block(self, rows: torch.Tensor, layer: int, which: int) -> torch.Tensor:
        if not 0 <= layer < self.layers:
            raise ValueError(f'layer must be in [0, {self.layers}), got {layer}')
        if (
            rows.ndim == 4
            and self.uniform
            and rows.shape[1] == 2 * self.layers
            and rows.shape[3] == self.embed_dim
        ):
            return rows[:, 2 * layer + which].unflatten(-1, (self.heads, self.head_dim))
        if rows.ndim != 2 or rows.shape[1] != self.row_elements:
            raise ValueError(f'rows must be [B, {self.row_elements}] for {self}, got {list(rows.shape)}')
        tokens = self.layer_tokens[layer]
        start = self.embed_dim * (2 * sum(self.layer_tokens[:layer]) + which * tokens)
        block = rows[:, start : start + tokens * self.embed_dim]
        return block.unflatten(-1, (tokens, self.heads, self.head_dim))


@dataclass
class KVBatch:
    """Keys and values of a batch of histories; the caller owns it, nothing else writes to it.

    Columns in front of a row's ``lengths`` newest tokens hold finite numbers without meaning: mask them.
    """

    kv: torch.Tensor
    """``[B, 2 * layers, tokens, embed_dim]`` or, not uniform, ``[B, row_elements]``; right-aligned."""
    lengths: np.ndarray
    """int64 ``[B]``: tokens of each history."""
    next_positions: np.ndarray
    """int64 ``[B]``: logical position that the next token of each history gets."""

    def __len__(self) -> int:
        return self.kv.shape[0]


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f'{name} must be an integer, got {value!r} of type {type(value).__name__}')
    if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    return int(value)
