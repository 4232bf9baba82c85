"""Transformer and heads of a world model, made ready for inference on a few rows.

The host's modules stay the only home of the weights. Inference runs plain functions over copies of them: the
three projections of a layer are one matrix product, and on a CPU large single precision matrices are laid out
once in the order in which oneDNN reads them, instead of at every product. With eight rows that order is worth
more than anything else: a product is bound by reading its weights.

The copies are made again when the weights change; see :meth:`InferenceWeights.stale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

from ..host import feed_forward, policy_control
from .precision import (
    ROWS_EXPECTED,
    Precision,
    has_packed_products,
    is_large,
    reduced,
    reduces,
)

Layer = Callable[[torch.Tensor], Any]
"""``[N, in]`` to ``[N, out]``. A partial of an operator where it can be: one call, no frame of Python."""

PACKED_ELEMENTS = 1 << 17
"""Weights from this size on are packed. Below it, measured with AVX-512, a call of oneDNN costs more than its
order saves."""


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
        self._parameters = list(world_model.parameters())
        self._seen = self._fingerprint()
        with torch.no_grad():
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
        """Whether all parameters lie in the memory where they were."""
        return [place for place, _ in self._fingerprint()] == [place for place, _ in self._seen]

    def stale(self) -> bool:
        """Whether a parameter was written to, or replaced, since these weights were taken.

        A write that goes around autograd's version counter (``parameter.data``) is not seen here; code that
        writes like that clears the caches, as the host does after every update.
        """
        return self._fingerprint() != self._seen

    def _fingerprint(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self._parameters]


def layers_of(
    modules: Iterable[nn.Module] | nn.Module, precision: Precision | None = 'float32'
) -> tuple[Layer, ...]:
    """The layers of a sequence of modules: linear layers with the GELU behind them in one call, dropout left
    out (inference is never in training mode), everything else as it is."""
    if isinstance(modules, nn.Module) and not isinstance(modules, nn.Sequential):
        return (modules,)
    rest, layers = [m for m in modules if not isinstance(m, nn.Dropout)], list[Layer]()
    while rest:
        module = rest.pop(0)
        if type(module) is nn.GELU:
            layers.append(partial(F.gelu, approximate=module.approximate))
            continue
        if not is_plain(module):
            layers.append(module)
            continue
        gelu, behind = None, rest[0] if rest else None
        fuses = precision and packs(module.weight) and not reduces(module.weight, precision)
        if fuses and isinstance(behind, nn.GELU):
            gelu = behind.approximate
            rest.pop(0)
        layers.append(affine(module.weight, module.bias, gelu, precision=precision))
    return tuple(layers)


def affine(
    weight: torch.Tensor,
    bias: torch.Tensor,
    gelu: str | None = None,
    *,
    precision: Precision | None = 'float32',
) -> Layer:
    """``x @ weight.T + bias``; where that pays, by a packed copy of the weights in ``precision`` (None: by
    the weights themselves). One in float32 has the GELU behind it, too (``gelu`` 'none' or 'tanh')."""
    weight, bias = weight.detach(), bias.detach()
    if precision and reduces(weight, precision):
        return reduced(weight, bias, precision)
    if not (precision and packs(weight)):
        return partial(F.linear, weight=weight, bias=bias)
    # What torch's own compiler emits for a linear layer with frozen weights; float32 throughout.
    after, kind = ('none', '') if gelu is None else ('gelu', gelu)
    return partial(
        torch.ops.mkldnn._linear_pointwise.default,
        W=torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_EXPECTED),
        B=bias,
        attr=after,
        scalars=[],
        algorithm=kind,
    )


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


def packs(weight: torch.Tensor) -> bool:
    """Whether a packed copy of a weight is quicker than the weight."""
    return is_large(weight, PACKED_ELEMENTS) and has_packed_products()
