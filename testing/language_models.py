"""Tiny random models of the three families of transformers. All dimensions are different numbers."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {
    'llama': {},
    'mistral': dict(sliding_window=None),
    'mistral-sliding': dict(sliding_window=19),
    'qwen2': {},
    'qwen2-mixed': dict(use_sliding_window=True, sliding_window=17, max_window_layers=1),
}
"""What each model says of sliding layers; its name begins with the family."""


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """The model of a name of :data:`WINDOWS`, in evaluation mode: 3 layers, 6 query heads on 2 key-value
    heads of 8. ``changes`` are fields of its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(name.partition('-')[0], **SIZES | WINDOWS[name] | changes)
    return AutoModelForCausalLM.from_config(config).eval()
