"""A long training of Pong on one core, flag off and on in turn, in pieces that resume.

    python studies/planning/long_pong.py --minutes 480
    python studies/planning/long_pong.py --minutes 0

Each call goes on where the last one stopped; the second only draws what there is. A piece is one collection
of four whole episodes and the learning after it, in a process of its own, which restores model, target model,
optimizer, replay buffer, environment steps and training iterations, and saves all of it again. Random numbers
begin anew in each piece, with its number as the seed. A piece that was stopped is lost, those before it are
not. ``rows.jsonl`` has a row for each piece, ``returns.png`` the returns.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import tyro

from lzero_kv.cli.comparison import (
    LEARNING,
    PLUGIN,
    REST,
    ROOTS,
    SAMPLING,
    SEARCH,
    STOCK,
    WHOLE,
    by_collection,
    seconds,
)
from lzero_kv.cli.console import show_line, show_table
from lzero_kv.cli.training import UNBOUNDED, Hear, Progress, Request, answer_of, around, told_versions
from lzero_kv.cli.training_call import TrainingCall, alone
from lzero_kv.sweep.rows import Row
from lzero_kv.sweep.sweep import Sweep, claimed
from lzero_kv.telemetry.table import text_table
from studies.planning import pong_env

ARMS = {STOCK: '#999999', PLUGIN: '#0072b2'}
"""Colours of the two curves."""
MODULE = 'studies.planning.long_pong'
PICTURE = 'returns.png'
SETTINGS = dict(
    env=dict(max_episode_steps=10_000),
    sizes=dict(collector_env_num=4, evaluator_env_num=1, env_manager='base', replay_ratio=1, batch_size=64),
    policy=dict(
        learning_rate=1e-3,
        value_loss_weight=1.0,
        game_segment_length=200,
        replay_buffer_size=200_000,
        td_steps=10,
        discount_factor=0.95,
    ),
)
"""What differs from this project's CartPole config, beside the environment."""


@dataclass(frozen=True)
class Piece:
    """A document of the sweep: one collection of an arm (``task``) and its learning."""

    task: str
    number: int
    size: float = 1

    @property
    def id(self) -> str:
        """Its number, from 0 on."""
        return f'piece {self.number}'


def main(minutes: float = 30, out: Path = Path('data_lz/long_pong')) -> None:
    """Train both arms, piece by piece, then draw.

    Args:
        minutes: on the wall, after which no other pair of pieces begins.
        out: the folder of rows, states, logs and the picture.
    """
    sweep, end = Sweep(out, dict(settings=SETTINGS, methods=['training'])), time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        number = min(sum(row['task'] == arm for row in sweep.rows) for arm in ARMS)
        sweep.run([Piece(arm, number) for arm in ARMS], partial(_measured, out=out))
    if sweep.rows:
        title = 'Pong; parts: processor seconds for 1,000 environment steps'
        show_table(text_table(cells(sweep.rows), title))
        show_line(f'picture: {draw(sweep.rows, out / PICTURE)}')


def _measured(piece: Piece, out: Path) -> list[Row]:
    """The row of a piece, trained by a process of its own."""
    arguments = (json.dumps(SETTINGS),)
    request = Request('', arguments, piece.task, env_steps=1, folder=str(out), seed=piece.number)
    row = answer_of(MODULE, request, out / f'{piece.task}.log', lambda numbers: None)
    done = f'{row["env_steps"]:,} environment steps, {row["iterations"]:,} iterations'
    show_line(f'{piece.task}, {piece.id}: {done}, returns {[value for _, value in row["returns"]]}')
    return [row]


def train(request: Request, hear: Hear) -> Row:
    """Train one piece, the ``seed``-th of the arm ``name``, and save the state; or find that it is saved.

    Raises:
        ValueError: the saved state is of another piece than the one before.
    """
    arm, number, out = request.name, request.seed, Path(request.folder)
    with claimed(out / f'{arm}.lock', 0, wait=True):  # the process of a call that died may still train
        state = State.load(out / f'{arm}.pt')
        if state.pieces == number + 1:
            return state.row
        if state.pieces != number:
            raise ValueError(
                f'{out}: the state of {arm} is of {state.pieces} pieces, its rows are of {number}; restore '
                f'one of the two files, or begin anew with another --out'
            )
        new = state.trained(request)
        new.save(out / f'{arm}.pt')
    return new.row


