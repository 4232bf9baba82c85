"""Time, operators and memory of planning with each cache, against LightZero's own and the model alone.

    python benchmarks/benchmark_kv_cache.py --shapes atari cartpole --steps 12

One environment step of eight environments: root inference and a search. All contestants have the same
weights (checked: they predict the same values), see the same observations and search with the same
tie-break, and take turns. Windows are full before anything is timed (the memory shape: ``--history`` steps
long). Times are medians, with quartiles in the JSON document; ratios are medians of those of each round. With
one thread (the default) they are processor time, else wall-clock time.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Literal

os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'configs'), str(ROOT / 'benchmarks')]

import torch
import tyro
from measuring.contestants import SHAPES, USUAL, Shape, caches_on, silence_host
from measuring.players import Numbers
from measuring.reanalysis import SHAPES as REANALYSED
from measuring.rounds import measure_collection, measure_reanalysis, measure_shape
from measuring.tables import collection_table, reanalysis_table, shapes_table
from measuring.upstream import Checkout, require_checkout
from rich.console import Console

Task = Literal['cartpole', 'pong']


def main(
    shapes: tuple[Shape, ...] = USUAL,
    steps: int = 7,
    history: int = 54,
    threads: tuple[int, ...] = (1,),
    upstream: Path | None = None,
    upstream_python: Path | None = None,
    segments: int = 64,
    reanalysis_simulations: int = 3,
    reanalysis: bool = True,
    collect: tuple[Task, ...] = ('cartpole',),
    calls: int = 4,
    device: Literal['cpu', 'cuda'] = 'cpu',
    compiled: bool = True,
    out: Path = Path('data_lz/bench.json'),
) -> None:
    """Measure, print tables, and write a JSON document.

    Args:
        shapes: shapes of LightZero's configs.
        steps: environment steps that are timed, for each contestant and number of threads.
        history: steps of the episodes before the memory shape is timed; with as many as by default its window
            is not full at the end.
        threads: numbers of threads that torch computes with; counts and shares are those of the first.
        upstream: a built checkout of LightZero's development branch, which then joins: its own cache manager
            off and on, and this one.
        upstream_python: the Python that it was installed into; by default the one that runs this.
        segments: game segments of a reanalysed batch, of eleven roots each.
        reanalysis_simulations: simulations of a reanalysed root; few, because stock takes them one by one.
        reanalysis: whether to measure it.
        collect: real environments in which collection is timed.
        calls: calls of the collector for each cache, of 160 environment steps.
        device: where planning computes; on a GPU times are between CUDA events, and kernels, launches and
            copies are counted. Collection and reanalysis stay on the CPU.
        compiled: whether compiled steps play, too; compiling eight layers takes minutes.
        out: the document; shapes and tasks that were not measured now stay in an existing one.
    """
    checkout = upstream and Checkout(upstream, upstream_python or Path(sys.executable))
    if checkout:
        require_checkout(checkout.folder)
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('--device cuda: expected a GPU, torch finds none; write --device cpu')
    console = Console(width=190)
    document: Numbers = {'conditions': {}, 'shapes': {}}
    conditions = {
        'device': torch.cuda.get_device_name()
        if device == 'cuda'
        else torch.backends.cpu.get_cpu_capability(),
        'torch': torch.__version__,
        'steps': steps,
    }
    caches = caches_on(device, compiled)
    for shape in shapes:
        print(f'measuring {shape} ...', file=sys.stderr, flush=True)
        document['shapes'][shape] = measure_shape(
            SHAPES[shape], caches, steps, history, threads, checkout, device
        )
        document['conditions'][shape] = conditions
        write(out, document)
    if shapes:
        console.print(shapes_table(document['shapes'], threads))
    torch.set_num_threads(threads[0])
    if collect:
        document['collection'] = {task: measure_collection(task, calls) for task in collect}
        console.print(collection_table(document['collection']))
    if reanalysis:
        document['reanalysis'] = {
            shape: measure_reanalysis(shape, segments, reanalysis_simulations) for shape in REANALYSED
        }
        console.print(reanalysis_table(document['reanalysis']))
    write(out, document)
    print(f'JSON: {out}')


def write(path: Path, document: Numbers) -> None:
    """Put what was measured into a JSON file, in the place of the same shapes and tasks."""
    known = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {section: known.get(section, {}) | document.get(section, {}) for section in known | document}
    path.write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    silence_host()
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(str(error))
