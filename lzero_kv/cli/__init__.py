"""The command `lzero-kv`.

`config` prints a config to copy, `report` shows a log, `doctor` checks an installation and a config,
`compare` trains a config with the flag off and on, `validate` runs it with both caches side by side,
`explain` reads a finding that a validation saved, `llm` measures layer budgets of language models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from lzero_kv import __version__
from lzero_kv.cli.compare import compare_with
from lzero_kv.cli.config import config
from lzero_kv.cli.console import show_error, show_line
from lzero_kv.cli.doctor import doctor_with
from lzero_kv.cli.explain import explain
from lzero_kv.cli.llm import llm
from lzero_kv.cli.report import report
from lzero_kv.cli.validate import validate_with

__all__ = ['main']

TAKE_ARGUMENTS = ('doctor', 'compare', 'validate')


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: the arguments after the command's name; None takes those of the process. What follows `--` is
            the command line of the config that `doctor`, `compare` or `validate` runs.
    """
    own, of_config = _parted(list(sys.argv[1:] if args is None else args))
    if of_config and own[:1] not in ([name] for name in TAKE_ARGUMENTS):
        show_error(
            f'only {", ".join(TAKE_ARGUMENTS)} take arguments of a config after --, got {" ".join(of_config)}'
        )
        return 2
    if own == ['--version']:
        show_line(f'lzero-kv {__version__}')
        return 0
    if own[:1] == ['llm']:
        return llm(own[1:])
    commands = {
        'config': config,
        'report': report,
        'doctor': doctor_with(of_config),
        'compare': compare_with(of_config),
        'validate': validate_with(of_config),
        'explain': explain,
        'llm': _llm_help,
    }
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog='lzero-kv',
        description='See and check the KV cache of a LightZero UniZero training, or of a language model.',
        args=own,
    )


def _llm_help() -> int:
    """Measure layer budgets of language models beside the full cache, and report: run, report."""
    return llm(['--help'])


def _parted(args: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and what after it."""
    if '--' not in args:
        return args, []
    place = args.index('--')
    return args[:place], args[place + 1 :]
