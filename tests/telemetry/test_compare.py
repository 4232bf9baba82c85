"""`lzero-kv compare`: real CartPole with the flag off and on, what stays after a kill, what is refused."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from lzero_kv.cli import main
from lzero_kv.cli.compare import PICTURE, Clock, watched
from lzero_kv.cli.comparison import (
    EVALUATION,
    LEARNING,
    PARTS,
    PLUGIN,
    REST,
    ROOTS,
    SAMPLING,
    SEARCH,
    STOCK,
    WHOLE,
    Comparison,
    by_collection,
    mean_return,
    seconds,
)
from lzero_kv.cli.training import Progress, Request
from lzero_kv.cli.training_call import alone, training_call
from lzero_kv.lightzero.policy import KVPolicy
from lzero_kv.sweep.rows import ROWS, Row, read_rows

ROOT = Path(__file__).resolve().parents[2]
CARTPOLE = ROOT / 'configs' / 'cartpole_unizero_kv_config.py'


def test_a_comparison_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm_python: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'executable', warm_python)

    def compare(env_steps: int) -> int:
        given = [str(CARTPOLE), '--env-steps', str(env_steps), '--seeds', '1', '--out', 'both']
        return main(['compare', *given, '--', '--smoke'])

    assert compare(11) == 0, capsys.readouterr().err
    header, rows = read_rows(Path('both'))
    assert (header['arguments'], header['env_steps']) == (['--smoke'], 11)
    assert [row['task'] for row in rows] == [STOCK, PLUGIN]
    for row in rows:
        assert row['env_steps'] >= 11 and row['iterations'] > 0 and row['peak_bytes'] > 2**27
        assert len(row['returns']) == 2  # one collection of two environments
        assert sum(value for _, value in row['returns']) == row['env_steps']  # CartPole pays 1 for each step
        for clock in ('processor', 'wall'):
            assert row[clock].keys() == {*PARTS, WHOLE} - {EVALUATION}
            assert 0 < sum(row[clock].values()) - row[clock][WHOLE] < row[clock][WHOLE]
    assert Path('both', PICTURE).read_bytes().startswith(b'\x89PNG')
    said = capsys.readouterr().out
    assert 'With the flag, search took ' in said and '(1 seed, ' in said

    # a process that died while it wrote the second training
    file = Path('both', ROWS)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b''.join(lines[:2]) + lines[2][:20])
    assert compare(11) == 0
    assert capsys.readouterr().out.startswith(
        'lzero_kv, seed 0: training for 11 environment steps\nProcessor'
    )
    assert read_rows(Path('both'))[1][0] == rows[0]
    assert compare(12) == 1
    assert 'env_steps: 11 in the file, 12 now' in capsys.readouterr().err


def test_a_training_ends_where_an_evaluation_reaches_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm_python: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'executable', warm_python)
    given = [str(CARTPOLE), '--env-steps', '900', '--seeds', '1', '--until', '2', '--out', 'both']
    assert main(['compare', *given, '--', '--smoke']) == 0, capsys.readouterr().err
    for row in read_rows(Path('both'))[1]:
        assert (row['until'], row['reached']) == (2.0, True)  # an episode of CartPole pays 8 at least
        assert len(row['returns']) == 2 and row['env_steps'] < 200  # one collection, and the training ended
        assert all(row['processor'][part] > 0 for part in PARTS)
        assert sum(row['processor'][part] for part in PARTS) < row['processor'][WHOLE]
    said = ' '.join(capsys.readouterr().out.split())
    assert 'training for 900 environment steps, or until an evaluation returns 2 lzero_kv, seed 0' in said
    assert (
        'environment steps until then or the end' in said and '│ trainings that reached 2 │ 1 │ 1 │' in said
    )
    assert '1 reached a return of 2 without the flag and 1 with it; until then or the end ' in said


NO_UNIZERO = 'from lzero.entry import train_muzero as t\nt([{}, dict(policy=dict(type="muzero"))], seed=1)\n'
CHANGED = """
import sys; sys.path.insert(0, {folder!r})
from cartpole_unizero_kv_config import make_config
from lzero.entry import train_unizero
main, create = make_config('CartPole-v0', 0, smoke=True)
{change}
train_unizero([main, create], seed=0)
"""


@pytest.mark.parametrize(
    ('text', 'options', 'message'),
    [
        (None, [], 'a.py is no file; give a config file that LightZero can run'),
        ('x = 1\n', ['--env-steps', '0'], '--env-steps: expected 1 or more, got 0'),
        ('x = 1\n', ['--seeds', '-1'], '--seeds: expected 1 or more, got -1'),
        ('x = 1\n', ['--until', 'nan'], '--until: expected a return, got nan'),
        ('x = 1\n', [], 'a.py ended without calling a training entry'),
        (NO_UNIZERO, [], "a.py calls train_muzero with the policy 'muzero', for which there is no plugin"),
        (
            'main.env.collector_env_num = 5',
            [],
            'a.py: the policy has room for 2: write policy.collector_env_num=5',
        ),
        ('main.policy.model.world_model_cfg.kv_cache = dict(polcy="lru")', [], 'did you mean'),
        ('main.policy.multi_gpu = True', [], 'multi_gpu=True; a comparison is of one process'),
        (
            'main.policy.model.pop("world_model_cfg")',
            [],
            'a.py: expected a dictionary policy.model.world_model_cfg, found None; write policy.model.world',
        ),
        (
            'create.policy.import_names = "lzero_kv.plugin"',
            [],
            "found 'lzero_kv.plugin'; write policy.import_names=['lzero.policy.unizero', 'lzero_kv.plugin']",
        ),
        (
            'main.own = 1; main = dict(main)',
            [],
            'which a dict has not; write main_config = EasyDict(main_conf',
        ),
        ('main.policy.model.world_model_cfg.num_heads = "2"', [], 'a.py: its values cannot be read: TypeEr'),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        whole = (
            CHANGED.format(folder=str(CARTPOLE.parent), change=text)
            if text.startswith(('main.', 'create.'))
            else text
        )
        Path('a.py').write_text(whole)
    assert main(['compare', 'a.py', '--out', 'both', *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith('lzero-kv: ') and error.count('\n') == 1
    assert message in error
    assert not Path('both').exists()


def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings answer at once; their names are returned."""
    asked = []

    def answer(module: str, request: Request, log: Path, hear: object) -> Row:
        asked.append(f'{request.name} {request.seed}')
        return {**row(request.name, request.seed, 5.0, []), 'method': 'training', 'until': None}

    monkeypatch.setattr(sys.modules['lzero_kv.cli.compare'], 'answer_of', answer)
    return asked


