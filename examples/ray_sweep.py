"""A sweep on many machines with Ray Data: each actor holds a model, each document goes to one of them.

    pip install 'ray[data]'
    python examples/ray_sweep.py --workers 2 --out data_lz/ray_sweep

Rows arrive at the driver a document at a time and are written there as by `lzero-kv llm run`: a sweep that
was killed goes on where it stopped, and `lzero-kv llm report` reads it. The machines share no folder.
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

from lzero_kv.cli.llm import report
from lzero_kv.llm.experiment.experiment import documents_of, measured, quiet_transformers
from lzero_kv.llm.experiment.models import SMOLLM2, load, smollm2_folder
from lzero_kv.llm.experiment.plan import Plan, plan_from_file
from lzero_kv.sweep.sweep import Sweep


class Worker:
    """An actor with a model of its own.

    Arguments:
        plan: fields of a Plan.
        device: of torch.
    """

    def __init__(self, plan: Mapping[str, Any], device: str) -> None:
        quiet_transformers()
        self.plan = Plan.read(plan)
        self.model, self.tokenizer = load(self.plan.model, self.plan.dtype, device=device)
        self.documents = documents_of(self.plan, self.tokenizer)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Rows of the documents with these numbers, each document's as one text of JSON, and who did it."""
        methods = self.plan.grid()
        documents = [self.documents[number] for number in batch['number']]
        rows = [list(measured(self.model, self.tokenizer, one, methods)) for one in documents]
        return {'rows': [json.dumps(some) for some in rows], 'process': [os.getpid()] * len(rows)}


def tokenizer_of(plan: Plan) -> Any:
    """The tokenizer alone: the driver needs no model to know the documents."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder() if plan.model == SMOLLM2 else plan.model)


def main(out: Path, grid: Path | None = None, workers: int = 2, gpus: float = 0) -> int:
    """Measure a grid with Ray Data, and report.

    Args:
        out: folder of rows and report.
        grid: a file .toml or .json, as of lzero-kv llm run; a small sweep where it is left out.
        workers: actors.
        gpus: of each actor.
    """
    small = dict(algorithm=['cake', 'hace'], ratios=[0.25], documents=6, length=256)
    given = small if grid is None else plan_from_file(grid)
    plan = Plan.read(given)
    sweep = Sweep(out, plan.header())
    documents = documents_of(plan, tokenizer_of(plan))
    numbers = [number for number, one in enumerate(documents) if sweep.left([one])]
    if numbers:
        ray.init(ignore_reinit_error=True)
        # a block for each document, handed to an actor when it is free
        blocks = ray.data.from_items([{'number': one} for one in numbers], override_num_blocks=len(numbers))
        rows = blocks.map_batches(
            Worker,
            fn_constructor_args=(dict(given), 'cuda' if gpus else 'cpu'),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_gpus=gpus or None,
        )
        processes = set()
        for row in rows.iter_rows():
            sweep.append(json.loads(row['rows']))
            processes.add(row['process'])
        print(f'{len(numbers)} documents measured by {len(processes)} actors')
    return report(out)


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.exit(tyro.cli(main))
