"""Answers to many prompts under a budget with Ray Data: each actor holds an enabled model.

    pip install 'ray[data]'
    python examples/ray_generate.py --prompts prompts.jsonl --out answers.jsonl

A line of prompts.jsonl is {"prompt": "..."}; a line of answers.jsonl has "answer" and "process" beside it.
"""

from __future__ import annotations

import json
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
        answers = self.tokenizer.batch_decode(behind, skip_special_tokens=True)
        return {**batch, 'answer': answers, 'process': [os.getpid()] * len(answers)}


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
        out: file of the answers, JSON lines, in any order.
        model: a name or a folder.
        selection: which tokens are kept.
        ratio: how many, as a part of all.
        workers: actors.
        gpus: of each actor.
        batch: prompts at a time.
        new_tokens: of an answer.
    """
    given = [json.loads(line) for line in prompts.read_text(encoding='utf-8').splitlines()]
    ray.init(ignore_reinit_error=True)
    # read and written by the driver: on two processors two actors leave none for tasks of Ray's own
    blocks = ray.data.from_items(given, override_num_blocks=-(-len(given) // batch))
    answers = blocks.map_batches(
        Enabled,
        fn_constructor_args=(
            model,
            dict(selection=selection, ratio=ratio),
            'cuda' if gpus else 'cpu',
            new_tokens,
        ),
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_gpus=gpus or None,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open('w', encoding='utf-8') as file:
        file.writelines(json.dumps(answer) + '\n' for answer in answers.iter_rows())
    print(f'{len(given)} answers: {out}')
    return 0


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.exit(tyro.cli(main))
