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


def tiny_llama(tokenizer: Any) -> Any:
    """A tiny Llama with attention on few tokens, so that dropping them shows."""
    from testing.language_models import tiny_model

    end = tokenizer.eos_token_id
    tokens = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=end, pad_token_id=end)
    return tiny_model('llama', seed=11, max_position_embeddings=640, initializer_range=0.3, **tokens)
