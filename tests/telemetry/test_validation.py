"""What validation counted, in TensorBoard's files, tables and pictures."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import ModuleType

import matplotlib.image
import pytest
import tensorboardX
import torch.utils.tensorboard
from hypothesis import HealthCheck, given, settings
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator as events
from tensorboard.util import tensor_util

from lzero_kv.cli import main
from lzero_kv.telemetry.counters import Cause, Fault, ValidationCounters
from lzero_kv.telemetry.metrics import (
    METRICS,
    VALIDATION,
    VALIDATION_CHARTS,
    VALIDATION_METRICS,
    Kind,
    parse_tag,
    tag,
)
from lzero_kv.telemetry.plot import plot_run
from lzero_kv.telemetry.read import read_run
from lzero_kv.telemetry.reading import columns_of, validation_numbers
from lzero_kv.telemetry.table import validation_table
from lzero_kv.telemetry.tensorboard import TensorBoardSink

from ..validation.drawn import some_counters, validation_counters
from .driving import env_step, make_manager
from .test_tensorboard import layout_of, raw_values

WRITERS = pytest.mark.parametrize(
    'library', [torch.utils.tensorboard, tensorboardX], ids=['torch', 'tensorboardX']
)
STEPS, ITERATIONS = (30, 70, 110), (4, 9, 16)


def write_points(
    folder: Path, points: list[ValidationCounters | None], library: ModuleType = torch.utils.tensorboard
) -> None:
    """Write one point for each cumulative counters; None: validation is off."""
    manager = make_manager()
    with library.SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer)
        for step, iteration, counters in zip(STEPS, ITERATIONS, points, strict=False):
            env_step(manager, step)
            sink.write({'acting': manager}, step, iteration, counters)


def growing() -> list[ValidationCounters | None]:
    """Three points of a run: 1, then 3, then 3 times as much as `some_counters`."""
    return [some_counters(1), some_counters(3), some_counters(3)]


def series(folder: Path, metric: str) -> list[tuple[int, float]]:
    found = read_run(folder).series(VALIDATION, metric)
    return [] if found is None else list(zip(found.steps.tolist(), found.values.tolist(), strict=True))


@WRITERS
def test_counters_are_differences_and_largest_are_those_so_far(tmp_path: Path, library: ModuleType) -> None:
    write_points(tmp_path, growing(), library)
    assert series(tmp_path, 'searches') == [(30, 11), (70, 22), (110, 0)]
    assert series(tmp_path, 'validated') == [(30, 7), (70, 14), (110, 0)]
    assert series(tmp_path, 'compared') == [(30, 14), (70, 28), (110, 0)]
    assert series(tmp_path, 'equal') == [(30, 8), (70, 16), (110, 0)]
    assert series(tmp_path, 'different') == [(30, 6), (70, 12), (110, 0)]
    assert series(tmp_path, 'unexplained') == series(tmp_path, 'cache_wrong') == [(30, 0), (70, 0), (110, 0)]
    assert series(tmp_path, 'cause_slot_overwritten') == [(30, 4), (70, 8), (110, 0)]
    assert series(tmp_path, 'cause_root_lost') == [(30, 1), (70, 2), (110, 0)]
    assert series(tmp_path, 'largest_stock') == [(30, 2.5), (70, 2.5), (110, 2.5)]
    assert [value for _, value in series(tmp_path, 'largest_cache')] == pytest.approx([3e-7] * 3)


def test_means_are_of_the_interval_and_have_no_point_where_nothing_moved(tmp_path: Path) -> None:
    first, second = some_counters(), some_counters()
    second.nodes.policy.add(0.1)
    write_points(tmp_path, [first, second, second.snapshot()])
    assert series(tmp_path, 'policy_rows') == [(30, 2), (70, 1), (110, 0)]
    assert series(tmp_path, 'policy_moved') == [(30, 0.5), (70, pytest.approx(0.1))]
    assert series(tmp_path, 'value_moved') == [(30, 3.0)]
    assert series(tmp_path, 'policy_moved_most') == [(30, 0.75), (70, 0.75), (110, 0.75)]


def test_off_leaves_the_log_as_it_is_without_validation(tmp_path: Path) -> None:
    write_points(tmp_path, [None, None])
    tags = {value.tag for value in raw_values(tmp_path)}
    assert not [text for text in tags if VALIDATION in text]
    pools = ('roots', 'nodes', 'total')
    assert {text for text in tags if parse_tag(text) is not None and parse_tag(text).metric in METRICS} == {
        tag(pool, name) for pool in pools for name in METRICS
    }
    texts = [
        tensor_util.make_ndarray(value.tensor).item()
        for value in raw_values(tmp_path)
        if value.HasField('tensor')
    ]
    assert not [text for text in texts if isinstance(text, bytes) and b'| validation | unit' in text]
    assert read_run(tmp_path).validation() == {}


def test_a_fault_has_a_chart_where_it_happened_and_each_cause_always(tmp_path: Path) -> None:
    bad = some_counters(2)
    bad.nodes.count_cache_wrong(Fault.TOKEN_OFFSET)
    write_points(tmp_path, [some_counters(), bad])
    tags = events.EventAccumulator(str(tmp_path)).Reload().Tags()['scalars']
    names = {text.rsplit('/', 1)[1] for text in tags if text.startswith('kv_cache_step/validation/')}
    assert {name for name in names if name.startswith('fault_')} == {'fault_token_offset'}
    assert {name for name in names if name.startswith('cause_')} == {f'cause_{c.value}' for c in Cause}
    assert series(tmp_path, 'fault_token_offset') == [(70, 1)]


def test_another_run_in_the_same_log_counts_from_its_start(tmp_path: Path) -> None:
    write_points(tmp_path, [some_counters(3), some_counters(1)])
    assert series(tmp_path, 'compared') == [(30, 42), (70, 14)]


def test_the_run_added_up_is_the_counters(tmp_path: Path) -> None:
    points = [some_counters(1), some_counters(3), some_counters(4)]
    points[2].nodes.policy.add(0.9)
    points[2].roots.count_unexplained()
    points[2].roots.count_cache_wrong(Fault.PERTURBED)
    write_points(tmp_path, list(points))
    assert read_run(tmp_path).validation() == pytest.approx(validation_numbers(points[2]), rel=1e-5)


def test_the_page_has_the_charts_of_validation_below_those_of_the_pools(tmp_path: Path) -> None:
    write_points(tmp_path, growing())
    moving, _, steady = layout_of(tmp_path).category
    scalars = events.EventAccumulator(str(tmp_path)).Reload().Tags()['scalars']
    charts = {chart.title: chart for chart in (*moving.chart, *steady.chart)}
    assert [chart.heading for chart in VALIDATION_CHARTS if chart.steady] == [steady.chart[-1].title]
    for chart in VALIDATION_CHARTS:
        entries = charts[chart.heading].multiline.tag
        drawn = {text for text in scalars for entry in entries if re.match(entry, text)}
        assert drawn == {tag(VALIDATION, metric) for metric in chart.metrics}


def test_metrics_are_explained_in_the_log(tmp_path: Path) -> None:
    write_points(tmp_path, growing())
    (value,) = (value for value in raw_values(tmp_path) if value.tag.startswith('kv_cache/metrics'))
    text = tensor_util.make_ndarray(value.tensor).item().decode()
    for name, metric in VALIDATION_METRICS.items():
        assert f'| {name} | {metric.unit.value} |' in text
        assert metric.sentence in text


@pytest.mark.parametrize(
    ('pool', 'metric'), [(VALIDATION, 'hits'), ('roots', 'compared'), (VALIDATION, 'lifetime')]
)
def test_a_metric_belongs_to_pools_or_to_validation(pool: str, metric: str) -> None:
    assert parse_tag(f'kv_cache_step/{pool}/{metric}') is None


@given(validation_counters())
def test_each_number_is_a_metric(counters: ValidationCounters) -> None:
    numbers = validation_numbers(counters)
    assert set(numbers) <= set(VALIDATION_METRICS)
    missing = set(VALIDATION_METRICS) - set(numbers)
    assert all(name.startswith('fault_') or VALIDATION_METRICS[name].kind is Kind.RATIO for name in missing)


def cells(table_of: ValidationCounters) -> dict[str, list[str]]:
    """The table's rows: the first cell -> the others, without the meaning."""
    console = Console(file=io.StringIO(), width=170)
    console.print(validation_table(columns_of(table_of), 'Pong'))
    assert isinstance(console.file, io.StringIO)
    lines = [line.replace('┃', '│') for line in console.file.getvalue().splitlines()]
    rows = [line.strip('│').split('│') for line in lines if '│' in line]
    return {row[0].strip(): [cell.strip() for cell in row[1:-1]] for row in rows}


