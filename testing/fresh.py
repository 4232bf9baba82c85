"""Answers of many roots and nodes, each by one pass of the host's modules over its own tokens.

The second oracle, for exact windows (``'rebuild'``). The first, :mod:`lzero_kv.validation.oracle`, appends
token by token; this one knows no window that grows, only lists of tokens. Histories of one length share a
pass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from lzero_kv.validation.oracle import Oracle, Token

STEP = 2  # tokens of one: action and observation

Logits = dict[str, torch.Tensor]


def in_sight(tokens: Sequence[Token], kept: int) -> Sequence[Token]:
    """The tokens that the last step's two attend to, themselves included: of those before it the oldest steps
    are dropped until ``kept`` remain."""
    before = len(tokens) - STEP
    dropped = max(0, math.ceil((before - kept) / STEP))
    return tokens[STEP * dropped :]


def history_of(oracle: Oracle, observations: Sequence[torch.Tensor], actions: Sequence[Any]) -> list[Token]:
    """Tokens of an episode: observation, action, observation, and so on."""
    latents = oracle.model.tokenizer.encode_to_obs_embeddings(torch.stack(list(observations)))
    tokens = [Token(latents[0].reshape(-1), 0)]
    for step, (action, latent) in enumerate(zip(actions, latents[1:], strict=True)):
        tokens += [Token(oracle.embed_action(action), 2 * step + 1), Token(latent.reshape(-1), 2 * step + 2)]
    return tokens


@torch.no_grad()
def fresh_answers(oracle: Oracle, histories: Sequence[Sequence[Token]]) -> list[Logits]:
    """Logits by name for the end of each history; a single observation has neither reward nor latent."""
    answers: list[Logits] = [{} for _ in histories]
    by_length: dict[int, list[int]] = defaultdict(list)
    seen = [in_sight(tokens, oracle.kept) for tokens in histories]
    for number, tokens in enumerate(seen):
        by_length[len(tokens)].append(number)
    for length, numbers in by_length.items():
        features = _pass(oracle, [seen[number] for number in numbers])
        found = logits_of(oracle, ('policy', 'value'), features[:, -1])
        if length > 1:
            before = logits_of(oracle, ('reward', 'latent'), features[:, -STEP])
            found = [one | other for one, other in zip(found, before, strict=True)]
        for number, logits in zip(numbers, found, strict=True):
            answers[number] = logits
    return answers


def logits_of(oracle: Oracle, names: Sequence[str], features: torch.Tensor) -> list[Logits]:
    """Answers of the heads ``names`` at each of the features ``[N, embed]``."""
    heads = {name: getattr(oracle, name) for name in names}
    if type(oracle) is Oracle:  # whose heads take any number of rows
        rows = {name: head(features) for name, head in heads.items()}
    else:
        rows = {name: [head(row) for row in features] for name, head in heads.items()}
    return [{name: rows[name][number] for name in names} for number in range(len(features))]


def _pass(oracle: Oracle, histories: Sequence[Sequence[Token]]) -> torch.Tensor:
    """Features ``[N, T, embed]`` of histories of one length."""
    model = oracle.model
    x = torch.stack([torch.stack([token.embedding for token in tokens]) for tokens in histories])
    positions = torch.tensor([[token.position for token in tokens] for tokens in histories], device=x.device)
    if not oracle.rotary:
        x = x + model.pos_emb.weight[: x.shape[1]]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    for block in oracle.blocks:
        query, key, value = (part.transpose(1, 2) for part in oracle._projected(block, x))
        if oracle.rotary:
            turned = positions[:, None, :, None]
            query, key = oracle._rotate(query, turned), oracle._rotate(key, turned)
        scores = (query @ key.transpose(-1, -2) / math.sqrt(oracle.head_dim)).masked_fill(future, -math.inf)
        x = oracle._residual(block, x, (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    return model.transformer.ln_f(x)
