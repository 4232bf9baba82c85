"""One sweep of a plan: documents, model, rows."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lzero_kv.llm.experiment.documents import Document
from lzero_kv.llm.experiment.methods import Method
from lzero_kv.llm.experiment.models import load
from lzero_kv.llm.experiment.plan import RECORDS, Plan
from lzero_kv.llm.experiment.records import read_records
from lzero_kv.llm.experiment.scoring import SPEED, score, timing
from lzero_kv.llm.experiment.tasks import TEXTS, documents
from lzero_kv.sweep.rows import Row
from lzero_kv.sweep.sweep import Sweep, Watch


def run_sweep(
    plan: Plan,
    folder: Path,
    *,
    device: str = 'cpu',
    begun: Callable[[int, int, int], None] = lambda documents, methods, done: None,
    watch: Watch = lambda progress: None,
) -> list[Row]:
    """Measure what a plan asks for and has no rows yet, beside other processes that do the same.

    Arguments:
        plan: what is measured.
        folder: of the rows.
        device: of torch.
        begun: is told, once, when the model is loaded, the numbers of documents, of methods, and of documents
            whose rows are there already.
        watch: is told before and after each document.

    Returns:
        All rows.

    Raises:
        ValueError: the folder holds another sweep; the model is not loaded then.
        ImportError, OSError, ValueError: the model or a text cannot be loaded, or a document cannot be made.
    """
    # seconds of two devices have no mean
    where = {'device': _device_name(device)} if plan.speed else {}
    sweep, methods = Sweep(folder, plan.header() | where), plan.grid()
    quiet_transformers()
    model, tokenizer = load(plan.model, plan.dtype, device=device)
    asked = documents_of(plan, tokenizer)
    begun(len(asked), len(methods), len(asked) - len(sweep.left(asked)))
    return sweep.run(asked, lambda document: measured(model, tokenizer, document, methods), watch)


def _device_name(device: str) -> str:
    """What seconds depend on: the name of a GPU, else that of torch."""
    return torch.cuda.get_device_name(device) if device.startswith('cuda') else device


def measured(model: Any, tokenizer: Any, document: Document, methods: Sequence[Method]) -> Iterator[Row]:
    """The rows of one document, one for each method: scores, or seconds where its task is :data:`SPEED`."""
    if document.task != SPEED:
        yield from score(model, tokenizer, document, methods)
        return
    for method in methods:
        yield timing(model, document, method)


def documents_of(plan: Plan, tokenizer: Any) -> list[Document]:
    """The documents of a plan, one of each task after the other, so that half a sweep is half of each task.

    Raises:
        ImportError, OSError, ValueError: a text is missing, too short, or a record is wrong.
    """
    texts, records = plan.texts, [name for name in plan.data if name.endswith(RECORDS)]
    groups = [
        documents(task, tokenizer, plan.documents, plan.length, plan.seed, text)
        for task in plan.asked
        for text in (texts if texts and task in TEXTS else [None])
    ]
    groups += [_first(read_records(name, tokenizer, plan.length), plan.documents) for name in records]
    timed = [dataclasses.replace(one, task=SPEED) for one in groups[0][: plan.speed]]
    rounds = itertools.zip_longest(*groups)
    return [*(one for some in rounds for one in some if one is not None), *timed]


def _first(found: Iterable[Document], count: int) -> list[Document]:
    """The first documents of each task."""
    some: dict[str, list[Document]] = {}
    for document in found:
        some.setdefault(document.task, []).append(document)
    return [document for group in some.values() for document in group[:count]]


def quiet_transformers() -> None:
    """No bar of transformers while a model is loaded, and no word about an argument that it renamed."""
    # 5.24 renames it to `cache`, which older versions do not know
    warnings.filterwarnings('ignore', '`past_key_values` is deprecated', FutureWarning)
    with contextlib.suppress(ImportError):  # told where the model is loaded
        from transformers.utils import logging

        logging.disable_progress_bar()