def call_of(request: Request) -> TrainingCall:
    """The training of a piece, as LightZero is called."""
    from lzero_kv.configs.cartpole_unizero_kv_config import FULL, make_config

    settings = json.loads(request.arguments[0])
    main, create = make_config('CartPole-v0', 0, size=type(FULL)(FULL | settings['sizes']))
    main.env.update(settings['env'])
    main.policy.update(settings['policy'])
    main.policy.model.update(
        observation_shape=pong_env.PongPositionsEnv.size, action_space_size=len(pong_env.ACTIONS)
    )
    main.policy.model.world_model_cfg.action_space_size = len(pong_env.ACTIONS)
    create.env.update(type='pong_positions', import_names=['studies.planning.pong_env'])
    folder = Path(request.folder) / 'training' / f'{request.name}_{request.seed}'
    return alone(TrainingCall('train_unizero', main, create), folder, flag=request.name == PLUGIN)[0]


@dataclass(frozen=True)
class State:
    """An arm between two pieces.

    Attributes:
        pieces: how many were trained.
        steps, iterations: environment steps and training iterations so far.
        policy: model, target model and optimizer as LightZero saves them; None before the first piece.
        buffer: the replay buffer's attributes.
        row: of the last piece.
    """

    pieces: int = 0
    steps: int = 0
    iterations: int = 0
    policy: dict[str, Any] | None = None
    buffer: dict[str, Any] | None = None
    row: Row | None = None

    @classmethod
    def load(cls, path: Path) -> State:
        """The saved state, or a new one. The file is one of this study's: it is unpickled."""
        import torch

        if not path.exists():
            return cls()
        state = cls(**torch.load(path, weights_only=False))
        for segment in (state.buffer or {}).get('game_segment_buffer', ()):
            held = vars(segment)
            # unpickled arrays are views, which have a negative size for the host's log of the buffer's memory
            held.update({name: found.copy() for name, found in held.items() if isinstance(found, np.ndarray)})
        return state

    def save(self, path: Path) -> None:
        """Replace the saved state; a process that dies on the way leaves the old one."""
        import torch

        beside = path.with_suffix('.part')
        with beside.open('wb') as file:
            torch.save(vars(self), file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    def trained(self, request: Request) -> State:
        """The state after one more collection and its learning."""
        from lzero_kv.cli.compare import Clock, peak_bytes, watched

        call = call_of(request)
        progress = Progress(UNBOUNDED, evaluates=False)
        clock, returns = Clock(), []
        with self.restored() as buffers, watched(call, progress, clock, returns, []):
            call.run(seed=request.seed, max_env_step=self.steps + 1, max_train_iter=UNBOUNDED)
        steps, iterations = self.steps + progress.collected, self.iterations + progress.iterations
        row = {
            'task': request.name,
            'document': Piece(request.name, request.seed).id,
            'method': 'training',
            'env_steps': steps,
            'iterations': iterations,
            'processor': dict(clock.processor),
            'wall': dict(clock.wall),
            'peak_bytes': peak_bytes(),
            'returns': [(steps, value) for _, value in returns],
            'versions': told_versions(),
        }
        policy, buffer = progress.policy._state_dict_learn(), held_by(buffers[-1])
        return State(self.pieces + 1, steps, iterations, policy, buffer, row)

    @contextmanager
    def restored(self) -> Iterator[list[Any]]:
        """Within the block a training of the host begins with this state; yields its replay buffers."""
        from ding.worker import BaseLearner
        from lzero.mcts import UniZeroGameBuffer
        from lzero.worker import MuZeroCollector

        buffers: list[Any] = []

        def learner(original: Any, made: Any, config: Any, mode: Any, *args: Any, **kwargs: Any) -> None:
            original(made, config, mode, *args, **kwargs)
            made._last_iter.update(self.iterations)
            if self.policy is not None:
                mode.load_state_dict(self.policy)
                # the host computes keys' differences of positions from the weights after each learning
                mode.load_state_dict.__self__.recompute_pos_emb_diff_and_clear_cache()

        def collector(original: Any, made: Any, *args: Any, **kwargs: Any) -> None:
            original(made, *args, **kwargs)
            made._total_envstep_count = self.steps

        def buffer(original: Any, made: Any, *args: Any, **kwargs: Any) -> None:
            original(made, *args, **kwargs)
            if self.buffer is not None:
                vars(made).update(self.buffer)
            buffers.append(made)

        places = {
            BaseLearner: learner,
            MuZeroCollector: collector,
            UniZeroGameBuffer: buffer,
        }
        with ExitStack() as stack:
            for owner, call in places.items():
                stack.enter_context(around(owner, '__init__', call))
            yield buffers


def held_by(buffer: Any) -> dict[str, Any]:
    """All that a replay buffer holds but its config, and gym's generators, which cannot be unpickled."""
    held = {name: value for name, value in vars(buffer).items() if name != '_cfg'}
    return held | dict(game_segment_buffer=list(map(_without_generator, buffer.game_segment_buffer)))


def _without_generator(segment: Any) -> Any:
    changed = copy.copy(segment)
    changed.action_space = copy.copy(segment.action_space)
    changed.action_space._np_random = None
    return changed


def of_arm(rows: Sequence[Row], arm: str) -> Row:
    """All pieces of an arm as one training: processor seconds and returns of all, steps of the last."""
    own = [row for row in rows if row['task'] == arm]
    spent: Counter[str] = Counter()
    for row in own:
        spent.update(row['processor'])
    returns = [found for row in own for found in row['returns']]
    return own[-1] | dict(processor=dict(spent), returns=returns)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Table of what each arm did so far, with its processor seconds for 1,000 environment steps by part."""
    trained = [of_arm(rows, arm) for arm in ARMS if any(row['task'] == arm for row in rows)]
    lines = {'': [row['task'] for row in trained]}
    lines['environment steps'] = [f'{row["env_steps"]:,}' for row in trained]
    lines['training iterations'] = [f'{row["iterations"]:,}' for row in trained]
    lines['processor hours'] = [f'{row["processor"][WHOLE] / 3600:.2f}' for row in trained]
    for part in (SEARCH, ROOTS, SAMPLING, LEARNING, REST, WHOLE):
        lines[part] = [f'{seconds("processor", part, row):.1f}' for row in trained]
    returns = [by_collection(row)[1] for row in trained]
    lines['collections of four episodes'] = [str(len(own)) for own in returns]
    lines['mean return of the first'] = [f'{own[0]:.1f}' for own in returns]
    lines['mean return of the last'] = [f'{own[-1]:.1f}' for own in returns]
    return [[name, *shown] for name, shown in lines.items()]


def draw(rows: Sequence[Row], path: Path) -> Path:
    """The picture: return against environment steps, and against processor hours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout='constrained')
    FigureCanvasAgg(figure)
    by_steps, by_hours = figure.subplots(1, 2, sharey=True)
    for arm, colour in ARMS.items():
        own = [row for row in rows if row['task'] == arm]
        if not own:
            continue
        steps, values = by_collection(of_arm(rows, arm))
        hours = np.cumsum([row['processor'][WHOLE] / 3600 for row in own])
        spent = np.interp(steps, [0, *(row['env_steps'] for row in own)], [0, *hours])
        for axes, places in ((by_steps, steps), (by_hours, spent)):
            axes.plot(places, values, color=colour, marker='.', label=arm)
    by_steps.set(xlabel='environment steps', ylabel='mean return of a collection (4 episodes)')
    by_hours.set(xlabel='processor hours')
    by_steps.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=90)
    return path


if __name__ == '__main__':
    tyro.cli(main)
