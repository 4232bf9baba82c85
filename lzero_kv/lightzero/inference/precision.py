"""Matrix products with weights of fewer bits, for inference on a CPU.

With few rows a product is bound by reading its weights, so fewer bytes are less time. The operators are those
that torch brings for x86 processors: FBGEMM's, and oneDNN's for bfloat16.
"""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F

from lzero_kv.config import Precision

REDUCED: tuple[Precision, ...] = ('float16', 'bfloat16', 'int8')
ELEMENTS = 1 << 19
"""Weights from this size on are reduced. Below it MKL's products in float32 are as fast, measured with
AVX-512 and AMX; and the last layers of the heads keep float32."""

ROWS_EXPECTED = 8
"""Rows for which oneDNN lays out weights."""


def lacking(precision: Precision, embed_dim: int) -> str | None:
    """What keeps a transformer of this width, torch or the processor from a reduced precision; None where
    nothing does."""
    largest = 4 * embed_dim**2  # in the feed-forward part
    if largest < ELEMENTS:
        return (
            f'it pays from {ELEMENTS:,} weights in a matrix on, the largest here has {largest:,} '
            f'(4 x embed_dim x embed_dim)'
        )
    if precision == 'bfloat16':
        capabilities = getattr(torch.cpu, 'get_capabilities', dict)()
        if not (capabilities.get('amx_bf16') and _has_onednn()):
            return "this processor has no AMX, without which it is no faster than 'float16', and less exact"
    else:
        there = hasattr(torch, 'quantize_per_channel') and hasattr(torch.backends, 'quantized')
        if not (there and 'fbgemm' in torch.backends.quantized.supported_engines):
            return 'torch has no FBGEMM for this processor'
    return None


def _has_onednn() -> bool:
    """Whether this torch multiplies by weights that lie in oneDNN's order."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
        and hasattr(torch.ops.mkldnn, '_reorder_linear_weight')
    )


def is_single(weight: torch.Tensor) -> bool:
    """Whether a weight is in float32 on a CPU."""
    return weight.device.type == 'cpu' and weight.dtype == torch.float32


def reduces(weight: torch.Tensor, precision: Precision) -> bool:
    """Whether a product with ``weight`` (``[out, in]``) is quicker in that precision."""
    return precision != 'float32' and is_single(weight) and weight.numel() >= ELEMENTS


def reduced(weight: torch.Tensor, bias: torch.Tensor, precision: Precision) -> Any:
    """``x @ weight.T + bias`` for ``x`` ``[..., in]`` in float32, from a copy of the weights of fewer bits.

    'float16' rounds the weights; products and sums are in float32. 'bfloat16' rounds weights, inputs and the
    product in front of its bias; sums are in float32. 'int8' rounds the weights of each output to 255 levels
    and the inputs of each row to as many or, without VNNI, to 127, by the row's own largest: who else is in
    the batch changes nothing.
    Weights that are not finite, or too large for float16, stay as they are.
    """
    if not weight.abs().max() <= torch.finfo(torch.float16).max:
        return partial(F.linear, weight=weight, bias=bias)
    if precision == 'float16':
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        return partial(torch.ops.quantized.linear_dynamic_fp16.default, W_prepack=packed)
    if precision == 'bfloat16':
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), ROWS_EXPECTED)
        return partial(_bfloat16, packed=packed, bias=bias)
    return partial(_int8, packed=_packed_int8(weight), bias=bias, levels=input_levels())


def _bfloat16(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    product = torch.ops.mkldnn._linear_pointwise.default(x.bfloat16(), packed, None, 'none', [], '')
    return torch.add(bias, product)


@cache
def input_levels() -> int:
    """Steps of an input of int8 on either side of zero: 127, or 63 where the processor lacks VNNI and two
    products of eight bits overflow the sixteen bits in which it adds them up."""
    ones = torch.ones(1, 64)
    product = _int8(ones, _packed_int8(ones), torch.zeros(1), levels=127)
    return 127 if product.item() == ones.numel() else 63


def _packed_int8(weight: torch.Tensor) -> Any:
    scales = weight.abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        # torch 2.13 announces the removal of quantized tensors (pytorch issue 184982). What takes their
        # place, oneDNN's qlinear, is no faster than float16 at eight rows with AVX2: 1.5 instead of 0.8 ms
        # for 768 x 2304.
        warnings.simplefilter('ignore', UserWarning)
        levels = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(levels, None)


def _int8(x: torch.Tensor, packed: Any, bias: torch.Tensor, levels: int) -> torch.Tensor:
    largest = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default(
        x / largest, 1 / levels, levels + 1, packed
    )
    return torch.addcmul(bias, product, largest)
