"""What a user may write into world_model_cfg.kv_cache, and what is said about mistakes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from easydict import EasyDict

from lzero_kv import config
from lzero_kv.cache.eviction import EvictionStrategy
from lzero_kv.config import KVCacheConfig


def read(**kv_cache: object) -> KVCacheConfig:
    return KVCacheConfig.from_world_model_cfg(EasyDict(kv_cache=kv_cache, num_layers=3))


def mistakes(**kv_cache: object) -> list[str]:
    with pytest.raises(ValueError, match='mistake') as caught:
        read(**kv_cache)
    first, *lines = str(caught.value).splitlines()
    assert first == f'{len(lines)} mistake(s) in world_model_cfg.kv_cache:'
    return [line.strip().removeprefix('kv_cache.') for line in lines]


@pytest.mark.parametrize('cfg', [EasyDict(), {}, {'kv_cache': None}, EasyDict(kv_cache={}), object()])
def test_everything_has_a_default(cfg):
    made = KVCacheConfig.from_world_model_cfg(cfg)
    assert made == KVCacheConfig()
    assert (made.policy, made.window, made.backend) == ('lru', 'rebuild', 'auto')
    assert (made.max_bytes, made.root_slots, made.window_slots) == (2147483648, 1, None)
    assert (made.enable_stats, made.tensorboard, made.histograms) == (True, True, True)


def test_every_field_is_documented():
    assert all(field.description for field in KVCacheConfig.model_fields.values())


def test_policies_are_the_strategies():
    assert [read(policy=strategy.value).policy for strategy in EvictionStrategy] == [
        'fifo',
        'lru',
        'lfu',
        'priority',
    ]


def test_a_ready_made_config_is_taken_as_it_is():
    given = KVCacheConfig(window='rebuild', max_bytes=None, root_slots=3, window_slots=17)
    assert KVCacheConfig.from_world_model_cfg({'kv_cache': given}) is given


def test_it_cannot_be_changed():
    with pytest.raises(ValueError, match='frozen'):
        KVCacheConfig().policy = 'fifo'


def test_all_mistakes_are_reported_at_once():
    assert mistakes(polcy='lru', policy='lur', root_slots=0, max_bytes='2GB', histograms=1, colour=3) == [
        "policy: expected one of ['lru', 'fifo', 'lfu', 'priority'], got 'lur'; did you mean 'lru'?",
        "max_bytes: expected an integer of at least 1 (bytes) or None, got '2GB' of type str",
        'root_slots: expected an integer of at least 1, got 0 of type int',
        'histograms: expected True or False, got 1 of type int',
        "polcy: there is no such field; did you mean 'policy'?",
        f'colour: there is no such field; allowed: {", ".join(KVCacheConfig.model_fields)}',
    ]


@pytest.mark.parametrize('value', [True, 2.5, -1, '7', []])
def test_counts_are_integers(value):
    (line,) = mistakes(window_slots=value)
    assert line.startswith(f'window_slots: expected an integer of at least 1 or None, got {value!r}')


def test_impossible_pairs_are_refused_also_beside_other_mistakes():
    (line,) = mistakes(window='shift', budget=dict(ratio=0.5))
    assert line.startswith("budget: it cannot be combined with window='shift'")
    (line,) = mistakes(enable_stats=False, tensorboard=True)
    assert line.startswith('tensorboard: True needs enable_stats=True')
    both = dict(window='shift', budget=dict(ratio=0.5), enable_stats=False, tensorboard=True)
    assert len(mistakes(root_slots=-1, **both)) == 3
    with pytest.raises(ValueError, match='cannot be combined'):
        KVCacheConfig(window='shift', budget=dict(ratio=0.5))


@pytest.mark.parametrize('backend', ['compile', 'cudagraph'])
def test_a_backend_on_static_shapes_is_not_for_budgets(backend):
    (line,) = mistakes(backend=backend, budget=dict(ratio=0.5))
    assert line.startswith(f"backend: '{backend}' cannot be combined with budget")
    assert read(backend=backend).backend_on('cpu') == backend


def test_an_unknown_backend_is_refused():
    assert mistakes(backend='compiled') == [
        "backend: expected one of ['auto', 'eager', 'compile', 'cudagraph'], got 'compiled'; did you mean "
        "'compile'?"
    ]


def test_auto_is_what_was_measured():
    assert read().backend_on('cpu') == read(backend='eager').backend_on('cuda') == 'eager'
    assert read().backend_on('cuda:1') == 'cudagraph'
    assert read(budget=dict(ratio=0.5)).backend_on('cuda') == 'eager'
    assert read(window='auto') == read(window='rebuild') == read()
    assert mistakes(window='rebuilt') == [
        "window: expected one of ['rebuild', 'shift'], got 'rebuilt'; did you mean 'rebuild'?"
    ]


@pytest.mark.parametrize(
    ('old', 'new', 'value'), [('recurrent_slots', 'window_slots', 17), ('engine', 'backend', 'compile')]
)
def test_old_names_work_with_one_warning(old, new, value):
    config._warn.cache_clear()
    with pytest.warns(DeprecationWarning, match=f'kv_cache.{old} is now called {new}; write {new}=') as seen:
        assert read(**{old: value}) == read(**{new: value})
        assert KVCacheConfig(**{old: value}) == read(**{old: value})
    assert len(seen) == 1
    assert mistakes(**{old: value, new: value}) == [
        f'{old}: it is the old name of {new}, got both; leave {old} out'
    ]
    with pytest.raises(ValueError, match='got both'):
        KVCacheConfig(**{old: value, new: value})


def test_a_wrong_value_of_an_old_name_is_a_mistake_of_the_new_one():
    config._warn.cache_clear()
    with pytest.warns(DeprecationWarning):
        (line,) = mistakes(engine='compiled')
    assert line.startswith('backend: expected one of')


def test_warnings_of_old_names_are_shown_without_any_switch():
    code = (
        'from lzero_kv import KVCacheConfig as C; C(engine="eager"); C(engine="eager"); C(padding="masked")'
    )
    ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert ran.stderr.count('DeprecationWarning') == 2


def test_padding_is_no_option():
    config._warn.cache_clear()
    with pytest.warns(DeprecationWarning, match="leave padding='masked' out"):
        assert read(padding='masked') == read()
    (line,) = mistakes(padding='host')
    assert line.startswith(
        "padding: 'host' is gone; padding is always masked, and cache_validation_mode='store'"
    )
    assert len(mistakes(padding='host', policy='lur')) == 2


def test_statistics_switched_off_need_no_second_switch():
    assert read(enable_stats=False).tensorboard is True


def test_kv_cache_must_be_a_mapping():
    with pytest.raises(TypeError, match=r"kv_cache must be a dict such as dict\(policy='lru'\), got str"):
        KVCacheConfig.from_world_model_cfg({'kv_cache': 'lru'})
