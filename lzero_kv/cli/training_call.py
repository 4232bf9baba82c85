"""Finds out which config a LightZero config file would train with, by running it up to the training entry."""

from __future__ import annotations

import contextlib
import inspect
import io
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from lzero_kv.lightzero.install import installed


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
    """

    entry: str
    config: Mapping[str, Any]
    create_config: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    plugin_imported: bool = False


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
    running one tells what it says. What the file prints is dropped.

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
        with _entries_replaced(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            runpy.run_path(str(path), run_name='__main__')
    except _Reached as reached:
        return reached.call
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
