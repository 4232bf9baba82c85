"""Stand-in for ``python`` that starts with LightZero and transformers imported.

A server imports them at the first call. The stand-in is called as ``python`` is: the server forks a process
that takes the caller's arguments, folder, environment variables and open files, and the stand-in ends as that
process ends. The process has the server's imports and nothing else: no test, no `lzero_kv`. An interrupt of
the stand-in reaches the process, any other signal kills it; its process group is the server's. For a test of
what an import does, or of another signal, take the real interpreter.

    python -P warm_python.py serve SOCKET               the server
    python -S -E warm_python.py SOCKET ARGUMENTS...     the stand-in, without the imports
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    'lzero.entry',
    'tensorboard.backend.event_processing.event_accumulator',
    'torch._dynamo',  # by every optimizer
    'torch._inductor.compile_fx',  # by every policy of UniZero
    'transformers.models.llama.modeling_llama',
    'transformers.models.mistral.modeling_mistral',
    'transformers.models.qwen2.modeling_qwen2',
    'tyro',
)
LARGEST_REQUEST, MOST_FILES, FREE_DESCRIPTOR = 2**17, 64, 512
INTERRUPT = b'interrupt'


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[str]:
    """Path of a stand-in, made in ``folder``, whose server runs within the block."""
    address, script = folder / 'socket', folder / 'python'
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {address} "$@"\n')
    script.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, '-P', __file__, 'serve', str(listener.fileno())],
            env=environment | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'), pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    with server:
        yield str(script)


def call(address: str, arguments: list[str]) -> int:
    """Let the server run ``python ARGUMENTS``; the exit status as of :func:`os.waitpid`."""
    files = [number for number in map(int, os.listdir('/proc/self/fd')) if _inherited(number)]
    request = dict(
        arguments=arguments, folder=os.getcwd(), environment=dict(os.environ), files=files,
        executable=str(Path(address).with_name('python')),
    )  # fmt: skip
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        socket.send_fds(server, [json.dumps(request).encode()], files)
        signal.signal(signal.SIGINT, lambda *_: server.send(INTERRUPT))
        return int(server.recv(LARGEST_REQUEST) or b'256')


def _inherited(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # that of the listing, which is closed by now
        return False


def serve(listener: socket.socket) -> list[str]:
    """Answer calls; returns in each forked process, with the arguments that ``python`` got."""
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            sys.exit()  # who started the server closed this, or is gone
        connection, _ = listener.accept()
        _import_all()
        if not os.fork():
            listener.close()
            message, files, _, _ = socket.recv_fds(connection, LARGEST_REQUEST, MOST_FILES)
            if not (process := os.fork()):
                connection.close()
                return _become(json.loads(message), files)
            _supervise(process, connection)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def _supervise(process: int, connection: socket.socket) -> None:
    """Tell the caller how the process ended, and end the process where the caller ends first."""
    end = os.pidfd_open(process)
    while end not in select.select([connection, end], [], [])[0]:
        os.kill(process, signal.SIGINT if connection.recv(LARGEST_REQUEST) else signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.send(str(status).encode())
    os._exit(0)


def _become(request: dict[str, Any], files: list[int]) -> list[str]:
    """Take over what the caller's process has: files, folder, environment variables, search path."""
    for number, file in enumerate(files):
        os.dup2(file, FREE_DESCRIPTOR + number)
        os.close(file)
    for number, wanted in enumerate(request['files']):
        os.dup2(FREE_DESCRIPTOR + number, wanted)
        os.close(FREE_DESCRIPTOR + number)
    # a shell starts commands in the background with interrupts ignored, and the server inherits that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request['folder'])
    os.environ.clear()
    os.environ.update(request['environment'])
    sys.executable = request['executable']
    sys.path[:0] = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
    return request['arguments']


def _run(arguments: list[str]) -> NoReturn:
    """As the interpreter does with its command line, but for taking all modules down at the end."""
    try:
        _execute(*arguments)
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int | None):
        sys.stderr.write(f'{code}\n')
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _execute(first: str, *rest: str) -> None:
    if first == '-c':
        sys.path.insert(0, '')
        sys.argv = ['-c', *rest[1:]]
        sys.modules['__main__'] = main = type(sys)('__main__')
        exec(compile(rest[0], '<string>', 'exec'), vars(main))
    elif first == '-m':
        sys.path.insert(0, os.getcwd())
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name='__main__')


@functools.cache
def _import_all() -> None:
    """Import what every process shall have."""
    for name in IMPORTED:
        importlib.import_module(name)
    import yapf.yapflib.yapf_api

    # DI-engine lays its copy of a config out with yapf, for seconds; no test looks at the layout.
    yapf.yapflib.yapf_api.FormatCode = lambda text: (text, False)
    gc.freeze()  # a collection in a forked process then copies no page of these


if __name__ == '__main__':
    if sys.argv[1] != 'serve':
        status = call(sys.argv[1], sys.argv[2:])
        if os.WIFSIGNALED(status):
            os.kill(os.getpid(), os.WTERMSIG(status))
        sys.exit(os.waitstatus_to_exitcode(status))
    _run(serve(socket.socket(fileno=int(sys.argv[2]))))
