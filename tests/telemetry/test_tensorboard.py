"""What the sink wrote is what TensorBoard reads: values, steps, tags, layout and histogram buckets."""

from __future__ import annotations

import copy
import logging
import re
import weakref
from collections.abc import Sequence
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
from lzero_kv.telemetry.counters import Timings
from lzero_kv.telemetry.metrics import (
    CHARTS,
    HISTOGRAMS,
    METRICS,
    SPEED,
    SPEED_CHARTS,
    SPEED_METRICS,
    Kind,
    tag,
)
from lzero_kv.telemetry.read import RunLog, read_run
from lzero_kv.telemetry.reading import Moment, raw_histogram, read_managers
from lzero_kv.telemetry.tensorboard import TensorBoardSink, interval

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
            series = log.series(pool, name)
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
        hits, queries, rate = (log.series(pool, name) for name in ('hits', 'queries', 'hit_rate'))
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
    queries, rate = (log.series('nodes', name) for name in ('queries', 'hit_rate'))
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


def test_tags_of_the_log(tmp_path: Path) -> None:
    write_points(tmp_path)
    tags = events.EventAccumulator(str(tmp_path)).Reload().Tags()
    pools = ('roots', 'nodes', 'total')
    speed = {
        tag(SPEED, name) for name in ('env_steps_per_second', 'env_steps', 'seconds', 'train_iterations')
    }
    assert set(tags['scalars']) == {tag(pool, name) for pool in pools for name in METRICS} | speed
    assert set(tags['histograms']) == {tag(pool, name) for pool in pools for name in HISTOGRAMS}


def timed(searches: int) -> Timings:
    """After that many searches, of 7 simulations and 0.5 s each, a root inference of 0.1 s before each."""
    made = Timings()
    for _ in range(searches):
        before = made.snapshot()
        made.count_roots(0.1)
        made.count_search(7, 0.5)
        made.count_collection(0.8, before)
    return made


def write_timed(folder: Path, *points: int, others: Sequence[Moment] = ()) -> RunLog:
    """Points after so many searches, 11 environment steps each."""
    manager = make_manager()
    with torch.utils.tensorboard.SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer)
        for number, searches in enumerate(points, 1):
            env_step(manager, number)
            sink.write({'acting': manager}, 11 * number, number, others=others, timings=timed(searches))
    return read_run(folder)


def test_times_are_those_of_the_interval_and_of_the_run(tmp_path: Path) -> None:
    log = write_timed(tmp_path, 2, 5)
    expected = {'searches': [2, 3], 'search_seconds': [1.0, 1.5], 'simulations': [14, 21]}
    expected |= {'root_inferences': [2, 3], 'collect_seconds': [1.6, 2.4], 'planning_seconds': [1.2, 1.8]}
    expected |= {'search_ms': [500] * 2, 'root_inference_ms': [100] * 2, 'simulations_per_second': [14] * 2}
    expected |= {'planning_share': [0.75] * 2, 'train_iterations': [1, 2], 'env_steps': [11]}
    for name, values in expected.items():
        assert log.series(SPEED, name).values.tolist() == pytest.approx(values), name
    assert log.series(SPEED, 'env_steps_per_second').steps.tolist() == [22]  # none before the first point
    whole, last = log.speed(), log.speed(last=True)
    assert (whole['searches'], last['searches']) == (5, 3)
    assert whole['search_ms'] == pytest.approx(500)
    assert whole['env_steps_per_second'] == pytest.approx(11 / whole['seconds'])


def test_times_of_another_model_begin_anew(tmp_path: Path) -> None:
    assert write_timed(tmp_path, 4, 3).series(SPEED, 'searches').values.tolist() == [4, 3]


def test_times_of_several_processes_are_added_up(tmp_path: Path) -> None:
    other = Moment.of({'acting': make_manager()}, timings=timed(3))
    numbers = write_timed(tmp_path, 2, others=[other, other]).speed()
    assert numbers['searches'] == 2 + 3 + 3
    assert numbers['simulations_per_second'] == pytest.approx(7 / 0.5)  # of one process


