"""Doctor's verdict is what a training does: both run on the same configs, sound and broken."""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import lzero_kv
from lzero_kv.cli.doctor import Check, Mark, config_checks

CONFIG = """
import sys
{top}
from cartpole_unizero_kv_config import make_config
from lzero.entry import eval_muzero, train_unizero
main, create = make_config('CartPole-v0', seed=0, smoke=True)
main.exp_name = 'trained'
policy, world_model, options, entry = main.policy, main.policy.model.world_model_cfg, {{}}, train_unizero
{change}
entry([main, create], seed=0, **options)
"""
PLUGIN_AT_TOP = 'import lzero_kv.plugin'
ENGAGED = None
STOCK = 'stock'
TABLE: list[tuple[str, str, str | None, str, str]] = [
    # change, at the top, the check that fails (None: it engages), its words, the error's (STOCK: none)
    ('', '', ENGAGED, '', ''),
    ("world_model.kv_cache = dict(policy='lfu', window='shift')", '', ENGAGED, '', ''),
    ("world_model.kv_cache = dict(budget=dict(ratio=0.9, window=2))", '', ENGAGED, '', ''),
    ("world_model.cache_validation_mode = 'model'", '', ENGAGED, '', ''),
    ("create.policy.import_names = ['lzero.policy.unizero']", PLUGIN_AT_TOP, ENGAGED, '', ''),
    ('policy.kv_cache = dict(max_bytes=7)', '', ENGAGED, '', ''),
    ('world_model.use_new_cache_manager = False', '', 'use_new_cache_manager', 'stock cache', STOCK),
    ("world_model.pop('use_new_cache_manager')", '', 'use_new_cache_manager', 'stock cache', STOCK),
    (
        "world_model.pop('use_new_cache_manager'); world_model.use_new_kv_cache = True", '',
        'use_new_cache_manager', 'stock cache', STOCK,
    ),
    ("create.policy.import_names = ['lzero.policy.unizero']", '', 'import_names', 'flag does nothing', STOCK),
    ("create.policy.import_names = 'lzero_kv.plugin'", '', 'import_names', 'a list is expected', "'l'"),
    ("world_model.use_new_cache_manager = 'True'", '', 'use_new_cache_manager', "got 'True'", "got 'True'"),
    ('world_model.kv_cache = True', '', 'kv_cache', 'must be a dict', 'must be a dict'),
    ('world_model.kv_cache = dict(max_bytes=4096)', '', 'caches', 'is too small', 'is too small'),
    ("world_model.kv_cache = dict(polcy='lru')",
     '', 'kv_cache', "did you mean 'policy'", "did you mean 'policy'"),
    ('world_model.kv_cache = dict(window_slots=0)', '', 'kv_cache', 'window_slots', 'window_slots'),
    ('world_model.kv_cache = dict(validation_atol=float("inf"))',
     '', 'kv_cache', 'validation_atol', 'validation_atol'),
    ('world_model.kv_cache = dict(budget=dict(ratio=0.01))', '', 'caches', 'need', 'need'),
    (
        'world_model.kv_cache = dict(budget=dict(ratio=0.9, window=2))\n'
        "world_model.cache_validation_mode = 'store'",
        '', 'caches', 'compares whole histories', 'compares whole histories',
    ),
    (
        "world_model.kv_cache = dict(budget=dict(ratio=0.9, window=2), window='shift')", '', 'kv_cache',
        "cannot be combined with window='shift'", "cannot be combined with window='shift'",
    ),
    ("world_model.cache_validation_mode = 'stores'",
     '', 'world model', "expected False, 'rec", "expected False, 'rec"),
    ('world_model.tokens_per_block = 3', '', 'world model', 'tokens_per_block=3', 'tokens_per_block=3'),
    ('world_model.num_heads = 0', '', 'world model', 'num_heads=0', 'num_heads=0'),
    ('world_model.num_heads = 5', '', 'world model', 'num_heads=5', 'num_heads=5'),
    ('policy.num_simulations = 0', '', 'caches', 'num_simulations must be', 'num_simulations must be'),
    ('policy.evaluator_env_num = 1', '', 'evaluator_env_num', 'evaluator_env_num=2', 'evaluator_env_num'),
    ("create.policy.type = 'muzero'", '', 'policy', 'must be one of', 'only supports'),
    ('entry = eval_muzero', '', 'training entry', 'the plugin works in', ''),
]  # fmt: skip


