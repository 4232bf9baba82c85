"""Transformer and heads of a world model, made ready for inference on a few rows.

The host's modules stay the only home of the weights. Inference runs plain functions over copies of them: the
three projections of a layer are one matrix product, and on a CPU single precision matrices are laid out once
in the order in which MKL reads them, instead of at every product. With eight rows that order is worth more
than anything else: a product is bound by reading its weights.

The copies are made again when the weights change; see :meth:`InferenceWeights.stale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

from ..host import feed_forward, policy_control
from .precision import Precision, is_single, reduced, reduces

Layer = Callable[[torch.Tensor], Any]
"""``[N, in]`` to ``[N, out]``. A partial of an operator where it can be: one call, no frame of Python."""

ROWS_PACKED = 256
"""Rows for which MKL lays out weights. Fewer are as fast in that order, with AVX2 and with AVX-512; in the
order for eight rows, 56 take twice as long."""
GELU_WIDTH = 512
"""Features from which on torch's tanh costs more than the operators of a GELU by sigmoid."""
_SLOPE = torch.tensor(2 * math.sqrt(2 / math.pi))
_CUBIC = 0.044715 * 2 * math.sqrt(2 / math.pi)


class BlockWeights:
    """One block of the transformer.

    Attributes:
        norm1, norm2: layer norms, ``[N, embed]`` to ``[N, embed]``.
        qkv: ``[N, embed]`` to ``[N, 3 * embed]``: query, key and value side by side.
        project: the projection behind attention.
        mlp: layers of the feed-forward part, without its residual.
        gates: the two gates of a gated block (GTrXL, Parisotto et al. 2020), None for plain residuals.
    """

    def __init__(self, block: Any, precision: Precision | None) -> None:
        attention = block.attn
        self._projections = [attention.query, attention.key, attention.value]
        self._joined = joined(self._projections)
        self.gates = (block.gate1, block.gate2) if block.gru_gating else None
        self.norm1: Layer = layer_norm(block.ln1)
        self.norm2: Layer = layer_norm(block.ln2)
        self.qkv = (
            one_by_one(self._projections)
            if self._joined is None
            else affine(*self._joined, precision=precision)
        )
        (self.project,) = layers_of([attention.proj], precision)
        self.mlp = layers_of(feed_forward(block), precision)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The block's output for inputs ``x`` and what attention made of them, both ``[N, embed]``."""
        attended = self.project(attended)
        x = x + attended if self.gates is None else self.gates[0](x, attended)
        y = self.norm2(x)
        for part in self.mlp:
            y = part(y)
        return x + y if self.gates is None else self.gates[1](x, y)

    def refresh(self) -> None:
        """Copy the weights of query, key and value again, to where they were."""
        if self._joined is not None:
            joined(self._projections, out=self._joined)


class InferenceWeights:
    """Transformer and heads of a world model as functions, by the weights of this moment.

    Args:
        world_model: the host's ``WorldModel``.
        precision: of the large matrices, which are laid out anew. None: none is, and everything but query,
            key and value reads the host's own tensors.

    Raises:
        ValueError: another precision than float32 for weights that are not in float32 on a CPU.

    Attributes:
        blocks: one for each layer.
        norm: the transformer's last norm.
        reward, latent, policy, value: layers of the heads, ``[N, embed]`` to their logits; the policy of
            continuous actions gives a dict.
        control: what the host does to policy logits; None for nothing.
        heads: number of attention heads.
    """

    def __init__(self, world_model: Any, precision: Precision | None = 'float32') -> None:
        transformer = world_model.transformer
        weight = transformer.ln_f.weight
        reduces_some = precision not in (None, 'float32')
        if reduces_some and (weight.device.type, weight.dtype) != ('cpu', torch.float32):
            raise ValueError(
                f'kv_cache.precision={precision!r}: expected weights in float32 on a CPU, got '
                f'{weight.dtype} on {weight.device}; leave it out'
            )
        self.precision = precision
        self.heads = int(transformer.blocks[0].attn.num_heads)
        self.control = policy_control(world_model)
        self._world_model = world_model
        self._parameters = list(world_model.parameters())
        self._seen = self._fingerprint()
        with torch.inference_mode(False), torch.no_grad():  # a search may be the first to ask for them
            self.blocks = [BlockWeights(block, precision) for block in transformer.blocks]
            self.norm: Layer = layer_norm(transformer.ln_f)
            self.reward, self.latent, self.policy, self.value = (
                layers_of(head.head_module, precision)
                for head in (
                    world_model.head_rewards,
                    world_model.head_observations,
                    world_model.head_policy,
                    world_model.head_value,
                )
            )

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights of this moment without moving a tensor: what was compiled or captured over them
        stays valid.

        Raises:
            RuntimeError: weights are packed, or in other memory than before: make another.
        """
        if self.precision is not None or not self.in_place():
            raise RuntimeError('expected weights that are where they were, got packed or moved ones')
        for block in self.blocks:
            block.refresh()
        self._seen = self._fingerprint()

    def in_place(self) -> bool:
        """Whether all parameters of now lie in the memory where those of these weights were."""
        places = [parameter.data_ptr() for parameter in self._world_model.parameters()]
        return places == [place for place, _ in self._seen]

    def stale(self) -> bool:
        """Whether a parameter was written to, or got other memory, since these weights were taken.

        A write that goes around autograd's version counter (``parameter.data``) is not seen here, nor another
        parameter in the place of one; code that does so clears the caches, as the host does after every
        update.
        """
        return self._fingerprint() != self._seen

    def _fingerprint(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]


def layers_of(
    modules: Iterable[nn.Module] | nn.Module, precision: Precision | None = 'float32'
) -> tuple[Layer, ...]:
    """The layers of a sequence of modules: linear layers and GELUs without their modules' calls, dropout left
    out (inference is never in training mode), everything else as it is."""
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.Sequential):
        return (modules,)
    layers, width = list[Layer](), 0
    for module in modules:
        if type(module) is nn.GELU:
            by_sigmoid = module.approximate == 'tanh' and width >= GELU_WIDTH
            layers.append(_gelu if by_sigmoid else partial(F.gelu, approximate=module.approximate))
        elif is_plain(module):
            width = module.out_features if precision and is_single(module.weight) else 0
            layers.append(affine(module.weight, module.bias, precision=precision))
        elif not isinstance(module, nn.Dropout):
            layers.append(module)
    return tuple(layers)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2), ``[..., features]``:
    ``(1 + tanh(u)) / 2`` is ``sigmoid(2 u)``, which torch computes in half the time."""
    return torch.addcmul(_SLOPE, x, x, value=_CUBIC).mul_(x).sigmoid_().mul_(x)


