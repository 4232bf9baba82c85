"""Answers to many prompts under a budget with Ray Data: each actor holds an enabled model.

    pip install 'ray[data]'
    python examples/ray_generate.py --prompts prompts.jsonl --out data_lz/ray_answers

A line of prompts.jsonl is {"prompt": "..."}; the answers are JSON lines with the same fields and "answer".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import tyro

from lzero_kv.llm import enable
from lzero_kv.llm.experiment.models import SMOLLM2, load


class Enabled:
    """An actor with a model whose prompts all run under a budget.

    Arguments:
        model: a name or a folder, see lzero_kv.llm.experiment.models.load.
        budget: fields of a BudgetConfig.
        device: of torch.
        new_tokens: of an answer.
    """

    def __init__(self, model: str, budget: Mapping[str, Any], device: str, new_tokens: int) -> None:
        self.model, self.tokenizer = load(model, device=device)
        self.tokenizer.padding_side = 'left'
        self.new_tokens = new_tokens
        enable(self.model, budget)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with an answer to each prompt; a row is answered as if it were alone."""
        inputs = self.tokenizer(list(batch['prompt']), padding=True, return_tensors='pt').to(
            self.model.device
        )
        tokens = self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False)
        behind = tokens[:, inputs['input_ids'].shape[1] :]
        return {**batch, 'answer': self.tokenizer.batch_decode(behind, skip_special_tokens=True)}


def main(
    prompts: Path,
    out: Path,
    model: str = SMOLLM2,
    selection: str = 'cake',
    ratio: float = 0.25,
    workers: int = 2,
    gpus: float = 0,
    batch: int = 4,
    new_tokens: int = 32,
) -> int:
    """Answer prompts with a pool of actors.

    Args:
        prompts: JSON lines with "prompt".
        out: folder of the answers, JSON lines.
        model: a name or a folder.
        selection: which tokens are kept.
        ratio: how many, as a part of all.
        workers: actors.
        gpus: of each actor.
        batch: prompts at a time.
        new_tokens: of an answer.
    """
    ray.init(ignore_reinit_error=True)
    ray.data.read_json(str(prompts.resolve()), lines=True).map_batches(
        Enabled,
        fn_constructor_args=(
            model, dict(selection=selection, ratio=ratio), 'cuda' if gpus else 'cpu', new_tokens,
        ),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=gpus or None,
    ).write_json(str(out.resolve()))  # fmt: skip
    return 0


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.exit(tyro.cli(main))
