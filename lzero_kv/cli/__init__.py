"""The command `lzero-kv`.

`config` prints a config to copy, `report` shows a log, `doctor` checks an installation and a config,
`compare` trains a config with the flag off and on, `validate` runs it with both caches side by side,
`explain` reads a finding that a validation saved, `llm` measures layer budgets of language models.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from functools import partial

import tyro

from lzero_kv import __version__
from lzero_kv.cli.compare import compare
from lzero_kv.cli.config import config
from lzero_kv.cli.console import show_error, show_line
from lzero_kv.cli.doctor import doctor
from lzero_kv.cli.explain import explain
from lzero_kv.cli.llm import llm
from lzero_kv.cli.report import report
from lzero_kv.cli.validate import validate

__all__ = ['main']

TAKE_ARGUMENTS = ('doctor', 'compare', 'validate')
INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: of an error 1, and its text is on standard error.

    Args:
        args: the arguments after the command's name; None takes those of the process. What follows `--` is
            the command line of the config that `doctor`, `compare` or `validate` runs.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        return _run(given)
    except KeyboardInterrupt:
        show_error(_interrupted(given))
        return INTERRUPTED
    except (ImportError, OSError, ValueError) as error:
        show_error(str(error))
        return 1


def _interrupted(given: list[str]) -> str:
    if given[:1] == ['validate']:
        return 'interrupted; no report was written'
    if given[:1] == ['compare'] or given[:2] == ['llm', 'run']:
        return 'interrupted; the same command goes on where it stopped'
    return 'interrupted'


def _run(given: list[str]) -> int:
    place = given.index('--') if '--' in given else len(given)
    own, arguments = given[:place], tuple(given[place + 1 :])
    if arguments and own[:1] not in ([name] for name in TAKE_ARGUMENTS):
        names = ', '.join(TAKE_ARGUMENTS)
        show_error(f'only {names} take arguments of a config after --, got {" ".join(arguments)}')
        return 2
    if own == ['--version']:
        show_line(f'lzero-kv {__version__}')
        return 0
    if own[:1] == ['llm']:
        return llm(tuple(own[1:]))
    commands = {
        'config': config,
        'report': report,
        'doctor': partial(doctor, arguments=arguments),
        'compare': partial(compare, arguments=arguments),
        'validate': partial(validate, arguments=arguments, command=shlex.join(['lzero-kv', *given])),
        'explain': explain,
        'llm': llm,
    }
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog='lzero-kv',
        description='See and check the KV cache of a LightZero UniZero training, or of a language model.',
        args=own,
    )
