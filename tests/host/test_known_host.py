"""The LightZero that the adapter knows is told by what is in it; anything else is refused by name."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
from lzero.entry import utils
from lzero.mcts.buffer.game_buffer_sampled_unizero import SampledUniZeroGameBuffer
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree
from lzero.model import unizero_model
from lzero.model.unizero_world_models.tokenizer import Tokenizer
from lzero.model.unizero_world_models.transformer import Block, Transformer
from lzero.model.unizero_world_models.world_model import WorldModel
from lzero.policy.sampled_unizero import SampledUniZeroPolicy
from lzero.policy.unizero import UniZeroPolicy

import lzero_kv
from lzero_kv.cli.doctor import Check, Mark, host_check
from lzero_kv.lightzero import host
from lzero_kv.lightzero.fingerprints import changed
from lzero_kv.lightzero.settings import POLICIES, check_policy
from testing.families import FAMILIES, policy_config
from testing.models import buildable_memory_model, make_policy


def renamed(function: Any, old: str, new: str) -> Any:
    """A function that uses another attribute."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    names = tuple(new if name == old else name for name in function.__code__.co_names)
    changed.__code__ = changed.__code__.replace(co_names=changed.__code__.co_names + names)
    return changed


def search_with_task(
    self: Any, roots: Any, model: Any, latents: Any, to_play: Any, timestep: Any, task_id: Any = None
) -> None:
    """The development branch's arguments."""


def search_that_returns(self: Any, roots: Any, model: Any, latents: Any, to_play: Any, timestep: Any) -> None:
    """The development branch's local variable."""
    first_action_latent_map = {}  # noqa: F841


TRANSFORM = 'inverse_scalar_transform_handle'
POLICY_RESETS = (
    'arguments of UniZeroPolicy._reset_collect: expected env_id, current_steps, reset_init_data, found'
)


def reset_with_task(
    self: Any, env_id: Any, current_steps: Any, reset_init_data: Any, task_id: Any = None
) -> None:
    """The development branch's arguments."""


def infer_with_ids(
    self: Any, obs_batch: Any, action_batch: Any, current_obs_batch: Any, start_pos: Any, ready_env_id: Any
) -> None:
    """The development branch's arguments."""


def method(owner: Any, name: str, old: str, new: str) -> Any:
    """Let a method use another attribute."""
    return lambda patch: patch.setattr(owner, name, renamed(getattr(owner, name), old, new))


def constant(function: Any, value: str) -> Any:
    """A function with one more constant."""
    changed = renamed(function, '', '')
    original = function.__code__
    changed.__code__ = changed.__code__.replace(co_consts=(*original.co_consts, value))
    return changed


CHANGES: dict[str, Any] = {
    'module of initialize_zeros_batch: expected lzero.entry.utils, found nothing': lambda patch: (
        patch.delattr(utils, 'initialize_zeros_batch')
    ),
    "UniZeroModel's world model: expected a name of the module, found an attribute": lambda patch: (
        patch.setattr(unizero_model.UniZeroModel, 'world_model_cls', object, raising=False)
    ),
    'arguments of UniZeroModel.initial_inference: expected obs_batch, action_batch, current_obs_batch, '
    'start_pos, found obs_batch, action_batch, current_obs_batch, start_pos, ready_env_id': lambda patch: (
        patch.setattr(unizero_model.UniZeroModel, 'initial_inference', infer_with_ids)
    ),
    'caches of WorldModel: expected dictionaries, found dictionaries or kv_cache_manager': method(
        WorldModel, '_initialize_cache_structures', 'past_kv_cache_recurrent_infer', 'kv_cache_manager'
    ),
    'steps between two clears of all caches: expected a number in the code': lambda patch: patch.setattr(
        UniZeroPolicy,
        '_reset_collect',
        constant(UniZeroPolicy._reset_collect, 'kv_cache_clear_interval'),
    ),
    'feed-forward part of a transformer block: expected mlp, found feed_forward': method(
        Block, '__init__', 'mlp', 'feed_forward'
    ),
    'arguments of UniZeroMCTSCtree.search: expected timestep, found timestep, task_id': lambda patch: (
        patch.setattr(UniZeroMCTSCtree, 'search', search_with_task)
    ),
    'what UniZeroMCTSCtree.search returns: expected nothing, found first_action_latent_map': lambda patch: (
        patch.setattr(UniZeroMCTSCtree, 'search', search_that_returns)
    ),
    'how the search breaks ties: expected at random, found by the option deterministic': method(
        UniZeroMCTSCtree, 'search', 'num', 'deterministic'
    ),
    f'scalar transforms of the search: expected {TRANSFORM}, found value_{TRANSFORM}': method(
        UniZeroMCTSCtree, '__init__', TRANSFORM, f'value_{TRANSFORM}'
    ),
    f'scalar transforms of the sampled search: expected {TRANSFORM}, found value_{TRANSFORM}': method(
        SampledUniZeroMCTSCtree, '__init__', TRANSFORM, f'value_{TRANSFORM}'
    ),
    'last observations of the policy: expected last_batch_obs, found last_batch_obs_collect': method(
        UniZeroPolicy, '_forward_collect', 'last_batch_obs', 'last_batch_obs_collect'
    ),
    'last observations of the sampled policy: expected last_batch_obs, found last_batch_obs_collect': method(
        SampledUniZeroPolicy, '_forward_collect', 'last_batch_obs', 'last_batch_obs_collect'
    ),
    f'{POLICY_RESETS} env_id, current_steps, reset_init_data, task_id': lambda patch: patch.setattr(
        UniZeroPolicy, '_reset_collect', reset_with_task
    ),
    'numbers of simulations of the policy: expected num_simulations, found eval_num_simulations': method(
        UniZeroPolicy, '_init_eval', '_eval_model', 'eval_num_simulations'
    ),
    'control of policy logits: expected none, found _apply_policy_logits_control': lambda patch: (
        patch.setattr(WorldModel, '_apply_policy_logits_control', None, raising=False)
    ),
    'roots of reanalysis: expected latent states alone': lambda patch: patch.setattr(
        WorldModel, 'seed_reanalysis_root_caches', None, raising=False
    ),
    'reanalysis of the sampled buffer: expected all roots at once, found in chunks': lambda patch: (
        patch.setattr(
            SampledUniZeroGameBuffer, '_search_sampled_reanalyzed_roots_in_chunks', None, raising=False
        )
    ),
    'tokens of tasks in the transformer: expected none, found task_embed_option': method(
        Transformer, '__init__', 'config', 'task_embed_option'
    ),
}


