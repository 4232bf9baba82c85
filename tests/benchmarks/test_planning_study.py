"""The study of planning in fewer bits, with a narrow model that was not trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lzero_kv.lightzero.inference import precision
from studies.planning import precision as study
from testing.models import collect_model, random_weights

pytestmark = pytest.mark.skipif(not precision.available(), reason='this torch has no FBGEMM')


def test_each_precision_is_compared_with_float32_at_the_same_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner in ('lzero_kv.lightzero.inference.precision', 'lzero_kv.lightzero.settings'):
        monkeypatch.setattr(f'{owner}.ELEMENTS', dict(float16=1, int8=1))
    monkeypatch.setattr(study, 'SIZES', dict(embed_dim=32, num_simulations=5, env_manager='base'))
    monkeypatch.setattr(study, 'EPISODES', 4)
    policy, checkpoint = study.new_policy('float32'), tmp_path / 'checkpoint'
    model = collect_model(policy)
    model.load_state_dict(random_weights(model, seed=3))
    torch.save(policy.learn_mode.state_dict(), checkpoint)
    study.compare(checkpoint, steps=3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{')]
    assert [line['precision'] for line in lines] == ['float32', 'float32, other batches', 'float16', 'int8']
    assert all(line['roots'] == 4 * 3 for line in lines)
    assert [len(line['returns'] or '') for line in lines] == [4, 0, 4, 4]
    errors = [line['value_error'] for line in lines]
    # rounding alone may tip a simulation over to another action, so its error has no small bound of its own
    assert errors[0] == 0 < min(errors[1:3]) and max(errors[1:3]) < errors[3], errors
