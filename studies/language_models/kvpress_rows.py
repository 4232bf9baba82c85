"""Presses of NVIDIA's kvpress on the documents of a sweep: KL to the full cache, by the sweep's own measure.

kvpress needs transformers below 5.3, so it runs in an environment of its own:

    pip install kvpress==0.5.5 "transformers>=4.57,<5.3"
    python -m studies.language_models.kvpress_rows --out FILE

One forward of the prompt serves all presses: each compresses a copy of the layer's keys and values in a hook,
as its own hook would. The text that follows is read in one block; kvpress drops nothing while it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from kvpress import ExpectedAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress
from transformers import DynamicCache

from lzero_kv.llm.experiment.documents import Document
from lzero_kv.llm.experiment.models import load
from lzero_kv.llm.experiment.scoring import forced
from lzero_kv.llm.experiment.tasks import documents

PRESSES = {
    'SnapKV': SnapKVPress,
    'PyramidKV': PyramidKVPress,
    'StreamingLLM': StreamingLLMPress,
    'ExpectedAttention': ExpectedAttentionPress,
}


@dataclass
class Pressed:
    """One press and what it keeps."""

    name: str
    ratio: float
    press: Any
    cache: Any = field(default_factory=DynamicCache)

    @property
    def tokens(self) -> int:
        """Of all layers together."""
        return sum(layer.keys.shape[2] for layer in self.cache.layers)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    out: Path
    """JSON lines: a row for each document and press."""
    model: str = 'smollm2'
    documents: int = 24
    length: int = 1024
    seed: int = 0
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)


def main(options: Options) -> None:
    """Write the rows."""
    model, tokenizer = load(options.model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as BasePress does
    with options.out.open('w', encoding='utf-8') as out:
        for document in documents('continuation', tokenizer, options.documents, options.length, options.seed):
            for row in measured(model, document, options.ratios):
                out.write(json.dumps(row) + '\n')
            out.flush()


@torch.no_grad()
def measured(model: Any, document: Document, ratios: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Rows of one document."""
    pressed = [
        Pressed(name, ratio, make(compression_ratio=1 - ratio))
        for name, make in PRESSES.items()
        for ratio in ratios
    ]
    full, first = _prefilled(model, document, pressed)
    control = torch.cat([first[None], _read(model, full, document)])
    for one in pressed:
        kept = one.tokens / (len(full.layers) * len(document.prompt))
        logits = torch.cat([first[None], _read(model, one.cache, document)])
        yield dict(
            document=document.id,
            method=one.name,
            ratio=one.ratio,
            kept=kept,
            **forced(document, logits, control),
        )


def _prefilled(model: Any, document: Document, pressed: list[Pressed]) -> tuple[Any, torch.Tensor]:
    """The full cache and the logits of the prompt's last token; fills the caches of all presses."""
    full = DynamicCache()

    def compress(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = full.layers[module.layer_idx]
        for one in pressed:
            kept = one.press.compress(
                module, kwargs['hidden_states'], layer.keys, layer.values, output[1], kwargs
            )
            one.cache.update(*kept, module.layer_idx)

    with ExitStack() as hooks:
        for layer in model.model.layers:
            handle = layer.self_attn.register_forward_hook(compress, with_kwargs=True)
            hooks.callback(handle.remove)
        ids = torch.tensor([document.prompt])
        return full, model(ids, past_key_values=full, use_cache=True, logits_to_keep=1).logits[0, -1]


def _read(model: Any, cache: Any, document: Document) -> torch.Tensor:
    """Logits behind each token of the target but the last one, with a mask for each layer's own length."""
    ids = torch.tensor([document.target[:-1]])
    new = ids.shape[1]
    positions = torch.arange(len(document.prompt), len(document.prompt) + new)
    causal = torch.ones(new, new, dtype=torch.bool).tril()
    masks = [
        torch.cat([torch.ones(new, layer.keys.shape[2], dtype=torch.bool), causal], dim=1)[None, None]
        for layer in cache.layers
    ]

    def own_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, 'attention_mask': masks[module.layer_idx]}

    with ExitStack() as hooks:
        for layer in model.model.layers:
            handle = layer.self_attn.register_forward_pre_hook(own_mask, with_kwargs=True)
            hooks.callback(handle.remove)
        return model(
            ids,
            past_key_values=cache,
            attention_mask=masks[0],
            position_ids=positions[None],
            cache_position=positions,
            use_cache=True,
        ).logits[0]


if __name__ == '__main__':
    main(tyro.cli(Options))