def test_the_release_is_known():
    assert host.check_supported() == '0.2.0'
    assert host_check() == Check(Mark.OK, 'host', 'LightZero 0.2.0 (as tested)')
    assert len(CHANGES) == len(fields(host.Host))


def test_both_profiles_differ_in_all_seams_but_one():
    release, main = host.PROFILES.values()
    assert len(host.differences(main, release)) == len(fields(host.Host)) - 1


@pytest.mark.parametrize('sentence', CHANGES)
def test_each_difference_is_refused_by_name_and_nothing_is_installed(sentence, monkeypatch):
    lzero_kv.uninstall()
    CHANGES[sentence](monkeypatch)
    before = unizero_model.WorldModel, inspect.getattr_static(UniZeroPolicy, '__init__')
    with pytest.raises(RuntimeError) as caught:
        lzero_kv.install()
    assert sentence in str(caught.value)
    assert 'expected LightZero 0.2.0 or main 2026-08, found one that says 0.2.0' in str(caught.value)
    assert (unizero_model.WorldModel, inspect.getattr_static(UniZeroPolicy, '__init__')) == before
    seen = host_check()
    assert seen.mark is Mark.FAIL
    assert seen.remedy == str(caught.value)


def test_a_model_that_the_host_cannot_build_is_refused_until_it_is_mended(monkeypatch):
    monkeypatch.setattr(unizero_model, 'Tokenizer', Tokenizer)  # a config may have mended it
    config = policy_config(FAMILIES['memory'], True, None, {}, {})
    with pytest.raises(ValueError, match=r"obs_type='image_memory': .* cannot build .*tokenizer.lpips"):
        check_policy('UniZeroModel', config)
    with buildable_memory_model():
        check_policy('UniZeroModel', config)
    for family in ('atari', 'tiny', 'lunarlander_continuous'):  # git main has faults of its own there
        config = policy_config(FAMILIES[family], True, None, {}, {})
        check_policy(POLICIES[config.type], config)


def test_functions_that_are_newer_than_tested_are_named_and_the_plugin_engages(monkeypatch):
    monkeypatch.setattr(Block, 'forward', lambda self, x, past_keys_values=None, lengths=None: x)
    monkeypatch.delattr(UniZeroPolicy, '_reset_eval')
    assert changed('0.2.0') == ['Block.forward', 'UniZeroPolicy._reset_eval']
    seen = host_check()
    assert seen.mark is Mark.WARN and host.check_supported() == '0.2.0'
    assert 'these functions differ: Block.forward, UniZeroPolicy._reset_eval;' in seen.remedy


def test_fingerprints_are_of_the_host_whatever_the_plugin_replaced():
    managed = make_policy('tiny', kv=True)
    assert type(managed).__name__ == 'KVUniZeroPolicy'
    assert changed('0.2.0') == [] and host.check_supported() == '0.2.0'


def test_a_missing_library_of_the_host_is_named(monkeypatch):
    def look(place: str) -> Any:
        raise ModuleNotFoundError("No module named 'nltk'", name='nltk')

    monkeypatch.setattr(host, 'import_module', look)
    with pytest.raises(RuntimeError, match=r"^LightZero cannot be imported: .*'nltk'; install nltk$"):
        host.check_supported()


def test_whatever_a_changed_host_raises_is_a_difference(monkeypatch):
    def look(place: str) -> Any:
        raise OSError('no such thing')

    monkeypatch.setattr(host, 'import_module', look)
    with pytest.raises(
        RuntimeError, match=r'feed-forward part .*: expected mlp, found OSError: no such thing'
    ):
        host.check_supported()