def test_counters_as_a_table() -> None:
    rows = cells(some_counters())
    assert rows['metric'] == ['roots', 'nodes', 'reanalysis', 'total']
    assert rows['searches'] == ['-', '-', '-', '11']
    assert rows['compared'] == ['6', '7', '1', '14']
    assert rows['different'] == ['1', '4', '1', '6']
    assert rows['cause_zero_padding'] == ['0', '4', '0', '4']
    assert rows['policy_moved'] == ['-', '0.5', '-', '0.5']
    assert rows['largest_cache'] == ['1e-07', '3e-07', '0', '3e-07']
    assert 'cause_crashed' not in rows
    assert not [name for name in rows if name.startswith('fault_')]


def test_a_kind_that_was_never_compared_has_no_column_and_a_fault_has_a_row() -> None:
    counters = ValidationCounters()
    counters.nodes.count_cache_wrong(Fault.ENTRY_LOST)
    rows = cells(counters)
    assert rows['metric'] == ['nodes', 'total']
    assert rows['cache_wrong'] == ['1', '1']
    assert rows['fault_entry_lost'] == ['1', '1']


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=5)
@given(validation_counters())
def test_any_run_can_be_drawn(tmp_path: Path, counters: ValidationCounters) -> None:
    write_points(tmp_path / 'log', [counters, counters + some_counters()])
    path = plot_run(read_run(tmp_path / 'log'), tmp_path / 'plot.png')
    assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    for file in (tmp_path / 'log').iterdir():
        file.unlink()


def test_report_shows_table_and_panels_where_the_log_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_points(tmp_path / 'on', growing())
    write_points(tmp_path / 'off', [None, None, None])
    heights = {}
    for name in ('on', 'off'):
        assert main(['report', str(tmp_path / name)]) == 0
        heights[name] = matplotlib.image.imread(tmp_path / name / 'kv_cache.png').shape[0]
        assert ('Validation of the whole run' in capsys.readouterr().out) == (name == 'on')
    assert heights['on'] > 1.6 * heights['off']
