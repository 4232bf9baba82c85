"""The picture is a PNG that shows every panel."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from torch.utils.tensorboard import SummaryWriter

from lzero_kv.telemetry.metrics import CHARTS, Axis, tag
from lzero_kv.telemetry.plot import LINES, plot_run
from lzero_kv.telemetry.read import read_run

from .driving import write_experiment


def panels_with(picture: np.ndarray, pool: str) -> int:
    """How many of the picture's horizontal bands, one per panel, hold the colour of a pool's line."""
    near = np.abs(picture[:, :, :3] - np.array(to_rgb(LINES[pool][0]))).max(axis=2) < 0.05
    return sum(bool(band.sum() > 20) for band in np.array_split(near, len(CHARTS)))


@pytest.mark.parametrize('reanalysis', [False, True])
def test_every_panel_shows_every_pool(tmp_path: Path, reanalysis: bool) -> None:
    run = read_run(write_experiment(tmp_path, reanalysis=reanalysis))
    path = plot_run(run, tmp_path / 'plot.png')
    assert path.read_bytes().startswith(b'\x89PNG\r\n\x1a\n')
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 1000
    assert picture.shape[1] > 900
    assert {pool: panels_with(picture, pool) for pool in LINES} == {
        'roots': len(CHARTS),
        'nodes': len(CHARTS),
        'reanalysis': len(CHARTS) if reanalysis else 0,
        'total': 1,
    }


def test_a_single_point_and_a_missing_metric_can_be_drawn(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar(tag(Axis.ENV_STEP, 'nodes', 'evictions'), 0, 10)
    picture = matplotlib.image.imread(plot_run(read_run(tmp_path), tmp_path / 'plot.png'))
    assert panels_with(picture, 'nodes') == 1


def test_impossible_files_are_refused(tmp_path: Path) -> None:
    run = read_run(write_experiment(tmp_path, points=1))
    with pytest.raises(ValueError, match=r'must be a \.png file, got plot\.pdf; write for example plot\.png'):
        plot_run(run, Path('plot.pdf'))
    with pytest.raises(
        ValueError, match=r'cannot write the plot to .*: No such file or directory; choose another'
    ):
        plot_run(run, tmp_path / 'missing' / 'plot.png')
