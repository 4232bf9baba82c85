"""Layer budgets in a real TensorBoard log, read back, as a table and as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.budget import BudgetSnapshot, LayerLoss, Preference
from lzero_kv.cache.layout import KVLayout
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cli.report import report
from lzero_kv.telemetry.metrics import TagName, layer_of, parse_tag
from lzero_kv.telemetry.read import read_run
from lzero_kv.telemetry.reading import raw_histogram
from lzero_kv.telemetry.table import budget_table
from lzero_kv.telemetry.tensorboard import TensorBoardSink

CONTEXT = 13


def snapshot(point: int, **changes: Any) -> BudgetSnapshot:
    """Three layers; what was dropped grows from point to point, and the second layer reads no attention."""
    fields: dict[str, Any] = dict(
        context=CONTEXT,
        slots=(6, 4 + point, 9),
        preferences=tuple(Preference(2.0 + layer + point, 0.5) for layer in range(3)),
        losses=(LayerLoss(10 * point, 4 * point, 0.8 * point), LayerLoss(7, 0, 0.0), LayerLoss()),
        kept=(np.array([0, 3, 3, 12]), np.array([0, 1]), np.array([5])),
        root=(np.array([0, 3, 12]), np.array([0, 1]), np.array([], dtype=np.int64)),
    )
    return BudgetSnapshot(**fields | changes)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    layout = KVLayout(1, 2, 3, 19)
    manager = KVCacheManager(dict(), 2, layout=layout)
    writer = SummaryWriter(str(tmp_path / 'log' / 'serial'))
    sink = TensorBoardSink(writer)
    for point in (1, 2, 3):
        sink.write({'acting': manager}, env_step=40 * point, train_iter=5 * point, budget=snapshot(point))
    writer.close()
    return tmp_path


def test_a_log_tells_what_was_written(log: Path) -> None:
    run = read_run(log / 'log' / 'serial')
    slots = run.series('layer_1', 'slots')
    assert slots is not None and slots.steps.tolist() == [40, 80, 120] and slots.values.tolist() == [5, 6, 7]
    dropped = run.series('layer_0', 'dropped_tokens')
    assert dropped is not None and dropped.values.tolist() == [10, 10, 10]  # since the previous point
    lost = run.series('layer_0', 'lost_mass')
    assert lost is not None and lost.values == pytest.approx([0.2, 0.2, 0.2])
    assert run.series('layer_1', 'lost_mass') is None
    layers = run.layers()
    assert list(layers) == [0, 1, 2]
    assert layers[0] == pytest.approx(
        dict(slots=6, dispersion=5, shift=0.5, dropped_tokens=30, lost_mass=0.2)
    )
    assert layers[1]['dropped_tokens'] == 7
    held = run.histograms[TagName('layer_0', 'kept_tokens')][-1]
    assert [limit - 1 for limit, count in zip(held.limits, held.counts, strict=True) if count] == [0, 3, 12]
    both = run.histograms[TagName('layer_0', 'kept_positions')][-1]
    assert sum(both.counts) == 4
    assert TagName('layer_2', 'kept_tokens') not in run.histograms


def test_the_report_shows_budgets(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(log) == 0
    shown = capsys.readouterr().out
    assert 'Layer budgets' in shown and 'lost_mass' in shown and '20.0 %' in shown
    assert (log / 'kv_cache.png').stat().st_size > 20_000


def test_the_custom_page_has_the_layers(log: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(log / 'log' / 'serial'))
    events.Reload()
    raw = events.Tensors('custom_scalars__config__')[0].tensor_proto.string_val[0]
    tags = [
        tag
        for category in layout_pb2.Layout.FromString(raw).category
        for chart in category.chart
        for tag in chart.multiline.tag
    ]
    assert 'kv_cache_step/layer_[0-9]+/slots$' in tags


def test_without_budgets_the_log_has_no_layers(tmp_path: Path) -> None:
    manager = KVCacheManager(dict(), 2, layout=KVLayout(1, 2, 3, 19))
    writer = SummaryWriter(str(tmp_path))
    TensorBoardSink(writer).write({'acting': manager}, env_step=1, train_iter=1)
    writer.close()
    run = read_run(tmp_path)
    assert run.pools and not run.layers()


@pytest.mark.parametrize('pool', ['layer_', 'layer_x', 'layer', 'roots', 'layer_-1'])
def test_only_layers_are_layers(pool: str) -> None:
    assert layer_of(pool) is None
    assert parse_tag(f'kv_cache_step/{pool}/slots') is None
    assert layer_of('layer_12') == 12


def test_counting_that_begins_anew() -> None:
    old, new = snapshot(3), snapshot(1)
    assert new.since(old).losses == new.losses
    assert snapshot(3).since(snapshot(2)).losses[0] == pytest.approx(LayerLoss(10, 4, 0.8))


def test_a_histogram_has_a_bucket_for_each_place() -> None:
    found = raw_histogram(range(1, 8), [0, 0, 2, 0, 0, 1, 0])  # of the places 2, 2 and 5
    assert found['bucket_counts'] == [0, 0, 2, 0, 0, 1, 0]
    assert found['bucket_limits'] == [1, 2, 3, 4, 5, 6, 7]
    assert (found['min'], found['max'], found['num'], found['sum'], found['sum_squares']) == (2, 6, 3, 9, 33)


def test_a_metric_that_no_layer_has_is_no_column() -> None:
    screen = io.StringIO()
    Console(width=100, file=screen).print(
        budget_table({1: dict(slots=5), 0: dict(slots=7, dropped_tokens=3)})
    )
    text = screen.getvalue()
    assert 'lost_mass' not in text and 'dropped_tokens' in text
