"""What the sink wrote is what TensorBoard reads: values, steps, tags, layout and histogram buckets."""

from __future__ import annotations

import copy
import re
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import tensorboardX
import torch.utils.tensorboard
from tensorboard import data_compat
from tensorboard.backend.event_processing import event_accumulator as events
from tensorboard.backend.event_processing import event_file_loader
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from lzero_kv.cache.stats import CacheStats, Log2Histogram
from lzero_kv.telemetry.metrics import CHARTS, HISTOGRAMS, METRICS, Axis, Kind, tag
from lzero_kv.telemetry.read import read_run
from lzero_kv.telemetry.reading import read_managers
from lzero_kv.telemetry.tensorboard import TensorBoardSink, interval, raw_histogram

from .driving import env_step, make_manager

WRITERS = pytest.mark.parametrize(
    'library', [torch.utils.tensorboard, tensorboardX], ids=['torch', 'tensorboardX']
)
STEPS, ITERATIONS = (30, 70, 110), (4, 9, 16)


def write_points(folder: Path, library: ModuleType = torch.utils.tensorboard) -> list[dict]:
    """Write three points with more work in each; returns the manager's own summary at each point."""
    manager, summaries = make_manager(), []
    with library.SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer)
        for point, (step, iteration) in enumerate(zip(STEPS, ITERATIONS, strict=True)):
            for number in range(3 * point + 1):
                env_step(manager, 100 * point + number)
            sink.write({'acting': manager}, env_step=step, train_iter=iteration)
            summaries.append(manager.get_stats_summary())
    return summaries


@WRITERS
def test_counters_are_differences_and_gauges_are_current(tmp_path: Path, library: ModuleType) -> None:
    summaries = write_points(tmp_path, library)
    log = read_run(tmp_path)
    assert log.pools == ('roots', 'nodes', 'total')
    for pool in ('roots', 'nodes'):
        for name, metric in METRICS.items():
            now = [summary[pool][name] for summary in summaries]
            before = [0, *now[:-1]] if metric.kind is Kind.COUNTER else [0, 0, 0]
            if metric.kind is Kind.RATIO:
                continue
            series = log.series(Axis.ENV_STEP, pool, name)
            assert series is not None
            assert series.values.tolist() == pytest.approx([a - b for a, b in zip(now, before, strict=True)])
            assert series.steps.tolist() == list(STEPS)
    assert summaries[-1]['nodes']['evictions'] > 0, (
        'the workload must evict, or the test above compares zeros'
    )
    assert summaries[-1]['nodes']['rebuilt_tokens'] > 0


def test_hit_rate_is_that_of_the_interval(tmp_path: Path) -> None:
    write_points(tmp_path)
    log = read_run(tmp_path)
    for pool in log.pools:
        hits, queries, rate = (
            log.series(Axis.ENV_STEP, pool, name) for name in ('hits', 'queries', 'hit_rate')
        )
        assert hits is not None
        assert queries is not None
        assert rate is not None
        assert rate.values.tolist() == pytest.approx((hits.values / queries.values).tolist(), abs=1e-6)


def test_no_hit_rate_where_nothing_was_queried(tmp_path: Path) -> None:
    manager = make_manager()
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        env_step(manager, 0)
        sink.write({'acting': manager}, 10, 1)
        sink.write({'acting': manager}, 20, 2)
    log = read_run(tmp_path)
    queries, rate = (log.series(Axis.ENV_STEP, 'nodes', name) for name in ('queries', 'hit_rate'))
    assert queries is not None
    assert rate is not None
    assert (queries.steps.tolist(), queries.values.tolist()) == ([10, 20], [20, 0])
    assert rate.steps.tolist() == [10]
    assert 'hit_rate' not in log.last()['nodes']
    assert log.totals()['nodes']['hit_rate'] == pytest.approx(rate.values[0])


def test_total_is_the_sum_of_the_pools(tmp_path: Path) -> None:
    write_points(tmp_path)
    last = read_run(tmp_path).last()
    for name, metric in METRICS.items():
        if metric.kind is Kind.COUNTER or name in ('entries', 'bytes'):
            assert last['total'][name] == last['roots'][name] + last['nodes'][name], name


def test_both_axes_hold_the_same_values(tmp_path: Path) -> None:
    write_points(tmp_path)
    log = read_run(tmp_path)
    for pool in log.pools:
        for name in METRICS:
            by_step, by_iteration = (log.series(axis, pool, name) for axis in Axis)
            assert by_step is not None
            assert by_iteration is not None
            assert by_iteration.steps.tolist() == list(ITERATIONS)
            assert by_iteration.values.tolist() == by_step.values.tolist()


