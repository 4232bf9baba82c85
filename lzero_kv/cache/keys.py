"""Names of cached histories, and digests of observations and latent states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import xxhash

NO_SLOT = -1
"""What a lookup answers for a key that is not cached."""


class RootKey(NamedTuple):
    """An environment's history up to its latest observation."""

    env_id: int
    """Number of the environment in the env manager."""
    digest: int
    """Digest of the raw observation, see :func:`digest_rows`."""


class NodeKey(NamedTuple):
    """A node of the running search."""

    row: int
    """Row of the search batch."""
    simulation: int
    """Simulation that created the node: 0 for the root, ``i + 1`` for simulation ``i``."""


def digest_rows(batch: torch.Tensor | np.ndarray) -> list[int]:
    """The 64-bit xxHash of each row's bytes, as unsigned integers.

    A row's digest depends on that row's bytes alone, so it is the same in any batch. Element type and row
    shape are not part of it: compare digests of one observation space only. A tensor on an accelerator is
    copied to the host once for the whole batch.

    Arguments:
        batch: ``[B, ...]``, any element type.

    Raises:
        TypeError: ``batch`` is neither a tensor nor an array.
        ValueError: ``batch`` has no batch dimension.
    """
    if isinstance(batch, torch.Tensor):
        rows = batch.detach().cpu().contiguous()
        if rows.ndim:
            # numpy has no bfloat16; bytes are all that is hashed
            rows = rows.reshape(len(rows), rows[:1].numel()).view(torch.uint8)
        array = rows.numpy()
    elif isinstance(batch, np.ndarray):
        array = np.ascontiguousarray(batch) if batch.ndim else batch
    else:
        raise TypeError(f'batch must be a torch.Tensor or numpy.ndarray [B, ...], got {type(batch).__name__}')
    if not array.ndim:
        raise ValueError('batch must be [B, ...], got a single number; add a batch dimension with x[None]')
    return [xxhash.xxh64_intdigest(row.tobytes()) for row in array]
