"""Contestants of the benchmark that play LightZero's git main: one model, three caches."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import lzero
import pytest
import torch
from measuring.rounds import require_equal_values
from measuring.upstream import CACHES, Checkout, UpstreamPlayer

from testing.families import FAMILIES
from testing.models import collect_model, make_policy

FAMILY = replace(FAMILIES['tiny'], simulations=6, collectors=3)
HERE = Checkout(Path(lzero.__file__).parents[1], Path(sys.executable))


def released_weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Those of a model with the release's heads, under the release's names."""
    from lzero.model.unizero_world_models.world_model import WorldModel
    from measuring.upstream_worker import RENAMED, SIMNORM, make_as_released

    monkeypatch.setattr(sys, 'path', list(sys.path))
    for name in ('_create_head', '_create_head_for_latent'):
        monkeypatch.setattr(WorldModel, name, getattr(WorldModel, name))
    make_as_released()
    weights = collect_model(make_policy(FAMILY, kv=False, world_model=SIMNORM)).state_dict()
    for released, branch in RENAMED:
        weights = {name.replace(branch, released): tensor for name, tensor in weights.items()}
    return weights


def test_contestants_on_main_have_one_model_and_three_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = released_weights(monkeypatch)
    with ExitStack() as stack:
        players = {
            name: stack.enter_context(closing(UpstreamPlayer(HERE, name, FAMILY, weights))) for name in CACHES
        }
        values = {name: player.begin() for name, player in players.items()}
        require_equal_values({'stock': values['upstream'], **values})
        for player in players.values():
            player.warm_up(1)
        hits = {
            name: [rate for rate in player.counts() if 'hit_rate' in rate] for name, player in players.items()
        }
    assert hits == {
        'upstream': [],
        'upstream flag': [],
        'upstream rebuild': ['roots_hit_rate', 'nodes_hit_rate'],
    }
