"""Seconds that a document takes, from two short measurements of the model."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from lzero_kv.llm.experiment.documents import Document

BLOCK, STEPS = 128, 4
TOGETHER = 16
"""Methods that share a prefill."""
SPEED = 'speed'
"""The task whose documents are timed and not scored."""
TIMED_TOKENS, TIMED_REPEATS = 32, 3


@dataclass(frozen=True)
class Rates:
    """Seconds of a model with a full cache."""

    token: float
    """Of each token of a block."""
    step: float
    """Of a token that is read alone."""

    @classmethod
    @torch.no_grad()
    def measured(cls, model: Any) -> Rates:
        """A block of :data:`BLOCK` tokens and :data:`STEPS` single ones, behind a block that does not count:
        the first one of a process is slower."""
        from transformers.cache_utils import DynamicCache

        ids = torch.ones(1, BLOCK, dtype=torch.int64, device=model.device)
        model(ids, use_cache=False)
        cache = DynamicCache(config=model.config)
        begun = now(model)
        model(ids, past_key_values=cache, use_cache=True)
        read = now(model)
        for _ in range(STEPS):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
        return cls((read - begun) / BLOCK, (now(model) - read) / STEPS)

    def seconds(self, document: Document, methods: int) -> float:
        """About what a document takes with so many methods."""
        prompt = self.token * len(document.prompt)
        if document.task == SPEED:
            return TIMED_REPEATS * methods * (prompt + self.step * TIMED_TOKENS)
        behind = self.token * (document.size - len(document.prompt))
        answer = self.step * document.new_tokens if document.answers else 0
        return math.ceil(methods / TOGETHER) * prompt + methods * (behind + answer)


def now(model: Any) -> float:
    """Seconds of a clock, when the model's device has done its work."""
    if model.device.type == 'cuda':
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