def test_a_comparison_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the place of the logs nor the text of an object in the config makes it another one."""
    text = 'lambda one: str(time.time_ns())'  # as an address, never twice the same
    change = f'import time; main.env.bonus = type("Bonus", (), dict(__repr__={text}))()'
    asked, config = answered(monkeypatch), tmp_path / 'a.py'
    config.write_text(CHANGED.format(folder=str(CARTPOLE.parent), change=change))
    for seeds in ('1', '2'):
        folder = tmp_path / seeds
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert main(['compare', str(config), '--seeds', seeds, '--out', str(tmp_path / 'both')]) == 0
    assert asked == ['stock 0', 'lzero_kv 0', 'lzero_kv 1', 'stock 1']


def test_a_config_that_was_changed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answered(monkeypatch)
    note = "note: the environments ran in the training's process: env_manager.type='base'"
    for kind in ('base', 'subprocess'):
        change = f'create.env_manager.type = {kind!r}'
        Path('a.py').write_text(CHANGED.format(folder=str(CARTPOLE.parent), change=change))
        assert main(['compare', 'a.py', '--seeds', '1', '--out', kind]) == 0
        assert (note in capsys.readouterr().out.splitlines()) == (kind == 'subprocess')


def test_reanalysis_of_the_whole_buffer_is_sampling() -> None:
    from lzero.mcts import SampledUniZeroGameBuffer, UniZeroGameBuffer

    call, _ = alone(training_call(CARTPOLE, ['--smoke']), Path('x'), flag=True)
    buffers, clock = (UniZeroGameBuffer, SampledUniZeroGameBuffer), Clock()
    changed = *buffers, KVPolicy
    before = [dict(vars(owner)) for owner in changed]
    with watched(call, Progress(1, evaluates=False), clock, [], []):
        for buffer in buffers:
            with pytest.raises(AttributeError):  # of a policy that is none
                buffer.reanalyze_buffer(object.__new__(buffer), 4, None)
            assert clock.wall.keys() == {SAMPLING}
            clock.wall.clear()
    assert [dict(vars(owner)) for owner in changed] == before


def row(arm: str, seed: int, search: float, returns: list[tuple[int, float]], device: str = 'cpu') -> Row:
    spent = {SEARCH: search, ROOTS: 2.0, SAMPLING: 3.0, LEARNING: 4.0, WHOLE: search + 14.0}
    wall = {name: 2 * value for name, value in spent.items()}
    named = {'task': arm, 'document': f'seed {seed}', 'method': 'training', 'seed': seed, 'device': device}
    return {
        **named,
        'env_steps': 500,
        'processor': spent,
        'wall': wall,
        'peak_bytes': 2**29,
        'returns': returns,
    }


def pairs(gain: float, device: str = 'cpu') -> Comparison:
    rows = [row(STOCK, seed, 20.0 + seed, [(240, 9.0), (500, 15.0 + seed)], device) for seed in range(7)]
    rows += [
        row(
            PLUGIN, seed, 10.0 + seed / 2, [(240, 9.0 + gain), (500, 15.0 + seed + gain * (seed % 2))], device
        )
        for seed in (6, 5, 4, 3, 2, 1, 0)
    ]
    return Comparison.of([*rows, row(STOCK, 8, 99.0, [])])


def test_pairs_are_by_seed_and_the_sentence_says_what_they_say() -> None:
    found = pairs(0.0)
    assert [one['seed'] for one in found.plugin] == list(range(7))
    assert found.sentence() == (
        "With the flag, search took 0.50 [0.50, 0.50] of stock's processor time and the whole training "
        '0.69 [0.68, 0.70] (7 seeds, 500 environment steps or more); returns do not tell the two apart '
        '(difference 0.00 [0.00, 0.00]).'
    )
    assert 'returns are higher with the flag by 2.' in pairs(3.0).sentence()
    assert 'returns are lower with the flag by -' in pairs(-3.0).sentence()
    assert 'wall time' in pairs(0.0, 'cuda:0').sentence()
    few = dataclasses.replace(found, stock=found.stock[:3], plugin=found.plugin[:3])
    assert few.sentence().endswith('; with fewer than five seeds intervals are too narrow.')
    (none, other) = ([row(arm, 0, 5.0, [])] for arm in (STOCK, PLUGIN))
    assert 'no episode ended, so nothing is known of returns' in Comparison(none, other).sentence()


def test_seconds_are_for_a_thousand_steps_and_the_parts_add_up() -> None:
    one = row(STOCK, 3, 6.0, [(240, 9.0), (240, 12.0), (500, 30.0)])
    assert seconds('processor', SEARCH, one) == 12.0
    assert sum(seconds('wall', part, one) for part in (*PARTS, REST)) == seconds('wall', WHOLE, one) == 80.0
    assert (mean_return(one), by_collection(one)) == (17.0, ([240, 500], [10.5, 30.0]))


def test_a_training_that_did_not_reach_the_return_counts_to_its_end() -> None:
    def reached(arm: str, seed: int, steps: int, well: bool) -> Row:
        return {**row(arm, seed, 10.0, []), 'env_steps': steps, 'until': 195.0, 'reached': well}

    stock = [reached(STOCK, 0, 400, True), reached(STOCK, 1, 900, False), reached(STOCK, 2, 600, True)]
    plugin = [reached(PLUGIN, 0, 300, True), reached(PLUGIN, 1, 450, True), reached(PLUGIN, 2, 200, True)]
    found = Comparison(stock, plugin)
    assert (
        '; 2 reached a return of 195 without the flag and 3 with it; until then or the end trainings took '
        "0.50 [0.33, 0.75] of stock's environment steps and 1.00 [1.00, 1.00] of its time; with fewer"
    ) in found.sentence()
    assert EVALUATION in found.quantities
    assert found.cells()[-1] == ('trainings that reached 195', '2', '3', '')


def test_a_part_that_stock_has_not_has_no_ratio() -> None:
    stock, plugin = (row(arm, 0, 0.0, []) for arm in (STOCK, PLUGIN))
    assert Comparison([stock], [plugin]).ratio(lambda one: one['processor'][SEARCH]) is None
