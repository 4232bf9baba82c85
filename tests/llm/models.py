"""Tiny random models of the families, and inputs for them. All dimensions are different numbers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lzero_kv.llm.families import cache_argument

SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
MAKERS: dict[str, Any] = {
    'llama': lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    'mistral': lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    'mistral-sliding': lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=19)),
    'qwen2': lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    'qwen2-mixed': lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=17, max_window_layers=1)
    ),
}
PROMPT = 41
PADDING = (0, 13, 5)


def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model with attention that is not flat."""
    torch.manual_seed(7)
    model = MAKERS[family]().eval().requires_grad_(False)
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
