"""`lzero-kv doctor`: what is installed, and whether the plugin would engage for a config."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from lzero_kv.cli.console import show_line, show_table
from lzero_kv.cli.training_call import (
    ENTRIES,
    PLUGIN,
    ConfigError,
    OfConfig,
    TrainingCall,
    at,
    import_names,
    training_call,
    without_attributes,
)
from lzero_kv.config import KVCacheConfig, validation_mode_of
from lzero_kv.lightzero import host
from lzero_kv.lightzero.fingerprints import changed
from lzero_kv.lightzero.settings import (
    FLAG,
    PLACE,
    POLICIES,
    check_policy,
    check_world_model_config,
    flag_of,
)

ASYNC_ENTRY = 'train_unizero_segment_async'
SHOWN = ('num_layers', 'num_heads', 'embed_dim', 'context_length')
TRAINED_PYTHONS = ('3.11', '3.12')
ROM_RELEASE = 'ale-py==0.12.1'
# setuptools left pkg_resources out from 82 on
PAGE_MODULES = ('pkg_resources', 'markdown', 'werkzeug', 'grpc')
PAGE_PACKAGES = ('"setuptools<82"', 'Markdown', 'Werkzeug', 'grpcio')
COLOURS = {'ok': 'green', 'warn': 'yellow', 'fail': 'red'}


class Mark(Enum):
    """The result of one check; the value is what the table shows."""

    OK = 'ok'
    WARN = 'warn'
    FAIL = 'fail'


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table; `remedy` says what to write or run and is empty where all is well."""

    mark: Mark
    subject: str
    found: str
    remedy: str = ''


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
    table = Table('', 'what', 'found', title='lzero-kv doctor', title_justify='left')
    for check in checks:
        mark = check.mark.value
        table.add_row(Text(mark, style=COLOURS[mark]), Text(check.subject), Text(check.found))
    return table


def _verdict(config: Path | None, installed: bool, failed: bool) -> str:
    if not installed:
        return 'The plugin cannot engage here: the installation lacks what the lines marked fail name.'
    if config is None:
        return 'The plugin can engage here. To check a config: lzero-kv doctor CONFIG.py'
    if failed:
        return f'The plugin would NOT engage for {config}: see the lines marked fail.'
    return f'The plugin would engage for {config}.'


def installation_checks() -> list[Check]:
    """Return the checks that need no config, in the order of the table."""
    return [
        python_check(),
        distribution_check('torch', Mark.FAIL, 'pip install torch'),
        numpy_check(),
        tensorboard_check(),
        host_check(),
        distribution_check('DI-engine', Mark.FAIL, 'pip install "DI-engine==0.5.3"'),
        plugin_check(),
        ale_check(),
        rom_check(),
        distribution_check(
            'pycolab', Mark.WARN, 'needed by the memory tasks only: pip install "pycolab==1.2"'
        ),
    ]


def python_check() -> Check:
    """Return which Python runs."""
    version = platform.python_version()
    if version.rpartition('.')[0] in TRAINED_PYTHONS:
        return Check(Mark.OK, 'Python', version)
    trained = ' and '.join(TRAINED_PYTHONS)
    return Check(Mark.WARN, 'Python', version, f'the plugin was trained with Python {trained} only')


def distribution_check(name: str, if_missing: Mark, remedy: str) -> Check:
    """Return the version of a distribution; `if_missing` and `remedy` say how bad its absence is."""
    version = installed_version(name)
    if version is None:
        return Check(if_missing, name, 'not installed', remedy)
    return Check(Mark.OK, name, version)


def numpy_check() -> Check:
    """Return the version of numpy, which the host needs below 2."""
    check = distribution_check('numpy', Mark.FAIL, 'pip install "numpy<2"')
    if check.mark is Mark.OK and int(check.found.split('.')[0]) >= 2:
        remedy = 'gym 0.25.1 and rotary positions of LightZero fail with numpy 2: pip install "numpy<2"'
        return Check(Mark.WARN, 'numpy', check.found, remedy)
    return check


def tensorboard_check() -> Check:
    """Return TensorBoard's version; its page needs modules that writing a log does not."""
    version = installed_version('tensorboard')
    if version is None:
        return Check(Mark.FAIL, 'tensorboard', 'not installed', 'pip install tensorboard')
    # later releases of it do without
    default = (package_folder('tensorboard') / 'default.py').read_text(encoding='utf-8')
    needed = [name for name in PAGE_MODULES if name != 'pkg_resources' or f'import {name}' in default]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        remedy = f'the log is written, the page cannot start: pip install {" ".join(PAGE_PACKAGES)}'
        return Check(Mark.WARN, 'tensorboard', f'{version} without {", ".join(missing)}', remedy)
    return Check(Mark.OK, 'tensorboard', version)


def host_check() -> Check:
    """Return which host was found, and whether its functions are those that were tested."""
    version = host.installed_version()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what LightZero's own imports warn of
            profile = host.check_supported()
    except RuntimeError as error:
        return Check(Mark.FAIL, 'host', f'LightZero {version}' if version else 'no LightZero', str(error))
    newer = changed(profile)
    if not newer:
        return Check(Mark.OK, 'host', f'LightZero {profile} (as tested)')
    remedy = (
        f'newer than tested: these functions differ: {", ".join(newer)}; train a while with '
        "cache_validation_mode='recompute'"
    )
    return Check(Mark.WARN, 'host', f'LightZero {profile} (newer than tested)', remedy)


def plugin_check() -> Check:
    """Return the module that a config imports."""
    spec = importlib.util.find_spec(PLUGIN)
    assert spec is not None
    return Check(Mark.OK, 'plugin', str(spec.origin))


