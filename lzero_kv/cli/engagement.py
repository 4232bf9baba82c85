"""Whether the plugin would engage for a config of LightZero's form."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lzero_kv.cli.checks import Check, Mark
from lzero_kv.cli.training_call import ConfigError, TrainingCall, training_call
from lzero_kv.config import KVCacheConfig, validation_mode_of
from lzero_kv.lightzero.host import is_release
from lzero_kv.lightzero.settings import (
    FLAG,
    PLACE,
    POLICIES,
    check_policy,
    check_world_model_config,
    flag_of,
)

PLUGIN = 'lzero_kv.plugin'
ENTRIES = ('train_unizero', 'train_unizero_segment')
ASYNC_ENTRY = 'train_unizero_segment_async'
SHOWN = ('num_layers', 'num_heads', 'embed_dim', 'context_length')


def config_checks(path: Path, arguments: Sequence[str] = ()) -> list[Check]:
    """Run a config up to its training entry and return what the plugin would find there.

    The plugin engages when it is imported (import_names, or the config itself), the entry and the policy are
    ones it knows, the flag is on and the caches can be sized. One check each; any that is not ok keeps the
    stock cache or stops the training.
    """
    try:
        return call_checks(training_call(path, arguments))
    except ConfigError as error:
        return [Check(Mark.FAIL, 'config', str(path), str(error))]


def alone(call: TrainingCall, path: str, folder: Path, *, flag: bool) -> tuple[TrainingCall, list[str]]:
    """The call in one process and with a log folder of its own, with the plugin or without; and what had to
    be changed for that, in words.

    Raises:
        ConfigError: the entry or the policy is none that the plugin knows.
    """
    kind = _at(call.create_config, 'policy', 'type')
    if call.entry not in ENTRIES or kind not in POLICIES:
        raise ConfigError(
            f'{path} calls {call.entry} with the policy {kind!r}, for which there is no plugin; '
            f'give a config of {" or ".join(ENTRIES)} with {" or ".join(POLICIES)}'
        )
    config: Any = copy.deepcopy(call.config)
    create_config: Any = copy.deepcopy(call.create_config)
    notes = []
    config['policy']['model']['world_model_cfg'][FLAG] = flag
    names = list(create_config['policy'].get('import_names') or [f'lzero.policy.{kind}'])
    if flag and PLUGIN not in names:
        notes.append(f"'{PLUGIN}' is not in the config's import_names and was added for this run")
    names = [name for name in names if name != PLUGIN]
    create_config['policy']['import_names'] = [*names, PLUGIN] if flag else names
    if create_config['env_manager'].get('type') != 'base':
        notes.append("the environments ran in the training's process: env_manager.type='base'")
    create_config['env_manager'] = {'type': 'base'}
    config['policy']['use_wandb'] = False
    # relative: the host puts './' in front of it
    config['exp_name'] = os.path.relpath(folder)
    return dataclasses.replace(call, config=config, create_config=create_config), notes


def call_checks(call: TrainingCall) -> list[Check]:
    """What :func:`config_checks` says of a training call."""
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
        checks += _built_checks(call, world_model)
    return checks


def _entry_check(call: TrainingCall) -> Check:
    if call.entry in ENTRIES:
        return Check(Mark.OK, 'training entry', call.entry)
    if call.entry == ASYNC_ENTRY:
        where = 'each Ray actor keeps a cache and a log of its own (log/collector_async_<number>)'
        return Check(Mark.OK, 'training entry', f'{call.entry}: {where}')
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
    if _at(world_model, 'obs_type') == 'vector':
        remedy = (
            'LightZero stops at the first update: it adds up the gradients of all parameters, and those of '
            'the decoder of vector observations have none; leave multi_gpu out'
        )
        return [Check(Mark.FAIL, 'multi_gpu', 'with vector observations', remedy)]
    if not is_release():
        remedy = (
            'this LightZero stops at its second update: some of the numbers that it logs are tensors, and '
            'the log of several processes takes none; make them numbers in its policy/unizero.py'
        )
        return [Check(Mark.WARN, 'multi_gpu', 'several processes', remedy)]
    return [Check(Mark.OK, 'multi_gpu', 'one process for each GPU, started by torchrun')]


def _import_check(call: TrainingCall) -> Check:
    given = _at(call.create_config, 'policy', 'import_names') or ()
    names = [given] if isinstance(given, str) else list(given)
    found = ', '.join(map(str, names)) or 'none'
    if isinstance(given, str):
        # a string is a list of letters to LightZero
        names = sorted({f'lzero.policy.{_at(call.create_config, "policy", "type")}', given, PLUGIN})
        remedy = f'a list is expected; write policy.import_names={names!r} in the create config'
        return Check(Mark.FAIL, 'import_names', repr(given), remedy)
    if PLUGIN in names:
        return Check(Mark.OK, 'import_names', found)
    if call.plugin_imported:
        return Check(Mark.OK, 'import_names', f'{found}; the config imports {PLUGIN} itself')
    remedy = (
        f'the flag does nothing without the plugin; write policy.import_names={[*names, PLUGIN]!r} '
        'in the create config'
    )
    return Check(Mark.FAIL, 'import_names', found, remedy)


def _flag_check(world_model: Any) -> Check:
    try:
        if flag_of(world_model if isinstance(world_model, Mapping) else {}):
            return Check(Mark.OK, FLAG, 'True')
    except TypeError as error:
        return Check(Mark.FAIL, FLAG, repr(world_model[FLAG]), str(error))
    remedy = f'the stock cache is used; write {PLACE}=dict(..., {FLAG}=True)'
    found = 'False' if _at(world_model, FLAG) is False else 'not in world_model_cfg'
    return Check(Mark.FAIL, FLAG, found, remedy)


def _values_check(world_model: Any) -> Check:
    given = _at(world_model, 'kv_cache') or {}
    try:
        KVCacheConfig.from_world_model_cfg(world_model if world_model is not None else {})
    except (ValueError, TypeError) as error:
        return Check(Mark.FAIL, 'kv_cache', str(given), str(error))
    values = ', '.join(f'{name}={value}' for name, value in dict(given).items())
    return Check(Mark.OK, 'kv_cache', values or 'defaults')


def _backend_checks(call: TrainingCall, world_model: Any) -> list[Check]:
    """Return how the steps of a search would run on the device that the host would take here."""
    from lzero_kv.lightzero.start import device_of

    try:
        config = KVCacheConfig.from_world_model_cfg(world_model if world_model is not None else {})
    except (ValueError, TypeError):
        return []  # the check of the values says why
    device = device_of(_at(call.config, 'policy') or {})
    found = f'{config.backend_on(device)} on {device}' + (' (auto)' if config.backend == 'auto' else '')
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


def _built_checks(call: TrainingCall, given: Any) -> list[Check]:
    """Return what the plugin says to the policy that the host would build, defaults included."""
    from ding.utils import POLICY_REGISTRY, deep_merge_dicts
    from easydict import EasyDict

    from lzero_kv.lightzero.start import known_names, misplaced_options, planned

    kind, policy = call.create_config['policy']['type'], call.config.get('policy', {})
    importlib.import_module(f'lzero.policy.{kind}')
    defaults = POLICY_REGISTRY.get(kind).default_config()
    checks = [
        Check(Mark.WARN, 'option', text.partition(' ')[0], text)
        for text in misplaced_options(policy, known_names(defaults))
    ]
    merged = EasyDict(deep_merge_dicts(defaults, policy))
    world_model = merged['model']['world_model_cfg']
    found = ', '.join(f'{name}={world_model.get(name)}' for name in SHOWN)
    try:
        check_policy(POLICIES[kind], merged)
        check_world_model_config(world_model)
    except ValueError as error:
        return [*checks, Check(Mark.FAIL, 'world model', found, str(error))]
    checks.append(Check(Mark.OK, 'world model', found))
    try:
        checks.append(Check(Mark.OK, 'caches', str(planned(merged))))
    except (ValueError, TypeError) as error:
        if _values_check(given).mark is Mark.OK:  # else its check says why
            checks.append(Check(Mark.FAIL, 'caches', 'cannot be made', str(error)))
    return [*checks, *_environment_checks(call, merged), *_model_checks(call)]


def _environment_checks(call: TrainingCall, policy: Any) -> list[Check]:
    """Return the numbers of environments that the policy does not know of."""
    checks = []
    for name in ('collector_env_num', 'evaluator_env_num'):
        made = _at(call.config, 'env', name)
        if isinstance(made, int) and made > policy[name]:
            remedy = f'the policy has room for {policy[name]}: write policy.{name}={made}'
            checks.append(Check(Mark.FAIL, name, f'{made} in env, {policy[name]} in policy', remedy))
    return checks


def _model_checks(call: TrainingCall) -> list[Check]:
    """Return whether a model that the config built has the plugin's world model."""
    model = call.options.get('model')
    if model is None:
        return []
    from lzero_kv.lightzero.world_model import KVWorldModel

    kind = type(getattr(model, 'world_model', None))
    if issubclass(kind, KVWorldModel):
        return [Check(Mark.OK, 'model', kind.__name__)]
    remedy = f'the model was built before the plugin; import {PLUGIN} at the top of the config'
    return [Check(Mark.FAIL, 'model', f'{kind.__name__}, built by the config', remedy)]


def _at(tree: Any, *names: str) -> Any:
    """Return the value at a path of nested mappings, None where the path ends early."""
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