def affine(weight: torch.Tensor, bias: torch.Tensor, *, precision: Precision | None = 'float32') -> Layer:
    """``x @ weight.T + bias`` for ``x`` ``[N, in]``, by a packed copy of the weights in ``precision`` where
    that pays (None: by the weights themselves)."""
    weight, bias = weight.detach(), bias.detach()
    if precision and reduces(weight, precision):
        return reduced(weight, bias, precision)
    if not (precision and is_single(weight) and has_packed_products()):
        return partial(F.linear, weight=weight, bias=bias)
    return _packed_product(weight, bias)


def _packed_product(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    # What torch's own compiler emits for a linear layer with frozen weights; float32 throughout.
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, ROWS_PACKED)
    product = torch.ops.mkl._mkl_linear.default

    def packed_product(x: torch.Tensor) -> torch.Tensor:
        # torch takes the packed weights where the last argument is the number of rows
        return product(x, packed, weight, bias, x.shape[0])

    return packed_product


@cache
@torch.no_grad()
def has_packed_products() -> bool:
    """Whether this torch multiplies by weights in MKL's order, right for every number of rows.

    Torch itself takes one number of rows alone. MKL names no such limit (oneMKL, cblas_?gemm_pack), and is
    asked here.
    """
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, '_mkl_linear')):
        return False
    weight = torch.arange(96 * 80, dtype=torch.float32).sin().view(96, 80)
    x, bias = torch.arange(300 * 80, dtype=torch.float32).cos().view(300, 80), weight[:, 0].contiguous()
    packed, expected = _packed_product(weight, bias), F.linear(x, weight, bias)
    rows = (1, 2, 7, 8, 27, 56, ROWS_PACKED, len(x))
    return all(torch.allclose(packed(x[:n]), expected[:n], rtol=1e-4, atol=1e-4) for n in rows)


def layer_norm(norm: nn.LayerNorm) -> Layer:
    """A layer norm without its module's call."""
    if type(norm) is not nn.LayerNorm:
        return norm
    return partial(
        torch.layer_norm,
        normalized_shape=list(norm.normalized_shape),
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
    )


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer with a bias and without hooks."""
    return (
        type(module) is nn.Linear
        and module.bias is not None
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def joined(
    modules: Sequence[Any], out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight and bias of linear layers as those of one layer, in ``out`` or new tensors; None where a layer
    is not plain."""
    if not all(map(is_plain, modules)):
        return None
    weights, biases = [m.weight.detach() for m in modules], [m.bias.detach() for m in modules]
    if out is None:
        return torch.cat(weights), torch.cat(biases)
    torch.cat(weights, out=out[0])
    torch.cat(biases, out=out[1])
    return out


def one_by_one(modules: Sequence[nn.Module]) -> Layer:
    """The outputs of several layers side by side."""
    return lambda x: torch.cat([module(x) for module in modules], dim=-1)
