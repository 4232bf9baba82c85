"""Statistics of several processes in one log: what is added, what is not, and that the log says so."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.budget import BudgetSnapshot, LayerLoss
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cli import main
from lzero_kv.lightzero.reporting import report
from lzero_kv.telemetry.counters import Timings
from lzero_kv.telemetry.metrics import RANK_METRICS, TagName
from lzero_kv.telemetry.read import find_runs, read_run
from lzero_kv.telemetry.reading import Moment
from lzero_kv.telemetry.tensorboard import TensorBoardSink

from .driving import env_step, make_manager
from .test_tensorboard import raw_values
from .test_validation import some_counters

SUMMED = ('queries', 'hits', 'misses', 'stores', 'evictions', 'rebuilt_tokens', 'entries', 'bytes')


def texts_of(folder: Path) -> list[str]:
    """The texts of a log, among them the explanation of the metrics."""
    strings = [text for value in raw_values(folder) for text in value.tensor.string_val]
    return [text.decode() for text in strings if b'metric' in text and b'\x00' not in text]


def managers_of_three_ranks() -> list[KVCacheManager]:
    """Managers that did different amounts of work, with pools of different sizes."""
    managers = [make_manager(11), make_manager(40), make_manager(70)]
    for steps, manager in zip((2, 3, 5), managers, strict=True):
        for step in range(steps):
            env_step(manager, step)
    return managers


def sent(moment: Moment) -> Moment:
    """What another process receives."""
    return pickle.loads(pickle.dumps(moment))


def layers(*losses: LayerLoss) -> BudgetSnapshot:
    nothing = tuple(np.zeros(0, np.int64) for _ in losses)
    return BudgetSnapshot(8, (5, 3), (), losses, nothing, nothing)


def write(folder: Path, points: int = 1, **options: object) -> list[KVCacheManager]:
    """A log that the first of three processes writes for all; returns their managers."""
    managers = managers_of_three_ranks()
    with SummaryWriter(str(folder)) as writer:
        sink = TensorBoardSink(writer)
        for point in range(1, points + 1):
            others = [sent(Moment.of({'acting': manager}, **options)) for manager in managers[1:]]
            sink.write({'acting': managers[0]}, 10 * point, point, others=others, **options)
            for manager in managers if point < points else ():
                env_step(manager, 7 + point)
    return managers


def test_counters_and_memory_are_added_and_the_fullest_pool_counts(tmp_path: Path) -> None:
    summaries = [manager.get_stats_summary() for manager in write(tmp_path)]
    totals = read_run(tmp_path).totals()
    for pool in ('roots', 'nodes', 'total'):
        parts = [summary[pool] for summary in summaries]
        for name in SUMMED:
            assert totals[pool][name] == sum(part[name] for part in parts), (pool, name)
        assert totals[pool]['hit_rate'] == pytest.approx(totals[pool]['hits'] / totals[pool]['queries'])
        assert totals[pool]['occupancy'] == pytest.approx(max(part['occupancy'] for part in parts))
        assert (totals[pool]['ranks'], totals[pool]['most_bytes']) == (3, max(p['bytes'] for p in parts))
    assert len({summary['nodes']['occupancy'] for summary in summaries}) == 3


def test_histograms_are_added(tmp_path: Path) -> None:
    managers = write(tmp_path)
    lifetimes = [manager.stats_snapshot()['nodes'].lifetime.total for manager in managers]
    (point,) = read_run(tmp_path).histograms[TagName('nodes', 'lifetime')]
    assert sum(point.counts) == sum(lifetimes) > max(lifetimes) > 0


def test_a_point_counts_what_came_since_the_previous_one(tmp_path: Path) -> None:
    write(tmp_path, points=3)
    queries = read_run(tmp_path).scalars[TagName('roots', 'queries')]
    assert queries.values.tolist() == [4 * (2 + 3 + 5), 4 * 3, 4 * 3]


def test_validation_and_losses_of_layers_are_added(tmp_path: Path) -> None:
    write(tmp_path / 'validation', validation=some_counters())
    alone = some_counters().total
    numbers = read_run(tmp_path / 'validation').validation()
    assert (numbers['compared'], numbers['different']) == (3 * alone.compared, 3 * alone.different)
    assert (numbers['searches'], numbers['largest_stock']) == (33, alone.largest_stock)
    write(tmp_path / 'budget', budget=layers(LayerLoss(7, 5, 1.5), LayerLoss(2, 1, 0.25)))
    found = read_run(tmp_path / 'budget').layers()
    assert [found[layer]['dropped_tokens'] for layer in (0, 1)] == [21, 6]
    assert [found[layer]['lost_mass'] for layer in (0, 1)] == pytest.approx([0.3, 0.25])
    assert [found[layer]['slots'] for layer in (0, 1)] == [5, 3]


def test_a_pool_that_one_process_alone_has_is_there() -> None:
    acting, target = managers_of_three_ranks()[:2]
    together = Moment.of({'acting': acting}).with_ranks([Moment.of({'acting': acting, 'reanalysis': target})])
    assert together.pools['reanalysis'].as_dict()['ranks'] == 1
    assert together.pools['roots'].as_dict()['ranks'] == 2


def test_the_log_and_the_report_say_how_many_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    assert main(['report', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '3 processes: counters, entries and bytes are their sums, occupancy the largest' in out
    rows = [line.replace(' ', '').strip('│').split('│') for line in out.splitlines() if '│' in line]
    assert [row[:4] for row in rows].count(['ranks', '3', '3', '3']) == 1  # the whole run is its one point
    assert any(RANK_METRICS['ranks'].sentence in text for text in texts_of(tmp_path))


class LonelyCollector:
    """A collector of the host that exchanges nothing with its like in other processes."""

    _world_size, _tb_logger, _kv_cache_sink = 2, None, None

    def __init__(self, folder: Path, rank: int, manager: KVCacheManager) -> None:
        self._exp_name, self._rank, self.envstep = str(folder), rank, 30
        model = SimpleNamespace(
            kv_cache_manager=manager,
            cache_config=manager.cache_config,
            validation=None,
            budgets=None,
            timings=Timings(),
        )
        self._policy = SimpleNamespace(get_attribute=lambda name: {'acting': model})

    def collect(self) -> None:
        """Nothing is collected here."""


def test_processes_that_never_meet_write_a_log_each(tmp_path: Path) -> None:
    manager = managers_of_three_ranks()[1]
    collector = LonelyCollector(tmp_path, 1, manager)
    for point in (1, 2):
        report(collector, point)
        env_step(manager, point)
    (folder,) = find_runs(tmp_path)
    assert folder == tmp_path / 'log' / 'serial' / 'rank_1'
    queries = read_run(folder).scalars[TagName('roots', 'queries')]
    assert queries.values.tolist() == [4 * 3, 4]
    assert read_run(folder).ranks == 1


def test_one_process_writes_what_it_always_did(tmp_path: Path) -> None:
    manager = managers_of_three_ranks()[0]
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).write({'acting': manager}, 10, 1)
    tags = {value.tag for value in raw_values(tmp_path)}
    assert not [tag for tag in tags if tag.endswith(tuple(RANK_METRICS))]
    assert texts_of(tmp_path) != []
    assert not [text for text in texts_of(tmp_path) if 'Processes' in text]
    assert read_run(tmp_path).ranks == 1