def ale_check() -> Check:
    """Return the Atari emulator; LightZero 0.2.0 builds its environments with gym 0.25.1, which finds ale-py
    below 0.9 only, and its development branch with gymnasium, which wants 0.10.1.
    """
    check = distribution_check('ale-py', Mark.WARN, 'needed by Atari only: pip install "ale-py==0.8.1"')
    if check.mark is not Mark.OK:
        return check
    release, remedy = tuple(int(part) for part in check.found.split('.')[:3]), ''
    if host.is_release() and release >= (0, 9):
        remedy = 'gym 0.25.1 cannot make Atari environments with it: pip install "ale-py==0.8.1"'
    if not host.is_release() and release < (0, 10, 1):
        remedy = 'needed by Atari only: pip install "ale-py>=0.10.1"'
    return Check(Mark.WARN, 'ale-py', check.found, remedy) if remedy else check


def rom_check() -> Check:
    """Return how many Atari ROM files ale-py can find, in its own folder and in ALE_PY_ROM_DIR."""
    if importlib.util.find_spec('ale_py') is None:
        return Check(
            Mark.WARN,
            'Atari ROM files',
            'no ale-py to hold them',
            'needed by Atari only: install ale-py first',
        )
    folder = package_folder('ale_py') / 'roms'
    extra = os.environ.get('ALE_PY_ROM_DIR')
    folders = [folder, *([Path(extra)] if extra else [])]
    files = {path.name for place in folders for path in place.glob('*.bin')}
    if not files:
        remedy = (
            f'needed by Atari only: pip install --no-deps --target ROMS "{ROM_RELEASE}" '
            f'and copy ROMS/ale_py/roms/*.bin into {folder}'
        )
        return Check(Mark.WARN, 'Atari ROM files', f'none in {folder}', remedy)
    return Check(Mark.OK, 'Atari ROM files', f'{len(files)} in {folder}')


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_folder(name: str) -> Path:
    """Return the folder of a package without importing it.

    Raises:
        RuntimeError: there is no such package.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f'expected a package {name}, found none; install it')
    return Path(next(iter(spec.submodule_search_locations)))


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
    stock cache or stops the training. A config that cannot be read so far has one check alone.
    """
    try:
        return _checks_of(call)
    except (TypeError, AttributeError, KeyError) as error:
        remedy = (
            f'its values cannot be read: {type(error).__name__}: {error}; compare it with a config that '
            'lzero-kv config prints'
        )
        return [Check(Mark.FAIL, 'config', str(call.path), remedy)]


def _checks_of(call: TrainingCall) -> list[Check]:
    world_model = at(call.config, 'policy', 'model', 'world_model_cfg')
    choices = _choice_checks(call, world_model)
    checks = [
        _entry_check(call),
        _policy_check(call),
        *_process_checks(call, world_model),
        _import_check(call),
        _flag_check(world_model),
        *choices,
        *_validation_checks(world_model),
    ]
    if at(call.create_config, 'policy', 'type') in POLICIES:
        checks += _built_checks(call, chosen=len(choices) > 1)
    return checks


def _entry_check(call: TrainingCall) -> Check:
    if remedy := without_attributes(call):
        return Check(Mark.FAIL, 'training entry', f'{call.entry} with a dict', remedy)
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
    if not host.is_release():
        remedy = (
            'this LightZero stops at its second update: some of the numbers that it logs are tensors, and '
            'the log of several processes takes none; make them numbers in its policy/unizero.py'
        )
        return [Check(Mark.WARN, 'multi_gpu', 'several processes', remedy)]
    return [Check(Mark.OK, 'multi_gpu', 'one process for each GPU, started by torchrun')]


def _import_check(call: TrainingCall) -> Check:
    given = at(call.create_config, 'policy', 'import_names') or ()
    if not isinstance(given, (list, tuple)):  # a string is a list of letters to LightZero
        names = import_names(at(call.create_config, 'policy', 'type'), given)
        remedy = f'a list is expected; write policy.import_names={names!r} in the create config'
        return Check(Mark.FAIL, 'import_names', repr(given), remedy)
    names, found = list(given), ', '.join(map(str, given)) or 'none'
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


def _choice_checks(call: TrainingCall, world_model: Any) -> list[Check]:
    """Return what is chosen, and how a search would run on the device that the host would take here."""
    from lzero_kv.lightzero.start import device_of

    given = at(world_model, 'kv_cache') or {}
    try:
        config = KVCacheConfig.from_world_model_cfg(world_model if world_model is not None else {})
    except (ValueError, TypeError) as error:
        return [Check(Mark.FAIL, 'kv_cache', str(given), str(error))]
    values = ', '.join(f'{name}={value}' for name, value in dict(given).items())
    device = device_of(at(call.config, 'policy') or {})
    found = f'{config.backend_on(device)} on {device}' + (' (auto)' if config.backend == 'auto' else '')
    backend = Check(Mark.OK, 'backend', found)
    if config.backend == 'cudagraph' and device != 'cuda':
        remedy = "there is no CUDA device, searches would go on with 'eager'; leave backend out"
        backend = Check(Mark.WARN, 'backend', found, remedy)
    return [Check(Mark.OK, 'kv_cache', values or 'defaults'), backend]


def _validation_checks(world_model: Any) -> list[Check]:
    try:
        mode = validation_mode_of(world_model if world_model is not None else {})
    except ValueError:
        return []  # the check of the world model says why
    return [Check(Mark.OK, 'validation', mode or 'off')]


def _built_checks(call: TrainingCall, *, chosen: bool) -> list[Check]:
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
        if chosen:  # else the check of the choices says why
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
