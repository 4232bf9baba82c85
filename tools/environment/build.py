"""Bring the virtual environment up to date: do the stages whose result is missing, remember each one done."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

from environment.commands import Console, SetupError
from environment.stages import PYTHON_VERSION, ROOT, STATE_NAME, Environment, Stage, all_stages, prepare

INTERRUPTED = 130


def digests(stages: list[Stage]) -> dict[str, str]:
    """A digest per stage over its inputs and those of all stages before it."""
    running = hashlib.sha256()
    result = {}
    for stage in stages:
        running.update(f'{stage.name}\0{stage.inputs}\0'.encode())
        result[stage.name] = running.hexdigest()
    return result


def read_state(folder: Path) -> dict[str, str]:
    """The digests of the finished stages; empty when none is remembered or the file is damaged."""
    try:
        state = json.loads((folder / STATE_NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(folder: Path, state: dict[str, str]) -> None:
    """Remember the finished stages; a reader sees the old file or the new one, never a part."""
    partial = folder / (STATE_NAME + '.partial')
    partial.write_text(json.dumps(state, indent=1))
    os.replace(partial, folder / STATE_NAME)


def unfinished(environment: Environment, stages: list[Stage]) -> list[Stage]:
    """The stages to do: from the first whose inputs changed or whose result is gone, to the end."""
    state, expected = read_state(environment.folder), digests(stages)
    for number, stage in enumerate(stages):
        if state.get(stage.name) != expected[stage.name] or not stage.holds(environment):
            return stages[number:]
    return []


def claim_folder(folder: Path) -> None:
    """Make the folder and mark it as this set-up's own; a folder that someone else made is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / STATE_NAME).exists():
        return
    if any(folder.iterdir()):
        raise SetupError(
            f'{folder} is there, but `make setup` did not make it, and will not change it.\n'
            f'Move it away, or choose another place: make setup VENV={folder.name}-kv'
        )
    write_state(folder, {})


def require_space(folder: Path, stages: list[Stage]) -> None:
    """Raise SetupError unless the disk has the room that the stages need."""
    needed, free = max(stage.bytes_needed for stage in stages), shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f'not enough room: {free / 1e9:.1f} GB free in {folder}, {needed / 1e9:.1f} GB needed.\n'
            'Make room, or build the environment on another disk: make setup VENV=/elsewhere/venv'
        )


def build(environment: Environment, stages: list[Stage], todo: list[Stage]) -> None:
    """Do the stages of `todo`, remembering each as it is finished."""
    expected = digests(stages)
    done = stages[: len(stages) - len(todo)]
    state = {stage.name: expected[stage.name] for stage in done}
    write_state(environment.folder, state)
    prepare(environment)
    for number, stage in enumerate(todo, start=len(done) + 1):
        environment.console.begin(f'[{number}/{len(stages)}] {stage.title}')
        try:
            stage.work(environment)
        except BaseException:
            environment.console.end('not finished')
            raise
        environment.console.end()
        state[stage.name] = expected[stage.name]
        write_state(environment.folder, state)


def locked_build(environment: Environment, stages: list[Stage]) -> bool:
    """Build under the lock of the folder; False when another set-up, waited for, left nothing to do."""
    console = environment.console
    lock_path = environment.folder.with_name(environment.folder.name + '.lock')
    with lock_path.open('w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f'another set-up of {environment.folder} is still at work: waiting for it')
            fcntl.flock(lock, fcntl.LOCK_EX)
        environment.lock = lock.fileno()
        claim_folder(environment.folder)
        todo = unfinished(environment, stages)
        if not todo:
            return False
        require_space(environment.folder, todo)
        whole = len(todo) == len(stages)
        verb, size = ('building', ': 1.7 GB, two to ten minutes') if whole else ('going on with', '')
        log = environment.log.relative_to(environment.folder.parent)
        console.say(f'{verb} {environment.folder}{size} (Python {PYTHON_VERSION}, pip; log: {log})')
        build(environment, stages, todo)
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='make setup', description="Build the project's virtual environment."
    )
    parser.add_argument('--venv', type=Path, default=ROOT / '.venv', help='where (default: .venv)')
    parser.add_argument(
        "--torch-index-url", default=os.environ.get("TORCH_INDEX_URL", ""),
        help="a package index that is asked for torch beside the usual one, for example of CPU wheels",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Entry point: 0 when the environment is complete, 1 when something is missing, 130 when interrupted."""
    arguments = parse_arguments()
    console = Console(sys.stdout)
    environment = Environment(arguments.venv.absolute(), console, arguments.torch_index_url)
    stages = all_stages(environment)
    started = time.monotonic()
    try:
        if not unfinished(environment, stages) or not locked_build(environment, stages):
            console.say(f'{environment.folder}: up to date')
            return 0
    except SetupError as error:
        print(f'make setup: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            '\nmake setup: interrupted. What is finished is kept; `make setup` goes on from here.',
            file=sys.stderr,
        )
        return INTERRUPTED
    console.say(f'ready after {time.monotonic() - started:.0f} s. Next: make demo, or make test')
    return 0