class Started(BaseException):
    """The policy acted."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def configs_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """DI-engine lays its copy of a config out with yapf: three quarters of the time of a training here."""
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text: (text, False))


def without_plugin() -> None:
    """As in a new process."""
    lzero_kv.uninstall()
    sys.modules.pop('lzero_kv.plugin', None)


def trained(path: Path, arguments: tuple[str, ...] = ()) -> str:
    """Start the training of a config and stop it when its policy acted: the error that came, '' for none."""
    from lzero.policy.unizero import UniZeroPolicy
    from lzero.worker import MuZeroEvaluator

    without_plugin()
    engaged: list[bool] = []
    original = MuZeroEvaluator.eval

    def eval_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy_eval = self._policy.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            policy_eval(*args, **kwargs)
            raise Started

        self._policy = self._policy._replace(forward=forward)
        try:
            engaged.append(bool(self._policy.get_attribute('kv_world_models')))
        except NotImplementedError:
            engaged.append(False)
        return original(self, *args, **kwargs)

    argv, sys.argv = sys.argv, [str(path), *arguments]
    MuZeroEvaluator.eval = eval_once
    try:
        runpy.run_path(str(path), run_name='__main__')
    except Started:
        return '' if engaged[-1] else STOCK
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    finally:
        sys.argv, MuZeroEvaluator.eval = argv, original
        assert UniZeroPolicy is not None
    return 'ended'


def diagnosed(path: Path, arguments: tuple[str, ...] = ()) -> list[Check]:
    without_plugin()
    return config_checks(path, arguments)


def failures(checks: list[Check]) -> list[Check]:
    return [check for check in checks if check.mark is Mark.FAIL]


@pytest.mark.parametrize(('change', 'top', 'subject', 'words', 'error'), TABLE)
def test_verdict_and_reason_agree(
    change: str, top: str, subject: str | None, words: str, error: str, tmp_path: Path
) -> None:
    path = tmp_path / 'my_config.py'
    path.write_text(CONFIG.format(change=change, top=top))
    failed = failures(diagnosed(path))
    assert not list(tmp_path.glob('*/*'))
    assert [check.subject for check in failed] == ([] if subject is ENGAGED else [subject]), failed
    assert subject is ENGAGED or words in failed[0].remedy
    if change != 'entry = eval_muzero':
        found = trained(path)
        assert found == error if error in ('', STOCK) else error in found


def test_options_that_are_nearly_right_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / 'my_config.py'
    change = 'policy.kv_cache = dict(max_bytes=7); policy.model.kvcache = 1; world_model.kv_cache_cfg = 2'
    path.write_text(CONFIG.format(change=change, top=''))
    place = 'policy.model.world_model_cfg.kv_cache'
    texts = [
        f'{name} is not read; did you mean {place}?'
        for name in ('policy.kv_cache', 'policy.model.kvcache', 'policy.model.world_model_cfg.kv_cache_cfg')
    ]
    assert [check.remedy for check in diagnosed(path) if check.mark is Mark.WARN] == texts
    with caplog.at_level(logging.INFO, 'lzero_kv'):
        assert trained(path) == ''
    lines = [record.getMessage() for record in caplog.records if record.name.startswith('lzero_kv')]
    assert [line.removeprefix('lzero_kv: ') for line in lines if 'did you mean' in line] == texts
    (line,) = [line for line in lines if ': on: ' in line]
    assert line.startswith(f'lzero_kv {lzero_kv.__version__} with LightZero 0.2.0: on: caches of lzero_kv, ')
    assert 'window=rebuild, backend=eager' in line
    assert 'pools of ' in line and 'budget=none' in line


def test_the_flag_that_is_off_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / 'my_config.py'
    path.write_text(CONFIG.format(change="world_model.pop('use_new_cache_manager')", top=''))
    with caplog.at_level(logging.INFO, 'lzero_kv'):
        assert trained(path) == STOCK
    assert 'off, stock caches' in caplog.text


CONFIGS = sorted(Path(__file__).resolve().parents[2].joinpath('configs').glob('*_config.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_the_configs_engage(path: Path) -> None:
    assert failures(diagnosed(path, ('--smoke',))) == []
    failed = failures(diagnosed(path, ('--smoke', '--no-kv')))
    assert [check.subject for check in failed] == ['use_new_cache_manager']
