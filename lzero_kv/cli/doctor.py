"""`lzero-kv doctor`: what is installed, and whether the plugin would engage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from lzero_kv.cli.checks import Check, Mark, installation_checks
from lzero_kv.cli.console import show_line, show_table
from lzero_kv.cli.engagement import config_checks

COLOURS = {Mark.OK: 'green', Mark.WARN: 'yellow', Mark.FAIL: 'red'}


def doctor_with(arguments: Sequence[str]) -> Callable[..., int]:
    """The command, for a config that is itself given `arguments`."""

    def doctor(
        config: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar='[CONFIG]')] = None,
    ) -> int:
        """Check the installation and, where a config is given, whether the plugin would engage for it.

        The config's own code is executed, as `python CONFIG` would, up to the moment when it would start to
        train or to evaluate; nothing is trained and no folder is written. Check only files that you trust.
        What follows `--` is the config's own command line: lzero-kv doctor CONFIG.py -- --env ENV.

        Args:
            config: a config file in LightZero's form, which calls train_unizero or train_unizero_segment.

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

    return doctor


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
