"""What layer budgets cost in quality, on a UniZero world model that has to remember.

    python studies/budget/study.py --model-path CHECKPOINT --out study

Without --model-path the model is trained first (configs/memory_recall_unizero_kv_config.py, in lessons, about
half an hour on one core); its checkpoint is left in --out. Then, for each kind of cue, the full cache plays
episodes of all seeds, and every budget is shown the same observations and actions, with ties broken the same
way; its answers are compared with those of the full cache. After that each budget plays the same episodes
from the doors on by itself, for the return. Ratio 1 is run as a budget, too: its differences are exactly 0.
All of it takes about twenty minutes.

A table per kind of cue; study.json, study.csv, study.md and study.png in --out; one JSON document is the last
line of the output. --quick: the published methods and one hybrid, one seed, few episodes. CPU only.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')
_ROOT = Path(__file__).resolve().parents[2]
# In the place of this folder, whose module names (tables, ...) are those of packages, too.
sys.path[:1] = [str(_ROOT), str(_ROOT / 'benchmarks'), str(_ROOT / 'configs')]

import numpy as np
import torch
import tyro
from rich.console import Console

from studies.budget import methods
from studies.budget.measures import averages, compare, mean_and_spread
from studies.budget.methods import Method
from studies.budget.picture import draw
from studies.budget.plays import CUES, answers, asked_frames, play
from studies.budget.subject import forget_all, load_checkpoint, make_subject, reported_bytes
from studies.budget.tables import Row, detailed, overview, rich_table
from studies.budget.training import train

FULL = Method('full cache', 'full', {})
RATIOS = (1.0, 0.5, 0.25, 0.125)
EPISODES = 16  # for each seed and kind of cue
SEED_STRIDE = 1000  # between the episodes of two seeds
UNROLL_SEED = 0  # of the actions along which the model is unrolled

Outcome = dict[str, float]


class Bench:
    """Episodes of the full cache with one kind of cue, and its answers, which budgets are compared with.

    The episodes of all seeds are one batch, which is several times faster than one after the other.
    """

    def __init__(self, full: Any, cue: str, seeds: Sequence[int], episodes: int) -> None:
        numbers = [SEED_STRIDE * (seed + 1) + number for seed in seeds for number in range(episodes)]
        self._groups = np.split(np.arange(len(numbers)), len(seeds))
        forget_all(full)
        self._recording = play(full, cue, numbers)
        self._expected = answers(full, self._recording, UNROLL_SEED)
        self._decisive = self._recording.decisive[asked_frames(self._recording)]

    def outcomes(self, subject: Any) -> list[Outcome]:
        """Everything that is measured about a subject, for each seed."""
        forget_all(subject)
        recording = self._recording
        answered = answers(subject, recording, UNROLL_SEED)
        sizes = reported_bytes(subject) | {'search_ms': 1000 * float(np.median(answered.seconds))}
        measures = compare(self._expected, answered)
        successes = play(subject, recording.cue, recording.seeds, past=recording).successes
        return [
            averages({name: of[:, rows] for name, of in measures.items()}, self._decisive[:, rows])
            | {'return': float(successes[rows].mean())}
            | sizes
            for rows in self._groups
        ]


def measure(benches: dict[str, Bench], subject: Any, method: Method, ratio: float) -> list[Row]:
    """A row for each kind of cue: means over the seeds, and their spread under 'spread'."""
    rows = []
    for cue, bench in benches.items():
        outcomes = bench.outcomes(subject)
        summary = {name: mean_and_spread([one[name] for one in outcomes]) for name in outcomes[0]}
        about: Row = dict(method=method.name, kind=method.kind, ratio=ratio, cue=cue)
        about |= {'budget': None if method is FULL else method.budget(ratio)}
        about |= {name: method.options.get(name) for name in ('allocation', 'selection')}
        rows.append(
            about
            | {name: mean for name, (mean, _) in summary.items()}
            | {'spread': {name: spread for name, (_, spread) in summary.items()}}
        )
    return rows


def save(rows: Sequence[Row], about: Row, out: Path) -> None:
    """The rows in study.json, study.csv and study.md, and the picture."""
    (out / 'study.json').write_text(json.dumps(about | {'rows': rows}, indent=1))
    flat = [
        {name: value for name, value in row.items() if name not in ('spread', 'budget')}
        | {f'{name} spread': value for name, value in row['spread'].items()}
        for row in rows
    ]
    with (out / 'study.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
    of_cues = {cue: [row for row in rows if row['cue'] == cue] for cue in CUES}
    pages = [f'## {cue}\n\n{overview(of)}\n\n{detailed(of)}\n' for cue, of in of_cues.items()]
    (out / 'study.md').write_text('\n'.join(pages))
    if limited := [row for row in rows if row['ratio'] < 1]:
        draw(limited, out / 'study.png')


def main(
    model_path: Path | None = None,
    out: Path = Path('budget_study'),
    seeds: tuple[int, ...] = (0, 1, 2),
    episodes: int = EPISODES,
    ratios: tuple[float, ...] = RATIOS,
    training_seed: int = 0,
    only: tuple[str, ...] = (),
    quick: bool = False,
    smoke: bool = False,
) -> None:
    """Layer budgets against the full cache.

    Args:
        model_path: a checkpoint of configs/memory_recall_unizero_kv_config.py; trained anew if absent.
        out: folder for the results.
        seeds: of the episodes; the spread is over them.
        episodes: for each seed and kind of cue.
        ratios: slots as a part of all tokens.
        training_seed: where the model is trained.
        only: names of the methods that are compared; all of them if absent.
        quick: few methods, one seed, few episodes: minutes.
        smoke: random weights of the smallest size, as a test of this program; the figures mean nothing.
    """
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if quick:
        seeds, episodes = seeds[:1], min(episodes, 8)
    chosen = methods.quick() if quick else methods.published() + methods.grid() + methods.hybrids()
    chosen = [method for method in chosen if not only or method.name in only]
    if not smoke and model_path is None:
        model_path = train(training_seed, out / 'training')
    weights = None if smoke else load_checkpoint(model_path)
    console, begun = Console(stderr=True, width=270), time.time()
    subject_of = partial(make_subject, weights, len(seeds) * episodes, smoke=smoke)
    full = subject_of(budget=None)
    benches = {cue: Bench(full, cue, seeds, episodes) for cue in CUES}
    rows = measure(benches, full, FULL, 1.0)
    about = dict(model=str(model_path), seeds=seeds, episodes=episodes, cues=CUES)
    for ratio in ratios:
        for method in chosen[:1] if ratio == 1 else chosen:
            rows += measure(benches, subject_of(budget=method.budget(ratio)), method, ratio)
            console.log(f'{time.time() - begun:.0f} s: {method.name} at {ratio:g}')
        save(rows, about, out)
    for cue in CUES:
        console.print(rich_table([row for row in rows if row['cue'] == cue], cue))
    print(json.dumps(about | {'rows': rows}))


if __name__ == '__main__':
    tyro.cli(main)