def test_tags_of_the_log(tmp_path: Path) -> None:
    write_points(tmp_path)
    tags = events.EventAccumulator(str(tmp_path)).Reload().Tags()
    pools = ('roots', 'nodes', 'total')
    assert set(tags['scalars']) == {
        tag(axis, pool, name) for axis in Axis for pool in pools for name in METRICS
    }
    assert set(tags['histograms']) == {
        tag(axis, pool, name) for axis in Axis for pool in pools for name in HISTOGRAMS
    }


def test_reset_between_points_counts_from_the_reset(tmp_path: Path) -> None:
    manager = make_manager()
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        for step in range(4):
            env_step(manager, step)
        sink.write({'acting': manager}, 10, 1)
        manager.reset_stats()
        env_step(manager, 4)
        after = manager.get_stats_summary()
        sink.write({'acting': manager}, 20, 2)
    queries = read_run(tmp_path).series(Axis.ENV_STEP, 'nodes', 'queries')
    assert queries is not None
    assert queries.values.tolist()[1] == after['nodes']['queries'] > 0


def test_a_reset_of_one_model_leaves_the_total_right(tmp_path: Path) -> None:
    acting, target = make_manager(), make_manager(nodes=40)
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        for point in range(2):
            for step in range(3 - 2 * point):
                env_step(acting, 10 * point + step)
            for step in range(4):
                env_step(target, 10 * point + step)
            sink.write({'acting': acting, 'reanalysis': target}, 10 * point, point)
            acting.reset_stats()
    log = read_run(tmp_path)
    parts = [log.series(Axis.ENV_STEP, pool, 'queries') for pool in ('total', 'roots', 'nodes', 'reanalysis')]
    total, *pools = [series.values.tolist() for series in parts if series is not None]
    assert pools == [[12, 4], [60, 20], [96, 96]]
    assert total == [168, 120]


def test_a_manager_in_the_place_of_another_counts_from_its_start(tmp_path: Path) -> None:
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        for point in range(3):
            manager = make_manager()
            env_step(manager, 0)
            sink.write({'acting': manager}, 10 * point, point)
            given_up = weakref.ref(manager)
            del manager
            assert given_up() is None
    queries = read_run(tmp_path).series(Axis.ENV_STEP, 'nodes', 'queries')
    assert queries is not None
    assert queries.values.tolist() == [20, 20, 20]


def test_target_model_reports_as_reanalysis(tmp_path: Path) -> None:
    acting, target = make_manager(), make_manager(nodes=40)
    env_step(acting, 0)
    for step in range(3):
        env_step(target, step)
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write({'acting': acting, 'reanalysis': target}, 10, 1)
    last, of_target, of_acting = (
        read_run(tmp_path).last(),
        target.get_stats_summary(),
        acting.get_stats_summary(),
    )
    assert list(last) == ['roots', 'nodes', 'reanalysis', 'total']
    assert last['reanalysis']['queries'] == of_target['roots']['queries'] + of_target['nodes']['queries']
    assert last['nodes']['queries'] == of_acting['nodes']['queries']
    assert last['total']['bytes'] == of_acting['total']['bytes'] + of_target['total']['bytes']


def test_a_target_model_that_never_searched_is_left_out(tmp_path: Path) -> None:
    acting = make_manager()
    env_step(acting, 0)
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write({'acting': acting, 'reanalysis': copy.deepcopy(acting)}, 10, 1)
    assert read_run(tmp_path).pools == ('roots', 'nodes', 'total')


def test_nothing_is_written_without_statistics(tmp_path: Path) -> None:
    manager = make_manager(enable_stats=False, tensorboard=False)
    env_step(manager, 0)
    assert read_managers(manager) == {}
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write({'acting': manager}, 10, 1)
    assert read_run(tmp_path).pools == ()


def test_histograms_can_be_left_out(tmp_path: Path) -> None:
    manager = make_manager(histograms=False)
    env_step(manager, 0)
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write({'acting': manager}, 10, 1)
    log = read_run(tmp_path)
    assert log.pools
    assert log.histograms == {}


@pytest.mark.parametrize(
    ('step', 'iteration', 'error', 'message'),
    [
        (-1, 2, ValueError, 'env_step must be 0 or more, got -1'),
        (5, -2, ValueError, 'train_iter must be 0 or more, got -2'),
        (5.0, 2, TypeError, 'env_step must be an integer, got float'),
        (5, True, TypeError, 'train_iter must be an integer, got bool'),
    ],
)
def test_a_rejected_point_changes_nothing(
    tmp_path: Path, step: int, iteration: int, error: type[Exception], message: str
) -> None:
    manager = make_manager()
    env_step(manager, 0)
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        with pytest.raises(error, match=message):
            sink.write({'acting': manager}, step, iteration)
        for names in (['leaves', 'acting'], ['reanalysis'], []):
            with pytest.raises(
                ValueError, match=re.escape(f"for a target model, 'reanalysis', got {sorted(names)}")
            ):
                sink.write(dict.fromkeys(names, manager), 5, 2)
        sink.write({'acting': manager}, 5, 2)
    queries = read_run(tmp_path).series(Axis.ENV_STEP, 'nodes', 'queries')
    assert queries is not None
    assert queries.steps.tolist() == [5]
    assert queries.values.tolist() == [manager.get_stats_summary()['nodes']['queries']]


