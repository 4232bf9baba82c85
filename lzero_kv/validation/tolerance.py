"""Distance of two tensors, and whether rounding explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from lzero_kv.config import KVCacheConfig


@dataclass(frozen=True)
class Deviation:
    """Distance of a tensor from another of the same shape.

    Attributes:
        largest: largest absolute difference; infinite where shapes differ or one is not finite.
        mean: mean absolute difference.
        layer: layer of the largest difference where the tensors are keys and values ``[2 * layers, ...]``.
        excess: largest ``|a - b| / (atol + rtol |b|)``: above 1 the tolerance does not explain it.
    """

    largest: float = 0.0
    mean: float = 0.0
    layer: int | None = None
    excess: float = 0.0

    @property
    def within(self) -> bool:
        """Whether the tolerance explains the difference."""
        return self.excess <= 1.0


MISMATCH = Deviation(float('inf'), float('inf'), None, float('inf'))
"""Of tensors that cannot be compared: other shapes, or nothing there."""


@dataclass(frozen=True)
class Tolerance:
    """``|a - b| <= atol + rtol |b|``, as ``torch.allclose`` has it; the default asks for equality."""

    atol: float = 0.0
    rtol: float = 0.0

    @classmethod
    def of(cls, config: KVCacheConfig, dtype: torch.dtype) -> Tolerance:
        """The tolerance of ``config``, else what the dtype needs.

        Rounding moved keys, values and logits of models with random weights by 2e-4 at most in float32
        (tests/host/test_engine.py) and 4e-14 in float64; other histories differ by 0.1 and more.
        """
        default = {torch.float64: 1e-9, torch.float32: 1e-3}.get(dtype, 5e-2)
        atol, rtol = config.validation_atol, config.validation_rtol
        return cls(default if atol is None else atol, default if rtol is None else rtol)

    def deviation(self, a: torch.Tensor | None, b: torch.Tensor | None, *, kv: bool = False) -> Deviation:
        """Distance of ``a`` from ``b``.

        Args:
            a, b: of one shape and dtype; None for what is not there.
            kv: the leading axis is k_0, v_0, k_1, v_1, ...: the layer is reported.
        """
        if a is None or b is None:
            return Deviation() if a is b else MISMATCH
        if a.shape != b.shape:
            return MISMATCH
        if not a.numel():
            return Deviation()
        one, other = (tensor.detach().double().cpu().numpy() for tensor in (a, b))
        with np.errstate(invalid='ignore', divide='ignore'):
            distance = np.abs(one - other)
            allowed = self.atol + self.rtol * np.abs(other)
            excess = np.divide(distance, allowed, out=np.zeros_like(distance), where=distance != 0)
        largest = float(distance.max())
        if not math.isfinite(largest):
            return MISMATCH
        layer = int(distance.argmax()) // distance[0].size // 2 if kv else None
        return Deviation(largest, float(distance.mean()), layer, float(excess.max()))

    def close(self, a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        """Whether the tolerance explains every difference."""
        return self.deviation(a, b).within
