"""The sweep changes what it says, and only that; pictures are written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import pytest
from cache_growth import BASE, SIZES, Size, family_of
from measuring.contestants import contestant
from measuring.plots import growth_plot, profile_plot
from measuring.tables import PARTS

from testing.models import world_model_of

IN_THE_MODEL = {
    'layers': lambda policy: len(world_model_of(policy).transformer.blocks),
    'environments': lambda policy: policy._cfg.collector_env_num,
    'simulations': lambda policy: policy._mcts_collect._cfg.num_simulations,
    'context': lambda policy: world_model_of(policy).context_length,
    'pool': lambda policy: world_model_of(policy).kv_cache_manager.recur_pool.pool_size,
}


@pytest.mark.parametrize('size', SIZES)
def test_each_value_changes_one_size(size: Size) -> None:
    for value in SIZES[size]:
        changed = {name for name, of in asdict(family_of(size, value)).items() if of != asdict(BASE)[name]}
        assert len(changed) <= 1


@pytest.mark.parametrize('size', SIZES)
def test_the_largest_of_each_size_is_built_and_plays(size: Size) -> None:
    value = SIZES[size][-1]
    pool = dict(recurrent_slots=value) if size == 'pool' else {}
    player = contestant(family_of(size, value), 'rebuild', **pool)
    simulations = IN_THE_MODEL['simulations'](player.policy)
    player.simulations(1)
    assert len(player.episodes.step()) == family_of(size, value).collectors
    player.simulations(simulations)
    assert IN_THE_MODEL[size](player.policy) == value


def test_the_pictures_are_written_and_small(tmp_path: Path) -> None:
    names = ('stock', 'rebuild', 'shift', 'another', 'floor')
    found = {
        size: {
            value: {name: {'simulation_ms': value * (1 + number)} for number, name in enumerate(names)}
            for value in values
        }
        for size, values in SIZES.items()
    }
    parts = {name: dict.fromkeys(PARTS, 1.0 + number) for number, name in enumerate(names)}
    growth_plot(found, tmp_path / 'growth.png')
    profile_plot({'cartpole': parts, 'memory': parts}, tmp_path / 'profile.png')
    for file in tmp_path.iterdir():
        assert file.stat().st_size < 200_000
        image = matplotlib.image.imread(file)
        assert image.shape[1] > 900
        assert image[..., :3].std() > 0.05  # not an empty page


def test_the_pictures_of_the_docs_are_small() -> None:
    folder = Path(__file__).resolve().parents[2] / 'docs' / 'images'
    for name in ('cache_growth.png', 'step_profile.png'):
        assert (folder / name).stat().st_size < 200_000
