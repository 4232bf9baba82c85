"""With the host's padding, and where the stock cache is right, searches equal stock's to the last bit."""

from __future__ import annotations

from typing import Any

import pytest

from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, world_model_of

from .plays import assert_same_play

ENVIRONMENTS = 3


def build(family: str, kv: bool) -> Any:
    return make_policy(
        family, kv=kv, kv_cache=dict(padding='host') if kv else None, num_simulations=50,
        collector_env_num=ENVIRONMENTS, evaluator_env_num=2,
    )  # fmt: skip


@pytest.mark.parametrize('family', ['tiny', 'lunarlander_continuous'])
def test_searches_equal_stock_to_the_last_bit(family: str) -> None:
    stock, managed = build(family, kv=False), build(family, kv=True)
    # Stock computes its position correction before it initialises its weights; training refreshes it later.
    world_model_of(stock).precompute_pos_emb_diff_kv()
    steps = 4  # the window of eight tokens is full after three
    timesteps = FAMILIES[family].timesteps
    expected, played = (
        Episodes(policy, range(ENVIRONMENTS), timesteps=timesteps).run(steps) for policy in (stock, managed)
    )
    assert assert_same_play(played, expected, tolerance=0.0) == 0.0


def test_rotary_searches_equal_stock_once_its_positions_are_right() -> None:
    """Stock puts the first simulated step two positions too far: it counts the depth of the child, not of the
    parent."""
    stock, managed = build('cartpole', kv=False), build('cartpole', kv=True)
    world_model = world_model_of(stock)
    infer = world_model.forward_recurrent_inference

    def with_depth_of_the_parent(history: Any, simulation: int = 0, depth: Any = (), start: Any = 0) -> Any:
        return infer(history, simulation, [steps - 1 for steps in depth], start)

    world_model.forward_recurrent_inference = with_depth_of_the_parent
    expected, played = (Episodes(policy, range(ENVIRONMENTS)).run(4) for policy in (stock, managed))
    assert assert_same_play(played, expected, tolerance=0.0) == 0.0


def test_masked_padding_answers_differently_where_rows_differ_in_length() -> None:
    """The comparison above can fail: stock's visible zeros change answers as soon as rows differ in
    length."""
    stock = build('tiny', kv=False)
    world_model_of(stock).precompute_pos_emb_diff_kv()
    masked = make_policy(
        'tiny', kv=True, kv_cache=dict(window='shift'), num_simulations=50, collector_env_num=ENVIRONMENTS
    )
    expected, played = (Episodes(policy, range(ENVIRONMENTS)).run(1) for policy in (stock, masked))
    with pytest.raises(AssertionError):
        assert_same_play(played, expected, tolerance=1e-3)
