"""How long greedy text behind a budgeted prompt stays that of the full cache: here and in OpenVINO GenAI.

    python -m studies.language_models.greedy_text --out FILE
    python -m studies.language_models.greedy_text --gguf MODEL.gguf --prompts FILE --out OTHER

The first command writes the prompts too; the second one needs `pip install openvino-genai` and nothing of
this project. OpenVINO computes the 4-bit weights of the file as it likes; its keys and values are float32.
Each engine is compared with its own full cache. OpenVINO evicts blocks of 32 tokens, so sizes are tokens, of
1,024.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

Generate = Callable[[Sequence[int]], list[int]]


@dataclass(frozen=True)
class Options:
    """What is measured."""

    out: Path
    """JSON lines: a prompt, and tokens until the text differs, by method."""
    gguf: Path | None = None
    """Measure OpenVINO GenAI with this model."""
    prompts: Path | None = None
    """A file of the first command."""
    documents: int = 24
    new_tokens: int = 64
    sizes: tuple[int, ...] = (256, 128)
    """Tokens that a layer keeps."""


def main(options: Options) -> None:
    """Write the rows and print the means."""
    prompts, engines = _openvino(options) if options.gguf else _ours(options)
    rows = []
    with options.out.open('w', encoding='utf-8') as out:
        for prompt in prompts:
            texts = {name: generate(prompt) for name, generate in engines.items()}
            equal = {name: _common(text, texts['full']) for name, text in texts.items()}
            rows.append(dict(prompt=list(prompt), equal=equal))
            out.write(json.dumps(rows[-1]) + '\n')
            out.flush()
    for name in rows[0]['equal']:
        print(f'{name}: {sum(row["equal"][name] for row in rows) / len(rows):.1f} tokens')


def _common(text: Sequence[int], full: Sequence[int]) -> int:
    """Tokens in front of the first one that differs."""
    return next(
        (at for at, (one, other) in enumerate(zip(text, full, strict=False)) if one != other), len(full)
    )


def _ours(options: Options) -> tuple[list[Sequence[int]], dict[str, Generate]]:
    import torch

    from lzero_kv.llm import BudgetCache
    from lzero_kv.llm.experiment.models import load
    from lzero_kv.llm.experiment.tasks import documents

    model, tokenizer = load('smollm2')

    def generate(prompt: Sequence[int], budget: dict[str, Any] | None) -> list[int]:
        ids = torch.tensor([list(prompt)])
        cache = {} if budget is None else dict(past_key_values=BudgetCache(model.config, budget))
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens, **cache,
        )  # fmt: skip
        return made[0, len(prompt) :].tolist()

    engines: dict[str, Generate] = {'full': lambda prompt: generate(prompt, None)}
    for size in options.sizes:
        for selection in ('hace', 'cake', 'h2o'):
            budget = dict(tokens=size, selection=selection)
            engines[f'{selection} {size}'] = lambda prompt, budget=budget: generate(prompt, budget)
    return [one.prompt for one in documents('continuation', tokenizer, options.documents, 1024)], engines


def _openvino(options: Options) -> tuple[Iterator[Sequence[int]], dict[str, Generate]]:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    def engine(eviction: Any = None) -> Generate:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        if eviction is not None:
            scheduler.use_cache_eviction, scheduler.cache_eviction_config = True, eviction
        exact = dict(KV_CACHE_PRECISION='f32', INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=1)
        pipe = genai.LLMPipeline(str(options.gguf), 'CPU', scheduler_config=scheduler, **exact)
        chosen = genai.GenerationConfig(
            max_new_tokens=options.new_tokens, min_new_tokens=options.new_tokens, do_sample=False
        )
        return lambda prompt: list(pipe.generate(ov.Tensor(np.array([prompt])), chosen).tokens[0])

    engines = {'full': engine()}
    modes = {'SUM': genai.AggregationMode.SUM, 'NORM_SUM': genai.AggregationMode.NORM_SUM}
    for size in options.sizes:
        for name, mode in modes.items():
            eviction = genai.CacheEvictionConfig(32, size // 2, size, mode)
            engines[f'OpenVINO {name} {size}'] = engine(eviction)
    lines = options.prompts.read_text(encoding='utf-8').splitlines()
    return (json.loads(line)['prompt'] for line in lines), engines


if __name__ == '__main__':
    main(tyro.cli(Options))
