"""What a user may write into world_model_cfg.kv_cache, and what is said about mistakes."""

from __future__ import annotations

import pytest
from easydict import EasyDict

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
    config = KVCacheConfig.from_world_model_cfg(cfg)
    assert config == KVCacheConfig()
    assert (config.policy, config.window, config.padding) == ('lru', 'auto', 'masked')
    assert (config.max_bytes, config.root_slots, config.recurrent_slots) == (2147483648, 1, None)
    assert (config.enable_stats, config.tensorboard, config.histograms) == (True, True, True)


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
    config = KVCacheConfig(window='rebuild', max_bytes=None, root_slots=3, recurrent_slots=17)
    assert KVCacheConfig.from_world_model_cfg({'kv_cache': config}) is config


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
    (line,) = mistakes(recurrent_slots=value)
    assert line.startswith(f'recurrent_slots: expected an integer of at least 1 or None, got {value!r}')


def test_impossible_pairs_are_refused_also_beside_other_mistakes():
    (line,) = mistakes(window='rebuild', padding='host')
    assert line.startswith("window: 'rebuild' cannot be combined with padding='host'")
    (line,) = mistakes(enable_stats=False, tensorboard=True)
    assert line.startswith('tensorboard: True needs enable_stats=True')
    assert (
        len(mistakes(window='rebuild', padding='host', root_slots=-1, enable_stats=False, tensorboard=True))
        == 3
    )
    with pytest.raises(ValueError, match='cannot be combined'):
        KVCacheConfig(window='rebuild', padding='host')


@pytest.mark.parametrize('engine', ['compile', 'cudagraph'])
def test_an_engine_on_static_shapes_is_not_for_host_padding_nor_for_budgets(engine):
    (line,) = mistakes(engine=engine, padding='host')
    assert line.startswith(f"engine: '{engine}' cannot be combined with padding='host'")
    (line,) = mistakes(engine=engine, budget=dict(ratio=0.5))
    assert line.startswith(f"engine: '{engine}' cannot be combined with budget")
    assert read(engine='eager', padding='host').engine == 'eager'


def test_an_unknown_engine_is_refused():
    assert mistakes(engine='compiled') == [
        "engine: expected one of ['auto', 'eager', 'compile', 'cudagraph'], got 'compiled'; did you mean "
        "'compile'?"
    ]


def test_auto_picks_the_engine_by_device():
    devices = ('cpu', 'cuda', 'mps')
    chosen = [read().engine_on(device, sharing=False) for device in devices]
    assert chosen == ['eager', 'cudagraph', 'eager']
    assert read().engine_on('cuda', sharing=True) == 'eager'
    assert read(padding='host').engine_on('cuda', sharing=False) == 'eager'
    assert read(budget=dict(ratio=0.5)).engine_on('cuda', sharing=False) == 'eager'
    assert read(engine='compile').engine_on('cpu', sharing=True) == 'compile'


def test_statistics_switched_off_need_no_second_switch():
    assert read(enable_stats=False).tensorboard is True


def test_kv_cache_must_be_a_mapping():
    with pytest.raises(TypeError, match=r"kv_cache must be a dict such as dict\(policy='lru'\), got str"):
        KVCacheConfig.from_world_model_cfg({'kv_cache': 'lru'})
