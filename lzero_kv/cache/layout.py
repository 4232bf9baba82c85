"""The shape of one cached history: how keys and values of all layers lie in one row of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

CPU = torch.device('cpu')


@dataclass(frozen=True)
class KVLayout:
    """Shape of a row: ``[2 * layers, heads, tokens, head_dim]``.

    Even indices of the first dimension hold the keys of a layer, odd ones its values. Rows are head-major, as
    attention reads them, and right-aligned: the newest token of a history is in the last column, and the
    columns that a short history does not fill are in front.

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is not an integer, or ``dtype`` is not a floating point type.
    """

    layers: int
    """Number of transformer layers."""
    heads: int
    """Number of attention heads of a layer."""
    head_dim: int
    """Numbers of one head of one token."""
    tokens: int
    """Tokens that each layer holds."""
    dtype: torch.dtype = torch.float32
    """Element type of the rows."""
    device: torch.device = CPU
    """Where the rows live. A string is accepted."""

    def __post_init__(self) -> None:
        for name in ('layers', 'heads', 'head_dim', 'tokens'):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(
                f'dtype must be a floating point torch.dtype such as torch.float32, got {self.dtype!r}'
            )
        object.__setattr__(self, 'device', torch.device(self.device))

    @property
    def embed_dim(self) -> int:
        """Numbers of one token in the keys or the values of one layer: ``heads * head_dim``."""
        return self.heads * self.head_dim

    @property
    def row_elements(self) -> int:
        """Numbers in one row: keys and values of all layers."""
        return 2 * self.layers * self.tokens * self.embed_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_elements * self.dtype.itemsize

    def batch_shape(self, rows: int, newest: int | None = None) -> tuple[int, int, int, int, int]:
        """Shape of a batch of histories: ``(rows, 2 * layers, heads, newest or all tokens, head_dim)``.

        Raises:
            ValueError: ``newest`` is out of range.
        """
        if newest is not None and not 0 <= newest <= self.tokens:
            raise ValueError(f'newest must be in [0, {self.tokens}], the tokens a layer holds, got {newest}')
        return rows, 2 * self.layers, self.heads, self.tokens if newest is None else newest, self.head_dim


@dataclass
class KVBatch:
    """Keys and values of a batch of histories, owned by the caller.

    Columns in front of a row's ``lengths`` newest tokens hold finite numbers without meaning: mask them.
    """

    kv: torch.Tensor
    """``[B, 2 * layers, heads, tokens, head_dim]``, right-aligned."""
    lengths: np.ndarray
    """int64 ``[B]``: tokens of each history."""
    next_positions: np.ndarray
    """int64 ``[B]``: logical position that the next token of each history gets."""

    def __len__(self) -> int:
        return self.kv.shape[0]


def positive(name: str, value: object) -> int:
    """``value`` as an int; TypeError where it is no integer, ValueError where it is below 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f'{name} must be an integer, got {value!r} of type {type(value).__name__}')
    if value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    return int(value)
