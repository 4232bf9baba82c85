"""Float64 for host models: it separates real differences from rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype for the block, in which the host allocates its caches and masks.

    In float64 the host's rotation of keys and queries no longer rounds to float32 on the way.
    """
    from lzero.model.unizero_world_models import transformer

    before, rotate = torch.get_default_dtype(), transformer.apply_rotary_emb
    torch.set_default_dtype(dtype)
    if dtype == torch.float64:
        transformer.apply_rotary_emb = _rotate
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        transformer.apply_rotary_emb = rotate


def free_from_float32(model: Any) -> None:
    """Make a model built in float64 compute in float64 throughout.

    Whatever the default dtype, the host fixes three things to float32: the rotation table, the input of the
    memory encoder, and continuous actions.
    """
    world_model = model.world_model
    if world_model.config.rotary_emb:
        table = world_model.transformer.freqs_cis  # [positions, head_dim / 2]
        pairs = torch.arange(table.shape[1], dtype=torch.float64) / table.shape[1]
        angles = torch.outer(
            torch.arange(table.shape[0], dtype=torch.float64), world_model.config.rope_theta**-pairs
        )
        world_model.transformer.freqs_cis = torch.polar(torch.ones_like(angles), angles).to(table.device)
    if world_model.config.obs_type == 'image_memory':
        model.tokenizer.encoder.forward = MethodType(_encode, model.tokenizer.encoder)
    if world_model.continuous_action_space:
        world_model.act_embedding_table.register_forward_pre_hook(_input_in_float64)


def _encode(encoder: Any, image: torch.Tensor) -> torch.Tensor:
    return encoder.sim_norm(encoder.linear(encoder.cnn(image).flatten(1)))


def _input_in_float64(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.double() for tensor in inputs)


def _rotate(q: torch.Tensor, k: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        shape = [size if axis in (0, 2, pairs.ndim - 1) else 1 for axis, size in enumerate(pairs.shape)]
        return torch.view_as_real(pairs * freqs_cis.view(*shape)).flatten(-2)

    return rotate(q), rotate(k)
