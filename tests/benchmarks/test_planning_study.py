"""The studies of planning, with narrow models that were not trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lzero_kv
from lzero_kv.lightzero.inference import precision
from studies.planning import cartpole, wrong_entries
from studies.planning import precision as study
from testing.models import collect_model, random_weights


@pytest.fixture(autouse=True)
def plugin_in_place() -> Iterator[None]:
    """As importing the studies put it there; other tests in the same process expect a host without it."""
    lzero_kv.install()
    yield
    lzero_kv.uninstall()


@pytest.mark.skipif(bool(precision.lacking('int8', 768)), reason='this torch has no FBGEMM')
def test_each_precision_is_compared_with_float32_at_the_same_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, 'ELEMENTS', 1)
    monkeypatch.setattr(study, 'SIZES', dict(embed_dim=32, num_simulations=5, env_manager='base'))
    monkeypatch.setattr(study, 'EPISODES', 4)
    policy, checkpoint = cartpole.new_policy(study.configs_of('float32')), tmp_path / 'checkpoint'
    model = collect_model(policy)
    model.load_state_dict(random_weights(model, seed=3))
    torch.save(policy.learn_mode.state_dict(), checkpoint)
    study.compare(checkpoint, steps=3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{')]
    reduced = [name for name in ('float16', 'bfloat16', 'int8') if not precision.lacking(name, 768)]
    assert [line['precision'] for line in lines] == ['float32', 'float32, other batches', *reduced]
    assert all(line['roots'] == 4 * 3 for line in lines)
    assert [len(line['returns'] or '') for line in lines] == [4, 0, *[4] * len(reduced)]
    errors = {line['precision']: line['value_error'] for line in lines}
    # rounding alone may tip a simulation over to another action, so its error has no small bound of its own
    small = errors['float32, other batches'], errors['float16']
    assert errors['float32'] == 0 < min(small) and max(small) < errors['int8'], errors


def test_all_caches_play_from_the_same_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict(embed_dim=16, env_manager='base')
    monkeypatch.setattr(wrong_entries, 'SIZES', sizes)
    monkeypatch.setattr(wrong_entries, 'ROWS', 3)
    played, play = [], cartpole.play
    monkeypatch.setattr(
        cartpole, 'play', lambda *given: played.append((given[0], play(*given))) or played[-1][1]
    )
    checkpoint = tmp_path / 'iteration_7.pth.tar'
    torch.save(cartpole.new_policy(cartpole.configs_of(sizes, {})).learn_mode.state_dict(), checkpoint)
    wrong_entries.play((checkpoint,), simulations=(4, 5), episodes=6)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{')]
    name = '/'.join(checkpoint.parts[-3:])
    assert [(line['checkpoint'], line['simulations']) for line in lines] == [(name, 4), (name, 5)]
    models = [collect_model(policy).world_model for policy, _ in played]
    assert [type(model).__name__ for model in models] == ['WorldModel', 'KVWorldModel', 'KVWorldModel'] * 4
    assert [model.cache_config.window for model in models if hasattr(model, 'cache_config')] == [
        'shift',
        'rebuild',
    ] * 4
    starts = [[episode[0][0].tolist() for episode in recorded] for _, (recorded, _) in played]
    assert starts[0:12:3] == starts[1:12:3] == starts[2:12:3] and starts[0] == starts[6] != starts[3]
    for line, first in zip(lines, (0, 6), strict=True):
        own = {
            name: [*played[first + row][1][1], *played[first + 3 + row][1][1]]
            for row, name in enumerate(wrong_entries.CACHES)
        }
        assert line['returns'] == own
        for name in ('shift', 'default'):
            mean, low, high = line['differences'][name]
            assert mean == pytest.approx(line['means'][name] - line['means']['stock'])
            assert low <= mean <= high
