"""The examples do what they say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey
from lzero_kv.telemetry.read import find_runs, runs_in
from lzero_kv.telemetry.tensorboard import TensorBoardSink
from testing import notebook

from ..telemetry.driving import make_manager, write_experiment

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / 'examples' / f'{name}.py'))


def nodes_of(node: Any) -> list[Any]:
    return [node, *(one for child in node.children if child.visits for one in nodes_of(child))]


def test_a_search_of_ones_own_finds_the_same_under_any_bound() -> None:
    """What is held equals a pass over the whole history; evicted nodes are computed again."""
    main = example('own_search')['main']
    bounded, free = main(200_000), main(10_000_000)
    counted = [search.manager.get_stats_summary()['nodes'] for search in (bounded, free)]
    assert counted[0]['evictions'] > 0 < counted[0]['rebuilt_tokens']
    assert counted[1]['evictions'] == counted[1]['misses'] == 0
    assert bounded.manager.bytes <= 200_000
    checked = 0
    for row, (root, twin) in enumerate(zip(bounded.roots, free.roots, strict=True)):
        visits = [[(one.history, one.visits) for one in nodes_of(top)] for top in (root, twin)]
        assert visits[0] == visits[1]
        for node in nodes_of(root):
            slots = bounded.manager.slots([NodeKey(row, node.number)])
            if slots[0] != NO_SLOT:
                held, length = bounded.manager.load(slots), len(node.history)
                whole = bounded.model.whole(node.history)[2]
                torch.testing.assert_close(held[:, :, :, -length:], whole[:, :, :, -length:])
                checked += 1
    assert checked > 20
    assert len({tuple(child.visits for child in root.children) for root in bounded.roots}) > 1


def test_a_budget_in_a_transformer_of_ones_own() -> None:
    """A budget of all tokens keeps all; a quarter holds a quarter."""
    main = example('own_transformer_budget')['main']
    (quarter, small), (whole, large) = main(0.25), main(1.0)
    assert [int(layer.lengths.min()) for layer in (large[0], large[2])] == [75, 75]
    assert max(small[layer].lengths.max() for layer in range(3)) < 75 // 3
    assert quarter.shape == whole.shape == (2, 23)


def test_statistics_are_read_run_by_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write_experiment(tmp_path / name, points=points) for name, points in (('a', 2), ('b', 3))]
    totals = example('read_statistics')['main'](tmp_path)
    assert [total['roots']['queries'] for total in totals] == [40, 60]
    out = capsys.readouterr().out
    assert all(f'{folder}  nodes: 60.0% hits' in out for folder in folders)
    assert 'of nodes, by environment step: 20: 60.0% 40: 60.0% 60: 60.0%' in out


def test_a_pool_without_queries_has_no_hit_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manager = make_manager()
    manager.lookup([RootKey(0, 1)])
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write({'acting': manager}, env_step=10, train_iter=1)
    example('read_statistics')['main'](tmp_path)
    out = capsys.readouterr().out
    assert f'{tmp_path}  roots: 0.0% hits, 0 tokens rebuilt' in out
    assert f'{tmp_path}  nodes: nothing asked for, 0 tokens rebuilt' in out


def test_the_tour_runs_from_top_to_bottom() -> None:
    """Each cell prints something, and did when the file was written."""
    tour = ROOT / 'examples' / 'tour.ipynb'
    for one in (notebook.run(tour), json.loads(tour.read_text(encoding='utf-8'))):
        cells = [cell for cell in one['cells'] if cell['cell_type'] == 'code']
        assert len(cells) == 5
        assert all(cell['outputs'] for cell in cells)


def test_an_evaluation_loop_of_ones_own(tmp_path: Path, warm_python: str) -> None:
    """Two environments of twelve steps: each but the first after a reset finds its root."""
    done = subprocess.run(
        [warm_python, str(ROOT / 'examples' / 'own_evaluation.py')], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert "'misses': 0, 'stores': 24," in last


def test_charts_stand_in_weights_and_biases(tmp_path: Path, warm_python: str) -> None:
    """Read back from the offline run: the cache's charts with TensorBoard's numbers."""
    datastore = pytest.importorskip('wandb.sdk.internal.datastore')
    from wandb.proto.wandb_internal_pb2 import Record

    code = f"import runpy; runpy.run_path({str(ROOT / 'examples' / 'weights_and_biases.py')!r})['main'](1)"
    offline = dict(WANDB_MODE='offline', WANDB_SILENT='true', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [warm_python, '-c', code], cwd=tmp_path, text=True, capture_output=True, env={**os.environ, **offline}
    )
    assert done.returncode == 0, done.stderr
    [written] = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    store, shown = datastore.DataStore(), {}
    store.open_for_scan(str(written))
    with closing(store):
        while (data := store.scan_data()) is not None:
            items = Record.FromString(data).history.item
            shown |= {(item.key or '/'.join(item.nested_key)): item.value_json for item in items}
    [run] = [run for folder in find_runs(tmp_path / 'data_lz') for run in runs_in(folder)]
    for tag in ('nodes/hit_rate', 'roots/queries', 'speed/search_ms'):
        logged = run.series(*tag.split('/')).values[-1]
        assert float(shown[f'kv_cache_step/{tag}']) == pytest.approx(float(logged))
