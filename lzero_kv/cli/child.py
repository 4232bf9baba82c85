"""A training in a process of its own, which answers in lines of JSON; its other output goes to a log file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import lzero_kv
from lzero_kv.cli.training_call import ConfigError

PACKAGES = Path(lzero_kv.__file__).resolve().parents[1]

Hear = Callable[[dict[str, Any]], None]


class ChildFailed(ValueError):
    """The process ended without an answer; the message says why and where its log is."""


def answer_of(module: str, asked: Mapping[str, Any], log: Path, hear: Hear) -> Any:
    """Run ``python -m MODULE`` (whose end is :func:`serve`) and return its answer.

    Args:
        module: the module to run.
        asked: keyword arguments of its request, JSON-able.
        log: file of what it writes; an existing one is replaced.
        hear: is given each number of progress.

    Raises:
        ChildFailed: it ended without a result.
    """
    reader, writer = os.pipe()
    command = [sys.executable, '-m', module, str(writer), json.dumps(asked)]
    # The same package as here, also where that is a checkout; and threads wait for each other on few cores.
    path = os.pathsep.join([str(PACKAGES), *filter(None, [os.environ.get('PYTHONPATH')])])
    environment = {'OMP_NUM_THREADS': '1', **os.environ, 'PYTHONPATH': path}
    with log.open('wb') as file, os.fdopen(reader, encoding='utf-8') as answers:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            env=environment,
        )
        os.close(writer)
        answer: dict[str, Any] = {}
        try:
            for line in answers:
                answer = json.loads(line)
                if 'progress' in answer:
                    hear(answer['progress'])
            child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if 'run' in answer:
        return answer['run']
    reason = answer.get('error', f'the process ended with code {child.returncode}')
    raise ChildFailed(f'{reason} (what LightZero wrote: {log})')


def serve(run: Callable[[dict[str, Any], TextIO], Any]) -> int:
    """Entry point of the process: 0, or 1 when an error was reported.

    Args:
        run: given the request and the file for :func:`tell`, returns the answer, JSON-able.
    """
    with os.fdopen(int(sys.argv[1]), 'w', encoding='utf-8') as report:
        try:
            answer = {'run': run(json.loads(sys.argv[2]), report)}
        except Exception as error:
            traceback.print_exc()
            kind = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
            answer = {'error': f'{kind}{error}'}
        print(json.dumps(answer), file=report, flush=True)
    return 1 if 'error' in answer else 0


def tell(report: TextIO, numbers: Mapping[str, Any]) -> None:
    """Report progress."""
    print(json.dumps({'progress': numbers}), file=report, flush=True)
