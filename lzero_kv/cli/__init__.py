"""The command `lzero-kv`: `report` shows a log, `doctor` checks an installation and a config."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from lzero_kv.cli.doctor import doctor
from lzero_kv.cli.report import report

__all__ = ['main']


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        args: the arguments after the command's name; None takes those of the process.
    """
    commands = {'report': report, 'doctor': doctor}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog='lzero-kv',
        description='See and check the KV cache of a LightZero UniZero training.',
        args=list(sys.argv[1:] if args is None else args),
    )
