"""`lzero-kv doctor`: what is installed, and whether the plugin would engage for a config."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from lzero_kv.cli.checks import Check, Mark, installation_checks
from lzero_kv.cli.console import show_line, show_table
from lzero_kv.cli.training_call import ENTRIES, PLUGIN, ConfigError, OfConfig, TrainingCall, at, training_call
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

COLOURS = {Mark.OK: 'green', Mark.WARN: 'yellow', Mark.FAIL: 'red'}
ASYNC_ENTRY = 'train_unizero_segment_async'
SHOWN = ('num_layers', 'num_heads', 'embed_dim', 'context_length')


def doctor(
    config: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar='[CONFIG]')] = None,
    arguments: OfConfig = (),
) -> int:
    """Check the installation and, where a config is given, whether the plugin would engage for it.

    The config's own code is executed, as `python CONFIG` would, up to the moment when it would start to
    train or to evaluate; nothing is trained and no folder is written. Check only files that you trust.
    What follows `--` is the config's own command line: lzero-kv doctor CONFIG.py -- --env ENV.

    Args:
        config: a config file in LightZero's form, which calls train_unizero or train_unizero_segment.
        arguments: of the config.

    Returns:
        0 when nothing failed, else 1. A warning concerns only the tasks that it names.
    """
    checks = installation_checks()
    installed = all(check.mark is not Mark.FAIL for check in checks)
    if config is not None and installed:
        checks += config_checks(config, arguments)
    show_table(_table(checks))
    for check in checks:
        if check.remedy:
            show_line(f'{check.mark.value} {check.subject}: {check.remedy}')
    failed = any(check.mark is Mark.FAIL for check in checks)
    show_line(_verdict(config, installed, failed))
    return 1 if failed else 0


def _table(checks: list[Check]) -> Table:
    table = Table(title='lzero-kv doctor', title_justify='left')
    table.add_column('')
    table.add_column('what')
    table.add_column('found')
    for check in checks:
        table.add_row(
            Text(check.mark.value, style=COLOURS[check.mark]), Text(check.subject), Text(check.found)
        )
    return table


def _verdict(config: Path | None, installed: bool, failed: bool) -> str:
    if not installed:
        return 'The plugin cannot engage here: the installation lacks what the lines marked fail name.'
    if config is None:
        return 'The plugin can engage here. To check a config: lzero-kv doctor CONFIG.py'
    if failed:
        return f'The plugin would NOT engage for {config}: see the lines marked fail.'
    return f'The plugin would engage for {config}.'


def config_checks(path: Path, arguments: Sequence[str] = ()) -> list[Check]:
    """Run a config up to its training entry and check what it would train."""
    try:
        return call_checks(training_call(path, arguments))
    except ConfigError as error:
        return [Check(Mark.FAIL, 'config', str(path), str(error))]


def call_checks(call: TrainingCall) -> list[Check]:
    """What the plugin would find in the training that a config starts.

    The plugin engages when it is imported (import_names, or the config itself), the entry and the policy are
    ones it knows, the flag is on and the caches can be sized. One check each; any that is not ok keeps the
    stock cache or stops the training.
    """
    world_model = at(call.config, 'policy', 'model', 'world_model_cfg')
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
    if at(call.create_config, 'policy', 'type') in POLICIES:
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
    policy = at(call.create_config, 'policy', 'type')
    if policy in POLICIES:
        return Check(Mark.OK, 'policy', policy)
    return Check(
        Mark.FAIL, 'policy', str(policy), f'create_config.policy.type must be one of {", ".join(POLICIES)}'
    )


def _process_checks(call: TrainingCall, world_model: Any) -> list[Check]:
    """Return whether LightZero itself can train on several GPUs, where that is asked for."""
    if not at(call.config, 'policy', 'multi_gpu'):
        return []
    if at(world_model, 'obs_type') == 'vector':
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
    given = at(call.create_config, 'policy', 'import_names') or ()
    names = [given] if isinstance(given, str) else list(given)
    found = ', '.join(map(str, names)) or 'none'
    if isinstance(given, str):
        # a string is a list of letters to LightZero
        names = sorted({f'lzero.policy.{at(call.create_config, "policy", "type")}', given, PLUGIN})
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
    found = 'False' if at(world_model, FLAG) is False else 'not in world_model_cfg'
    return Check(Mark.FAIL, FLAG, found, remedy)


def _values_check(world_model: Any) -> Check:
    given = at(world_model, 'kv_cache') or {}
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
    device = device_of(at(call.config, 'policy') or {})
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
        made = at(call.config, 'env', name)
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
