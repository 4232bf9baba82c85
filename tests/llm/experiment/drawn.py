"""Rows in the form of the real ones, of a made model with 6 layers: three tasks and the speed, 16 methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lzero_kv.llm.experiment.methods import Method
from lzero_kv.sweep.rows import ROWS, Row

LAYERS, BINS, TOKENS = 6, 16, 512
KL = {'cake': 0.02, 'h2o': 0.03, 'hace': 0.0185, 'snapkv': 0.019, 'streaming': 0.05}
"""Of each algorithm at the ratio 0.5."""
FULL_BYTES = TOKENS * LAYERS * 3 * 64 * 2 * 4
METHODS = [
    Method('full'),
    *(
        Method(algorithm, ratio, allocation='attention_based' if algorithm == 'cake' else 'uniform')
        for ratio in (0.5, 0.25, 0.125)
        for algorithm in KL
    ),
]


def write(folder: Path, rows: list[Row]) -> Path:
    """A sweep's folder."""
    versions = {'torch': '2.13.0', 'transformers': '5.24.0'}
    names = [one.name for one in METHODS if any(row['method'] == one.name for row in rows)]
    header = dict(model='made', seed=5, versions=versions, methods=names)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + '\n' for row in ({'sweep': header}, *rows)]
    (folder / ROWS).write_text(''.join(lines), encoding='utf-8')
    return folder


def sweep(documents: int = 8, seed: int = 5) -> list[Row]:
    """Rows of a sweep, a document of each task after the other."""
    random = np.random.default_rng(seed)
    return [
        row
        for index in range(documents)
        for task in ('continuation', 'needle', 'needle_after')
        for row in scored(task, f'{task} {index}', random)
    ]


def scored(task: str, document: str, random: np.random.Generator) -> Iterator[Row]:
    """Rows of one document."""
    perplexity = float(np.exp(random.normal(2.8, 0.1)))
    for method in METHODS:
        ratio = method.ratio or 1.0
        kl = KL.get(method.algorithm, 0.0) * (0.5 / ratio) ** 1.2 * float(random.lognormal(0, 0.3))
        yield {
            **dict(task=task, document=document, **method.fields(), tokens=TOKENS, full_bytes=FULL_BYTES),
            **dict(kl=kl, perplexity=perplexity * float(np.exp(kl / 3)), agreement=1 - kl / 2, chance=0.0),
            'score': float(random.random() < (0.95 if ratio == 1 or task == 'needle' else ratio + 0.2)),
            **_held(method, ratio, random),
        }


def timed(document: str, random: np.random.Generator) -> Iterator[Row]:
    """Rows of one document whose time was measured."""
    for method in METHODS:
        step = 0.04 if method.ratio is None else 0.024 + 0.02 * method.ratio
        first, following = (float(mean * random.normal(1, 0.05)) for mean in (1.1, step))
        yield dict(
            task='speed', document=document, **method.fields(), tokens=TOKENS, new_tokens=32,
            first_token=first, next_token=following,
        )  # fmt: skip


def _held(method: Method, ratio: float, random: np.random.Generator) -> dict[str, Any]:
    uneven = method.allocation == 'attention_based'
    weights = random.uniform(0.5, 2, LAYERS) if uneven else np.ones(LAYERS)
    slots = np.minimum(TOKENS, weights / weights.sum() * ratio * TOKENS * LAYERS).round().astype(int).tolist()
    newest = np.arange(BINS)[::-1]
    kept = []
    for share in np.array(slots) / TOKENS:
        one = np.clip(share * BINS - newest, 0, 1)
        if method.algorithm not in ('full', 'streaming'):
            one = 0.5 * one + 0.5 * np.clip(share * random.uniform(0.5, 1.5, BINS), 0, 1)
        kept.append([round(float(part), 4) for part in one])
    return dict(
        bytes=round(FULL_BYTES * (ratio + (method.ratio is not None) * 0.01)),
        slots=slots,
        peak_tokens=round(sum(slots) + TOKENS * (ratio < 1)),
        peak_bytes=round(FULL_BYTES * min(1.0, ratio + 1 / LAYERS)),
        kept=kept,
        dispersion=random.uniform(1, 6, LAYERS).tolist() if uneven else None,
        shift=random.uniform(0, 0.1, LAYERS).tolist() if uneven else None,
    )
