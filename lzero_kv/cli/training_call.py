"""Finds out which config a LightZero config file would train with, by running it up to the training entry."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from lzero_kv.lightzero.install import installed
from lzero_kv.lightzero.settings import FLAG, PLACE, POLICIES

PLUGIN = 'lzero_kv.plugin'
ENTRIES = ('train_unizero', 'train_unizero_segment')
OfConfig = Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress]
"""Arguments of a config, which its command takes behind `--`."""


class ConfigError(ValueError):
    """A file is no config of LightZero's form; the message says why."""


@dataclass(frozen=True)
class TrainingCall:
    """What a config file hands to LightZero.

    Attributes:
        entry: the entry's name, such as train_unizero.
        config: the main config.
        create_config: the create config.
        options: every other argument that was given, by the name of its parameter (seed, max_env_step, ...).
        plugin_imported: whether the config installed the plugin itself.
        path: the config file.
    """

    entry: str
    config: Mapping[str, Any]
    create_config: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    plugin_imported: bool = False
    path: Path = Path()

    def run(self, **options: Any) -> None:
        """Train, with ``options`` in the place of the config's own."""
        sys.path.insert(0, str(self.path.resolve().parent))  # as `python CONFIG` has it
        import lzero.entry

        entry = getattr(lzero.entry, self.entry)
        entry([self.config, self.create_config], **{**self.options, **options})


class _Reached(BaseException):
    """Leaves the config file at the training entry; no Exception, so that the file cannot catch it by
    accident.
    """

    def __init__(self, call: TrainingCall) -> None:
        super().__init__()
        self.call = call


def training_call(path: Path, arguments: Sequence[str] = ()) -> TrainingCall:
    """Run a file as `python PATH ARGUMENTS` and return the call with which it would start to train.

    LightZero's configs build their dictionaries at import or in a `main` with arguments of its own, so only
    running one tells what it says. What the file prints is dropped. The command line, the search path and
    the working folder are the same afterwards.

    Raises:
        ConfigError: there is no such file, it fails, or it ends without calling an entry.
    """
    if not path.is_file():
        raise ConfigError(f'{path} is no file; give a config file that LightZero can run')
    argv, search_path = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    sink = io.StringIO()
    try:
        with (
            contextlib.chdir(os.curdir),
            _entries_replaced(),
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            runpy.run_path(str(path), run_name='__main__')
    except _Reached as reached:
        return dataclasses.replace(reached.call, path=path)
    except SystemExit as end:
        raise ConfigError(
            f'{path} exited with code {end.code} before it called a training entry{_last_words(sink)}'
        ) from end
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f'{path} fails: {type(error).__name__}: {error}') from error
    finally:
        sys.argv = argv
        sys.path[:] = search_path
    raise ConfigError(f'{path} ended without calling a training entry such as lzero.entry.train_unizero')


def _last_words(sink: io.StringIO) -> str:
    """The last line that a file printed, which for a wrong argument says which."""
    lines = sink.getvalue().strip().splitlines()
    return f': {lines[-1].strip()}' if lines else ''


@contextlib.contextmanager
def _entries_replaced() -> Iterator[None]:
    """Put a function that reports its arguments in the place of every entry of the host; the context of
    several processes, which needs torchrun and GPUs, does nothing."""
    with contextlib.redirect_stderr(io.StringIO()):
        import ding.utils
        import lzero.entry
    replaced: list[tuple[Any, str, Any]] = []
    try:
        replaced.append((ding.utils, 'DDPContext', ding.utils.DDPContext))
        ding.utils.DDPContext = contextlib.nullcontext
        for name in [name for name in vars(lzero.entry) if name.startswith(('train_', 'eval_'))]:
            original = getattr(lzero.entry, name)
            # The module of the same name holds the function too: a config may import it from there.
            for owner in (lzero.entry, sys.modules.get(f'lzero.entry.{name}')):
                if owner is not None and callable(original):
                    replaced.append((owner, name, getattr(owner, name)))
                    setattr(owner, name, _reporter(name, original))
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)


