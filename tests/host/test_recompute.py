"""Mode ``recompute``: every answer against a computation without a cache, on any host that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lzero_kv.config import validation_mode_of
from lzero_kv.lightzero.host import is_release
from lzero_kv.validation.findings import ValidationError, load_finding, recomputed
from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, world_model_of

from .planted import PLANTS
from .validated import assert_accounted, counters_of, validated_policy

LENGTHS = {1: [3], 2: [4, 2]}


def play(policy: Any, family: str, steps: int = 7) -> None:
    """Episodes of different lengths, the third environment missing every third step; full windows at the
    end."""
    everyone = set(range(3))
    ready = [everyone - {2} if step % 3 == 2 else everyone for step in range(steps)]
    timesteps = FAMILIES[family].timesteps
    Episodes(policy, range(3), lengths=LENGTHS, record=False, timesteps=timesteps).run(ready)


@pytest.mark.parametrize('family', ['atari', 'cartpole', 'lunarlander_continuous'])
def test_every_answer_is_compared_and_right(family: str, tmp_path: Path) -> None:
    policy = validated_policy('recompute', tmp_path, family=family)
    play(policy, family)
    counters = counters_of(policy)
    assert world_model_of(policy).stock is None and not list(tmp_path.iterdir())
    assert (counters.searches, counters.validated) == (7, 7)
    assert counters.roots.compared == counters.roots.equal == 19  # three rows, two of them without the third
    assert counters.nodes.compared == counters.nodes.equal == 4 * 19
    assert 0 < counters.roots.largest_cache < 1e-3
    assert_accounted(counters.total)


def test_a_part_of_the_searches_is_compared(tmp_path: Path) -> None:
    policy = validated_policy('recompute', tmp_path, kv_cache=dict(validation_rate=0.5))
    play(policy, 'tiny', steps=6)
    counters = counters_of(policy)
    assert (counters.searches, counters.validated) == (6, 3)
    assert counters.roots.compared == 16 and 0 < counters.nodes.compared < 4 * 16


@pytest.mark.parametrize('name', ['another node', 'exchanged at roots', 'rotary positions off'])
def test_a_planted_fault_is_named_and_its_file_holds_the_truth(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant = PLANTS[name]
    plant.plant(monkeypatch)
    policy = validated_policy('recompute', tmp_path, family=plant.family, num_simulations=6)
    with pytest.raises(ValidationError) as raised:
        play(policy, plant.family, steps=4)
    finding = raised.value.finding
    assert (finding.fault, finding.kind) == (plant.fault, plant.kind)
    assert finding.stock is None and finding.causes == ()
    read = load_finding(finding.file)
    truth = read.tensors['truth']
    for kind, tensor in recomputed(read).items():
        if truth[kind] is not None:
            torch.testing.assert_close(tensor, truth[kind], atol=1e-5, rtol=1e-4)


def test_modes_are_told_apart() -> None:
    assert validation_mode_of({'cache_validation_mode': 'recompute'}) == 'recompute'
    with pytest.raises(ValueError, match=r"expected False, 'recompute'.*'store'.*'model'"):
        validation_mode_of({'cache_validation_mode': 'recomputed'})


@pytest.mark.skipif(is_release(), reason='the release has the caches that these modes compare with')
@pytest.mark.parametrize('mode', [True, 'store', 'model'])
def test_modes_with_the_caches_of_the_release_are_refused(mode: Any) -> None:
    with pytest.raises(
        ValueError, match=r"caches of LightZero 0\.2\.0.*write cache_validation_mode='recompute'"
    ):
        make_policy('tiny', kv=True, world_model=dict(cache_validation_mode=mode))
