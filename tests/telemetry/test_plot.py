"""The picture is a PNG that shows every panel."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.telemetry.metrics import CHARTS, tag
from lzero_kv.telemetry.plot import COLUMNS, LINES, constant_charts, plot_run
from lzero_kv.telemetry.read import RunLog, read_run

from .driving import write_experiment


def panels_with(picture: np.ndarray, pool: str, panels: int) -> int:
    """How many of the picture's fields, two in each row, hold the colour of a pool's line."""
    near = np.abs(picture[:, :, :3] - np.array(to_rgb(LINES[pool][0]))).max(axis=2) < 0.05
    fields = [
        field
        for band in np.array_split(near, -(-panels // COLUMNS))
        for field in np.array_split(band, COLUMNS, axis=1)
    ]
    return sum(bool(field.sum() > 20) for field in fields)


@pytest.mark.parametrize('reanalysis', [False, True])
def test_every_panel_that_moves_shows_every_pool(tmp_path: Path, reanalysis: bool) -> None:
    run = read_run(write_experiment(tmp_path, reanalysis=reanalysis))
    still = constant_charts(run)
    drawn = [chart for chart in CHARTS if chart.heading not in still]
    path = plot_run(run, tmp_path / 'plot.png')
    assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    picture = matplotlib.image.imread(path)
    panels = len(drawn) + 1  # environment steps per second, of no pool
    assert picture.shape[0] > 200 * panels / COLUMNS
    assert picture.shape[1] > 900
    pools = ('roots', 'nodes', 'reanalysis') if reanalysis else ('roots', 'nodes')
    assert {pool: panels_with(picture, pool, panels) for pool in pools} == dict.fromkeys(pools, len(drawn))
    assert len(drawn) > 3


def write_lines(folder: Path, **lines: dict[str, list[float]]) -> RunLog:
    """A log of metrics: pool -> values, ten steps apart."""
    with SummaryWriter(str(folder)) as writer:
        for metric, pools in lines.items():
            for pool, values in pools.items():
                for point, value in enumerate(values):
                    writer.add_scalar(tag(pool, metric), value, 10 * point)
    return read_run(folder)


def test_panels_that_never_move_are_named_with_their_values(tmp_path: Path) -> None:
    run = write_lines(
        tmp_path,
        hit_rate={'roots': [1.0, 1.0], 'nodes': [0.5, 0.25]},
        evictions={'roots': [0.0, 0.0], 'nodes': [0.0, 0.0]},
        bytes={'roots': [1024.0, 1024.0], 'total': [3072.0, 3072.0]},
    )
    assert constant_charts(run) == {
        'memory in bytes': 'roots 1.0 KiB, total 3.0 KiB',
        'evictions, entries since the previous point': '0',
    }
    height = matplotlib.image.imread(plot_run(run, tmp_path / 'plot.png')).shape[0]
    assert height < 400  # one panel


def test_a_single_point_is_drawn_and_not_constant(tmp_path: Path) -> None:
    run = write_lines(tmp_path, evictions={'nodes': [0.0]})
    assert constant_charts(run) == {}
    picture = matplotlib.image.imread(plot_run(run, tmp_path / 'plot.png'))
    assert panels_with(picture, 'nodes', 1) >= 1


def test_impossible_files_are_refused(tmp_path: Path) -> None:
    run = read_run(write_experiment(tmp_path, points=1))
    with pytest.raises(ValueError, match=r'must be a \.png file, got plot\.pdf; write for example plot\.png'):
        plot_run(run, Path('plot.pdf'))
    with pytest.raises(
        ValueError, match=r'cannot write the plot to .*: No such file or directory; choose another'
    ):
        plot_run(run, tmp_path / 'missing' / 'plot.png')
