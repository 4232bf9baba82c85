"""The long training of Pong: pieces of a tiny model that go on where the last one stopped, off and on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.cli.comparison import PLUGIN, STOCK
from lzero_kv.cli.training import Request
from lzero_kv.sweep.rows import read_rows
from studies.planning import long_pong as study
from studies.planning import pong_env
from studies.planning.long_pong import State

SIZES = dict(collector_env_num=2, num_simulations=3, batch_size=4, embed_dim=24, replay_ratio=0.06)
SETTINGS = dict(
    env=dict(max_episode_steps=26),
    sizes=study.SETTINGS['sizes'] | SIZES,
    policy=study.SETTINGS['policy'] | dict(learning_rate=2e-3, replay_buffer_size=500),
)
A_MOMENT = 1e-6
"""Minutes: one pair of pieces, then no other."""


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal to the last bit, with what they consist of."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray | torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    return same(vars(one), vars(other)) if type(one).__module__.startswith('lzero') else one == other


@dataclass(frozen=True)
class Pong:
    """Two calls of a pair of pieces each: the states after each by arm, the folder and what was printed."""

    before: dict[str, State]
    after: dict[str, State]
    out: Path
    said: str


@pytest.fixture(scope='module')
def pong(warm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pong]:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.chdir(tmp_path_factory.mktemp('pong'))
        patch.setattr(sys, 'executable', warm_python)
        patch.setattr(study, 'SETTINGS', SETTINGS)
        states = []
        for _ in range(2):
            study.main(A_MOMENT, Path('out'))
            states.append({arm: State.load(Path('out', f'{arm}.pt')) for arm in study.ARMS})
        yield Pong(*states, Path('out').resolve(), said.getvalue())


def test_a_training_goes_on_where_the_last_call_stopped(pong: Pong) -> None:
    rows = read_rows(pong.out)[1]
    assert [(row['task'], row['document']) for row in rows] == [
        (arm, f'piece {number}') for number in range(2) for arm in (STOCK, PLUGIN)
    ]
    for arm in study.ARMS:
        before, after, own = pong.before[arm], pong.after[arm], [row for row in rows if row['task'] == arm]
        assert [before.steps, after.steps] == [52, 104] == [row['env_steps'] for row in own]
        assert [before.iterations, after.iterations] == [3, 6] == [row['iterations'] for row in own]
        assert [[step for step, _ in row['returns']] for row in own] == [[52, 52], [104, 104]]
        # the first episodes are there as they were; the second ones, of another seed, stand behind them
        held, later = (state.buffer['game_segment_buffer'] for state in (before, after))
        assert len(held) == 2 and len(later) == 4 and same(held, later[:2])
        assert not any(same(one.obs_segment, other.obs_segment) for one in held for other in later[2:])
        moments = after.policy['optimizer_world_model']['state'].values()
        assert {int(moment['step']) for moment in moments} == {after.iterations}
        assert ('caches of lzero_kv' in (pong.out / f'{arm}.log').read_text()) == (arm == PLUGIN)
    assert (pong.out / study.PICTURE).read_bytes().startswith(b'\x89PNG')
    assert 'lzero_kv, piece 1: 104 environment steps, 6 iterations, returns [' in pong.said


def test_the_row_of_a_process_that_died_before_it_wrote_one_is_in_the_state(pong: Pong) -> None:
    row = study.train(request(PLUGIN, 1, pong.out), print)
    assert json.loads(json.dumps(row)) == read_rows(pong.out)[1][-1]
    assert State.load(pong.out / f'{PLUGIN}.pt').pieces == 2


def request(arm: str, number: int, out: Path) -> Request:
    return Request('', (json.dumps(SETTINGS),), arm, 1, str(out), number)


def test_a_piece_begins_with_all_that_the_last_one_ended_with(pong: Pong, tmp_path: Path) -> None:
    from ding.config import compile_config
    from ding.policy import create_policy
    from ding.worker import BaseLearner
    from lzero.mcts import UniZeroGameBuffer

    call = study.call_of(request(PLUGIN, 2, tmp_path))
    call.config['policy'].update(device='cpu', cuda=False)
    config = compile_config(call.config, seed=5, auto=True, create_cfg=call.create_config, save_cfg=False)
    state = pong.after[PLUGIN]
    with state.restored() as buffers:
        policy = create_policy(config.policy, enable_field=['learn', 'collect', 'eval'])
        learner = BaseLearner(config.policy.learn.learner, policy.learn_mode, exp_name=str(tmp_path / 'log'))
        buffer = UniZeroGameBuffer(config.policy)
    assert same(policy.learn_mode.state_dict(), state.policy)
    assert learner.train_iter == state.iterations == 6 and buffers == [buffer]
    assert same({name: value for name, value in vars(buffer).items() if name != '_cfg'}, state.buffer)
    assert buffer.get_num_of_transitions() == 104


def pixels(seen: np.ndarray) -> np.ndarray:
    """The four places and the difference, of the longest of the four waves; each wave tells the same."""
    angles = np.arctan2(seen[:20], seen[20:40]).reshape(5, 4)
    found = angles[:, 0] * 512 / (2 * np.pi)
    np.testing.assert_allclose(np.exp(1j * angles), np.exp(1j * np.outer(found, pong_env.WAVES)), atol=1e-4)
    return found


def test_the_emulator_tells_where_the_ball_is_and_pays_the_points() -> None:
    config = dict(max_episode_steps=2_000)
    environments = [pong_env.PongPositionsEnv(config), pong_env.PongPositionsEnv(config)]
    for environment in environments:
        environment.seed(5)
    seen, actions = [one.reset() for one in environments], np.random.default_rng(3)
    before, rewards, moved = seen[0]['observation'], [], []
    for step in range(1, 2_001):
        action = int(actions.integers(len(pong_env.ACTIONS)))
        found = [one.step(action) for one in environments]
        assert all(np.array_equal(found[0].obs['observation'], one.obs['observation']) for one in found)
        now = found[0].obs['observation']
        assert now.dtype == np.float32 and now.shape == (44,) and found[0].obs['timestep'] == step
        places = pixels(now)
        np.testing.assert_allclose(
            now[40:], np.clip((places[:4] - pixels(before)[:4]) / 16, -3, 3), atol=1e-3
        )
        assert places[4] == pytest.approx(places[3] - places[0], abs=1e-3)
        moved.append(now[40])
        rewards.append(float(found[0].reward))
        before = now
        if found[0].done:
            break
    assert rewards.count(-1.0) == 21 and set(rewards) <= {-1.0, 0.0, 1.0}
    assert found[0].info['eval_episode_return'] == sum(rewards)
    assert min(moved) < 0 < max(moved)  # the paddle goes both ways


def test_a_process_that_dies_while_it_saves_leaves_the_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'stock.pt'
    State(pieces=1, steps=7).save(path)

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', die)
    with pytest.raises(KeyboardInterrupt):
        State(pieces=2, steps=9).save(path)
    assert State.load(path) == State(pieces=1, steps=7)


def test_rows_of_other_pieces_than_the_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='the state of stock is of 0 pieces, its rows are of 3; restore'):
        study.train(request(STOCK, 3, tmp_path), print)
    assert not (tmp_path / 'stock.pt').exists()