@WRITERS
def test_layout_is_written_once_and_names_the_charts(tmp_path: Path, library: ModuleType) -> None:
    write_points(tmp_path, library)
    layouts = [value for value in raw_values(tmp_path) if value.tag == 'custom_scalars__config__']
    assert len(layouts) == 1
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(layouts[0].tensor).item())
    assert [category.title for category in layout.category] == [
        'KV cache by environment step',
        'KV cache by training iteration',
    ]
    for category in layout.category:
        assert not category.closed
        assert [chart.title for chart in category.chart] == [chart.heading for chart in CHARTS]


def test_each_chart_of_the_layout_draws_its_tags_only(tmp_path: Path) -> None:
    write_points(tmp_path)
    config = next(value for value in raw_values(tmp_path) if value.tag == 'custom_scalars__config__')
    layout = layout_pb2.Layout.FromString(tensor_util.make_ndarray(config.tensor).item())
    scalars = events.EventAccumulator(str(tmp_path)).Reload().Tags()['scalars']
    for axis, category in zip(Axis, layout.category, strict=True):
        for chart, drawing in zip(CHARTS, category.chart, strict=True):
            # TensorBoard draws a tag when an entry of the chart matches its beginning.
            drawn = {text for text in scalars for entry in drawing.multiline.tag if re.match(entry, text)}
            assert drawn == {tag(axis, pool, chart.metric) for pool in chart.pools if pool != 'reanalysis'}


def test_metrics_are_explained_in_the_log(tmp_path: Path) -> None:
    write_points(tmp_path)
    texts = [value for value in raw_values(tmp_path) if value.tag.startswith('kv_cache/metrics')]
    assert len(texts) == 1
    text = tensor_util.make_ndarray(texts[0].tensor).item().decode()
    for name, metric in METRICS.items():
        assert f'| {name} | {metric.unit.value} |' in text
        assert metric.sentence in text


@WRITERS
def test_histograms_hold_the_interval(tmp_path: Path, library: ModuleType) -> None:
    manager, snapshots = make_manager(), [CacheStats()]
    with library.SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        for point in range(3):
            for step in range(point + 2):
                env_step(manager, 10 * point + step)
            sink.write({'acting': manager}, 10 * point, point)
            snapshots.append(manager.stats_snapshot()['nodes'])
    for name in HISTOGRAMS:
        points = read_run(tmp_path).histograms[(Axis.ENV_STEP, 'nodes', name)]
        assert [point.step for point in points] == [0, 10, 20]
        for point, before, now in zip(points, snapshots, snapshots[1:], strict=False):
            expected: Log2Histogram = getattr(now, name) - getattr(before, name)
            assert list(point.counts) == expected.counts
            assert list(point.limits) == expected.limits


def test_tensorboard_draws_the_buckets_where_they_are(tmp_path: Path) -> None:
    histogram = Log2Histogram()
    for value in (1, 2, 3, 3, 9, 15):
        histogram.add(value)
    with torch.utils.tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_histogram_raw('values', **raw_histogram(histogram), global_step=3)
    drawn = next(data_compat.migrate_value(value) for value in raw_values(tmp_path) if value.tag == 'values')
    # One row per bucket: left edge, right edge, count. This is what the Histograms page gets.
    assert tensor_util.make_ndarray(drawn.tensor).tolist() == [[1, 2, 1], [2, 4, 3], [4, 8, 0], [8, 16, 2]]


def test_zero_is_a_bucket_of_its_own() -> None:
    histogram = Log2Histogram()
    for value in (0, 0, 1):
        histogram.add(value)
    raw = raw_histogram(histogram)
    assert (raw['min'], raw['max'], raw['num']) == (0, 2, 3)
    assert (raw['bucket_limits'], raw['bucket_counts']) == ([1, 2], [2, 1])


def test_an_empty_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match='at least one value, got an empty one; leave its point out'):
        raw_histogram(Log2Histogram())


def test_interval_is_a_copy() -> None:
    now = CacheStats(total_queries=5, hits=3, misses=2)
    first = interval(now, None)
    now.total_queries += 1
    assert first.queries == 5
    assert interval(now, first).queries == 1


def raw_values(folder: Path) -> list[summary_pb2.Summary.Value]:
    """Every value of the folder's event files, as written."""
    return [
        value
        for path in sorted(folder.glob('events.out.tfevents.*'))
        for event in event_file_loader.LegacyEventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]