def test_the_first_point_of_a_chart_carries_its_description(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_points(tmp_path)
    assert read_run(tmp_path).series('nodes', 'hits') is not None
    # TensorBoard's reader has nothing to say of them
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    described = {value.tag: value.metadata.summary_description for value in raw_values(tmp_path)[::-1]}
    assert described[tag('nodes', 'saved_tokens')] == METRICS['saved_tokens'].sentence
    assert described[tag(SPEED, 'train_iterations')] == SPEED_METRICS['train_iterations'].sentence


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
    queries = read_run(tmp_path).series('nodes', 'queries')
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
    parts = [log.series(pool, 'queries') for pool in ('total', 'roots', 'nodes', 'reanalysis')]
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
    queries = read_run(tmp_path).series('nodes', 'queries')
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


def layout_of(folder: Path) -> layout_pb2.Layout:
    """The layout of a log, which is written once."""
    (config,) = (value for value in raw_values(folder) if value.tag == 'custom_scalars__config__')
    return layout_pb2.Layout.FromString(tensor_util.make_ndarray(config.tensor).item())


@WRITERS
def test_the_page_opens_with_what_moves(tmp_path: Path, library: ModuleType) -> None:
    write_points(tmp_path, library)
    moving, roots, steady = layout_of(tmp_path).category
    titles = [category.title for category in (moving, roots, steady)]
    assert titles == ['KV cache', 'KV cache: roots', 'KV cache: constant in a healthy training']
    speed, pools = [chart.heading for chart in SPEED_CHARTS], [c.heading for c in CHARTS if not c.steady]
    nodes = [f'all: {name}' if name == 'memory in bytes' else f'nodes: {name}' for name in pools]
    assert [chart.title for chart in moving.chart] == [*speed, *nodes]
    assert [chart.title for chart in roots.chart] == [f'roots: {name}' for name in pools]
    assert [chart.title for chart in steady.chart] == [chart.heading for chart in CHARTS if chart.steady]
    assert {chart.metrics for chart in CHARTS if chart.steady} == {('evictions',), ('rebuilt_tokens',)}


def test_each_chart_of_the_layout_draws_its_tags_only(tmp_path: Path) -> None:
    write_timed(tmp_path, 2, 5)
    drawings = {chart.title: chart for category in layout_of(tmp_path).category for chart in category.chart}
    scalars = events.EventAccumulator(str(tmp_path)).Reload().Tags()['scalars']
    moving = [chart for chart in CHARTS if not chart.steady]
    # TensorBoard colours runs: a chart that moves has one line, where nothing is searched again
    expected = {
        f'{pool}: {c.heading}': {tag(pool, *c.metrics)} for c in moving for pool in ('roots', 'nodes')
    }
    expected['all: memory in bytes'] = {tag('total', 'bytes')}
    del expected['nodes: memory in bytes']
    expected |= {
        c.heading: {tag(pool, *c.metrics) for pool in ('roots', 'nodes')} for c in CHARTS if c.steady
    }
    expected |= {chart.heading: {tag(SPEED, name) for name in chart.metrics} for chart in SPEED_CHARTS}
    for heading, tags in expected.items():
        # TensorBoard draws a tag when an entry of the chart matches its beginning.
        entries = drawings[heading].multiline.tag
        assert {text for text in scalars for entry in entries if re.match(entry, text)} == tags


def test_metrics_are_explained_in_the_log(tmp_path: Path) -> None:
    write_points(tmp_path)
    texts = [value for value in raw_values(tmp_path) if value.tag.startswith('kv_cache/metrics')]
    assert len(texts) == 1
    text = tensor_util.make_ndarray(texts[0].tensor).item().decode()
    for name, metric in (METRICS | SPEED_METRICS).items():
        assert f'| {name} | {metric.unit.value} |' in text
        assert metric.sentence in text
    assert '| window_slots | 11 |' in text and '| max_bytes | 2147483648 |' in text


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
        points = read_run(tmp_path).histograms[('nodes', name)]
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
        writer.add_histogram_raw('values', **raw_histogram(histogram.limits, histogram.counts), global_step=3)
    drawn = next(data_compat.migrate_value(value) for value in raw_values(tmp_path) if value.tag == 'values')
    # One row per bucket: left edge, right edge, count. This is what the Histograms page gets.
    assert tensor_util.make_ndarray(drawn.tensor).tolist() == [[1, 2, 1], [2, 4, 3], [4, 8, 0], [8, 16, 2]]


def test_zero_is_a_bucket_of_its_own() -> None:
    histogram = Log2Histogram()
    for value in (0, 0, 1):
        histogram.add(value)
    raw = raw_histogram(histogram.limits, histogram.counts)
    assert (raw['min'], raw['max'], raw['num']) == (0, 2, 3)
    assert (raw['bucket_limits'], raw['bucket_counts']) == ([1, 2], [2, 1])


def test_an_empty_histogram_is_refused() -> None:
    with pytest.raises(ValueError, match='at least one value, got an empty one; leave its point out'):
        raw_histogram([1, 2], [0, 0])


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