def _reporter(entry: str, original: Callable[..., Any]) -> Callable[..., NoReturn]:
    parameters = inspect.signature(original)

    def report(*args: Any, **kwargs: Any) -> NoReturn:
        try:
            options = dict(parameters.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise ConfigError(f'{entry} cannot be called like that: {error}') from error
        if 'input_cfg' not in options:
            raise ConfigError(f'{entry} takes no pair of configs, expected an entry such as train_unizero')
        given = options.pop('input_cfg')
        if not isinstance(given, (list, tuple)) or len(given) != 2:
            raise ConfigError(
                f'{entry} must be called with [main_config, create_config], got {type(given).__name__}'
            )
        raise _Reached(TrainingCall(entry, given[0], given[1], options, installed()))

    return report


def alone(call: TrainingCall, folder: Path, *, flag: bool) -> tuple[TrainingCall, list[str]]:
    """The call in one process and with a log folder of its own, with the plugin or without; and what had to
    be changed for that, in words.

    Raises:
        ConfigError: the entry or the policy is none that the plugin knows, or what has to be changed is of
            another kind than LightZero reads.
    """
    kind = at(call.create_config, 'policy', 'type')
    if call.entry not in ENTRIES or kind not in POLICIES:
        raise ConfigError(
            f'{call.path} calls {call.entry} with the policy {kind!r}, for which there is no plugin; '
            f'give a config of {" or ".join(ENTRIES)} with {" or ".join(POLICIES)}'
        )
    if remedy := without_attributes(call):
        raise ConfigError(f'{call.path}: {remedy}')
    world_model = at(call.config, *PLACE.split('.'))
    if not isinstance(world_model, Mapping):
        raise ConfigError(
            f'{call.path}: expected a dictionary {PLACE}, found {world_model!r}; write {PLACE}=dict(...) in '
            'the main config'
        )
    given = at(call.create_config, 'policy', 'import_names') or [f'lzero.policy.{kind}']
    if not isinstance(given, (list, tuple)):
        raise ConfigError(
            f'{call.path}: expected a list policy.import_names, found {given!r}; write '
            f'policy.import_names={import_names(kind, given)!r} in the create config'
        )
    config: Any = copy.deepcopy(call.config)
    create_config: Any = copy.deepcopy(call.create_config)
    notes = []
    config['policy']['model']['world_model_cfg'][FLAG] = flag
    if flag and PLUGIN not in given:
        notes.append(f"'{PLUGIN}' is not in the config's import_names and was added for this run")
    names = [name for name in given if name != PLUGIN]
    create_config['policy']['import_names'] = [*names, PLUGIN] if flag else names
    if at(create_config, 'env_manager', 'type') != 'base':
        notes.append("the environments ran in the training's process: env_manager.type='base'")
    create_config['env_manager'] = {'type': 'base'}
    config['policy']['use_wandb'] = False
    # relative: the host puts './' in front of it
    config['exp_name'] = os.path.relpath(folder)
    return dataclasses.replace(call, config=config, create_config=create_config), notes


def without_attributes(call: TrainingCall) -> str:
    """What to write where configs are plain dicts, at which LightZero stops; empty where none is."""
    configs = {'main_config': call.config, 'create_config': call.create_config}
    plain = [name for name, given in configs.items() if 'policy' in given and not hasattr(given, 'policy')]
    written = ' and '.join(f'{name} = EasyDict({name})' for name in plain)
    return f'the entry reads attributes, which a dict has not; write {written}' if plain else ''


def import_names(kind: Any, given: Any) -> list[str]:
    """The list to write in the place of import_names that are no list."""
    return sorted({f'lzero.policy.{kind}', PLUGIN, *([given] if isinstance(given, str) else [])})


def at(tree: Any, *names: str) -> Any:
    """The value at a path of nested mappings, None where the path ends early."""
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree
