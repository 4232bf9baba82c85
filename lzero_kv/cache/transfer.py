"""The host's numbers on their way to where the model computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """``array`` as a tensor on ``device``; on a CPU the two share memory.

    To a GPU it goes through page-locked memory: from any other the copy would wait for all the work asked for
    before it. The array may be changed as soon as this returns.
    """
    tensor = torch.from_numpy(array)
    if device.type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def sender(device: torch.device) -> Callable[[np.ndarray], torch.Tensor]:
    """:func:`to_device` for one device, for what is called many times in a search."""
    return partial(to_device, device=device) if device.type == 'cuda' else torch.from_numpy


def refill(tensor: torch.Tensor, array: np.ndarray) -> None:
    """Write ``array`` into a tensor of its shape and dtype, which keeps its place; as :func:`to_device`."""
    source = torch.from_numpy(array)
    if tensor.device.type != 'cuda':
        tensor.copy_(source)
    else:
        tensor.copy_(source.pin_memory(), non_blocking=True)
