"""A small text, a byte-pair tokenizer trained on it, and a random Llama model that takes its tokens."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

_WHO = ['The fox', 'A grey owl', 'My neighbour', 'The old baker', 'Nobody', 'Her brother', 'A ship']
_DOES = ['sees', 'follows', 'sells', 'forgets', 'paints', 'carries', 'waits for']
_WHAT = ['the river', 'a red lamp', 'seven apples', 'the mayor', 'an empty box', 'his own hat', 'the rain']
_PARTS = (_WHO, _DOES, _WHAT)


def text_of_animals(lines: int, seed: int = 3) -> str:
    """Lines of sentences."""
    chosen = random.Random(seed)
    return ''.join(
        ' '.join([*map(chosen.choice, _PARTS), f'on day {chosen.randrange(900)}.\n']) for _ in range(lines)
    )


@lru_cache
def tiny_tokenizer() -> Any:
    """Byte-level byte-pair encoding of 401 tokens; one token ends a text, none begins it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=401,
        special_tokens=['<end>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text_of_animals(lines=400)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token='<end>')


def tiny_llama(tokenizer: Any, **changes: Any) -> Any:
    """Random weights: 3 layers, 6 query heads and 2 key-value heads of 8."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    shape: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=640,
        # so that the attention is on few tokens and dropping them shows
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
