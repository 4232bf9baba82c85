"""Tiny random models with attention that is not flat, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

from lzero_kv.llm.families import cache_argument
from testing.language_models import tiny_model

PROMPT = 41
PADDING = (0, 13, 5)


def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a name of ``WINDOWS``."""
    model = tiny_model(family, seed=7).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.0)
    return model.to(dtype)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of unequal length, padded on the left, and their mask: int64 ``[3, 41]`` each."""
    ids = torch.randint(2, 97, (3, PROMPT), generator=torch.Generator().manual_seed(11))
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return ids * mask, mask


def generate(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any = None, new: int = 21, **others: Any
) -> torch.Tensor:
    """Logits ``[B, new, vocabulary]`` of greedy tokens."""
    given = {} if cache is None else {cache_name(model): cache}
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **given, **others,
    )  # fmt: skip
    return torch.stack(output.logits, dim=1)


def cache_name(model: Any) -> str:
    """The name under which a model takes its cache."""
    return cache_argument(type(model))
