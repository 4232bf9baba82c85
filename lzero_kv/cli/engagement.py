"""Whether the plugin would engage for a config of LightZero's form."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lzero_kv.cli.checks import Check, Mark
from lzero_kv.cli.training_call import ConfigError, TrainingCall, training_call
from lzero_kv.config import KVCacheConfig, validation_mode_of
from lzero_kv.lightzero.install import FLAG

PLUGIN = 'lzero_kv.plugin'
ENTRIES = ('train_unizero', 'train_unizero_segment')
ASYNC_ENTRY = 'train_unizero_segment_async'
SHOWN = ('num_layers', 'num_heads', 'embed_dim', 'context_length')
POLICIES = ('unizero', 'sampled_unizero')


def config_checks(path: Path) -> list[Check]:
    """Run a config up to its training entry and return what the plugin would find there.

    The plugin engages when it is imported (import_names), the entry and the policy are ones it knows, the
    flag is on and the values of `kv_cache` are possible. One check each; any that is not ok keeps the stock
    cache or stops the training.
    """
    try:
        call = training_call(path)
    except ConfigError as error:
        return [Check(Mark.FAIL, 'config', str(path), str(error))]
    world_model = _at(call.config, 'policy', 'model', 'world_model_cfg')
    checks = [
        _entry_check(call),
        _policy_check(call),
        *_process_checks(call, world_model),
        _import_check(call),
        _flag_check(world_model),
        _values_check(world_model),
        *_backend_checks(call, world_model),
        *_validation_checks(world_model),
    ]
    if _at(call.create_config, 'policy', 'type') in POLICIES:
        checks.append(_world_model_check(call))
    return checks


def _entry_check(call: TrainingCall) -> Check:
    if call.entry in ENTRIES:
        return Check(Mark.OK, 'training entry', call.entry)
    if call.entry == ASYNC_ENTRY:
        remedy = (
            'each Ray actor keeps a cache and a log of its own (log/collector_async_<number>), and the '
            "learner's reanalysis is in none; nobody has run this with the plugin yet"
        )
        return Check(Mark.WARN, 'training entry', call.entry, remedy)
    return Check(
        Mark.FAIL,
        'training entry',
        call.entry,
        f'the plugin works in {" and ".join(ENTRIES)}; use a config of those',
    )


def _policy_check(call: TrainingCall) -> Check:
    policy = _at(call.create_config, 'policy', 'type')
    if policy in POLICIES:
        return Check(Mark.OK, 'policy', policy)
    return Check(
        Mark.FAIL, 'policy', str(policy), f'create_config.policy.type must be one of {", ".join(POLICIES)}'
    )


def _process_checks(call: TrainingCall, world_model: Any) -> list[Check]:
    """Return whether LightZero itself can train on several GPUs, where that is asked for."""
    if not _at(call.config, 'policy', 'multi_gpu'):
        return []
    if _at(world_model, 'obs_type') != 'vector':
        return [Check(Mark.OK, 'multi_gpu', 'one process for each GPU, started by torchrun')]
    remedy = (
        'LightZero stops at the first update: it adds up the gradients of all parameters, and those of the '
        'decoder of vector observations have none; leave multi_gpu out'
    )
    return [Check(Mark.FAIL, 'multi_gpu', 'with vector observations', remedy)]


def _import_check(call: TrainingCall) -> Check:
    names = list(_at(call.create_config, 'policy', 'import_names') or ())
    if PLUGIN in names:
        return Check(Mark.OK, 'import_names', ', '.join(names))
    return Check(
        Mark.FAIL,
        'import_names',
        ', '.join(names) or 'none',
        f'the flag does nothing without the plugin; write policy.import_names={[*names, PLUGIN]!r} '
        'in the create config',
    )


def _flag_check(world_model: Any) -> Check:
    flag = _at(world_model, FLAG)
    if flag is True:
        return Check(Mark.OK, FLAG, 'True')
    remedy = f'the stock cache is used; write policy.model.world_model_cfg=dict(..., {FLAG}=True)'
    return Check(Mark.FAIL, FLAG, 'not in world_model_cfg' if flag is None else repr(flag), remedy)


def _values_check(world_model: Any) -> Check:
    given = _at(world_model, 'kv_cache') or {}
    try:
        KVCacheConfig.from_world_model_cfg(world_model if world_model is not None else {})
    except (ValueError, TypeError) as error:
        return Check(Mark.FAIL, 'kv_cache', ', '.join(map(str, given)) or 'defaults', str(error))
    values = ', '.join(f'{name}={value}' for name, value in dict(given).items())
    return Check(Mark.OK, 'kv_cache', values or 'defaults')


def _backend_checks(call: TrainingCall, world_model: Any) -> list[Check]:
    """Return how the steps of a search would run on the device that the host would take here."""
    import torch

    try:
        config = KVCacheConfig.from_world_model_cfg(world_model if world_model is not None else {})
    except (ValueError, TypeError):
        return []  # the check of the values says why
    wanted = _at(call.config, 'policy', 'cuda') is not False  # the host's own default is True
    device = 'cuda' if wanted and torch.cuda.is_available() else 'cpu'
    found = f'{config.resolved_backend} on {device}' + (' (auto)' if config.backend == 'auto' else '')
    if config.backend == 'cudagraph' and device != 'cuda':
        remedy = "there is no CUDA device, searches would go on with 'eager'; leave backend out"
        return [Check(Mark.WARN, 'backend', found, remedy)]
    return [Check(Mark.OK, 'backend', found)]


def _validation_checks(world_model: Any) -> list[Check]:
    try:
        mode = validation_mode_of(world_model if world_model is not None else {})
    except ValueError:
        return []  # the check of the world model says why
    return [Check(Mark.OK, 'validation', mode or 'off')]


def _world_model_check(call: TrainingCall) -> Check:
    """Return what the adapter says to the world model that the host would build, defaults included."""
    from ding.utils import POLICY_REGISTRY, deep_merge_dicts
    from easydict import EasyDict

    from lzero_kv.lightzero.inputs import POLICIES, check_policy, check_world_model_config

    policy = call.create_config['policy']['type']
    importlib.import_module(f'lzero.policy.{policy}')
    defaults = POLICY_REGISTRY.get(policy).default_config()
    options = EasyDict(deep_merge_dicts(defaults, call.config.get('policy', {})))
    merged = options['model']['world_model_cfg']
    found = ', '.join(f'{name}={merged.get(name)}' for name in SHOWN)
    try:
        check_policy(POLICIES[policy], options)
        check_world_model_config(merged)
    except ValueError as error:
        return Check(Mark.FAIL, 'world model', found, str(error))
    return Check(Mark.OK, 'world model', found)


def _at(tree: Any, *names: str) -> Any:
    """Return the value at a path of nested mappings, None where the path ends early."""
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
