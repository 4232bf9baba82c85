"""Commands whose output goes to a log while one line on the screen tells how far they are."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import IO

REFRESH_SECONDS = 0.25
TAIL_LINES = 12

CAUSES = (
    (
        (
            'Temporary failure in name resolution',
            'NewConnectionError',
            'Network is unreachable',
            'ProxyError',
            'Connection refused',
            'ConnectTimeout',
            'ReadTimeout',
            'Name or service not known',
        ),
        'pip could not reach the package registry: this step needs the network.\n'
        'Check the connection, or the proxy and index settings that `pip config list` shows.',
    ),
    (
        ('No space left on device', 'Disk quota exceeded'),
        'the disk is full. The environment takes about 2 GB (more than 6 GB with the CUDA build of torch).',
    ),
    (
        ('CERTIFICATE_VERIFY_FAILED', 'SSLError'),
        "pip does not trust the registry's certificate. Behind a proxy, set PIP_CERT to its certificate.",
    ),
    (
        ('No matching distribution found',),
        'the registry has no such version for this system. The pins are for Python 3.11 on Linux x86-64.',
    ),
)


class SetupError(Exception):
    """The set-up cannot go on; the message says what was expected, what came, and what to do."""


class Console:
    """One line per stage. On a terminal the line is redrawn with the seconds and pip's latest word."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.live = stream.isatty()
        self.title = ''
        self.started = 0.0

    def say(self, text: str) -> None:
        self.stream.write(text + '\n')
        self.stream.flush()

    def begin(self, title: str) -> None:
        self.title, self.started = title, time.monotonic()
        self.stream.write(f'  {title:<62}')
        self.stream.flush()

    def refresh(self, output: list[str]) -> None:
        """Redraw the line of a running stage with its last output; does nothing without a terminal."""
        if not self.live:
            return
        latest = output[-1].strip() if output else ''
        width = shutil.get_terminal_size().columns - 1
        line = f'  {self.title:<62}{time.monotonic() - self.started:7.0f} s  {latest}'
        self.stream.write('\r\x1b[K' + line[:width])
        self.stream.flush()

    def end(self, word: str = '') -> None:
        seconds = f'{time.monotonic() - self.started:7.1f} s'
        start = f'\r\x1b[K  {self.title:<62}' if self.live else ''
        self.say(f'{start}{seconds}{"  " + word if word else ""}')


def explain(command: list[str], status: int, output: list[str], log: Path) -> str:
    """The failure of a command in words: its likely cause, its last lines, and where all of them are."""
    text = '\n'.join(output)
    cause = next((words for signs, words in CAUSES if any(sign in text for sign in signs)), None)
    tail = '\n'.join(f'    {line}' for line in output[-TAIL_LINES:])
    return (
        f'{cause or f"a command ended with status {status}: " + " ".join(command)}\n'
        f'Its last lines (all of them: {log}):\n{tail}\n'
        'What is finished is kept: the same command goes on from here.'
    )


def run_logged(command: list[str], log: Path, console: Console, *, cwd: Path, keep_open: int = -1) -> None:
    """Run `command`, its output appended to `log`, the console refreshed meanwhile.

    keep_open: a file descriptor that the command inherits, or -1. A lock held on it lives as long as the
    command, even when this process is killed. Raises SetupError if the command fails.
    """
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'PIP_USER': '0'}
    environment.pop('PYTHONPATH', None)
    with log.open('a', encoding='utf-8') as file:
        file.write('$ ' + ' '.join(command) + '\n')
        file.flush()
        start = file.tell()
        with subprocess.Popen(
            command, cwd=cwd, env=environment, pass_fds=(keep_open,) if keep_open >= 0 else (),
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            while process.poll() is None:
                console.refresh(lines_after(log, start))
                try:
                    process.wait(timeout=REFRESH_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
    if process.returncode != 0:
        raise SetupError(explain(command, process.returncode, lines_after(log, start), log))


def lines_after(log: Path, start: int) -> list[str]:
    """The lines of a log from byte `start` on."""
    with log.open('rb') as file:
        file.seek(start)
        return file.read().decode('utf-8', errors='replace').splitlines()
