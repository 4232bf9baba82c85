"""LightZero's development branch, with its own caches and with the plugin's, in a process of its own.

Both packages are called ``lzero``, so one process cannot hold both; they need other libraries, so each has a
Python of its own. The worker of :data:`WORKER` imports the checkout's, is given the family, the weights and
the seed of the observations, and then does what it is asked to over a pipe, so that contestants take turns
all the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch

from testing.families import Family

WORKER = Path(__file__).with_name('upstream_worker.py')
CACHES = {'upstream': 'off', 'upstream flag': 'on', 'upstream rebuild': 'kv'}
"""Names of the contestants, and which cache each plays with: upstream's own, with its
``use_new_cache_manager`` off and on, and the plugin's, installed there."""


@dataclass(frozen=True)
class Checkout:
    """A built checkout of LightZero, and the Python that it was installed into."""

    folder: Path
    python: Path = Path(sys.executable)


def require_checkout(folder: Path) -> None:
    """Raise ValueError when ``folder`` is no built checkout of LightZero with a cache manager of its own."""
    package = folder / 'lzero'
    if not (package / 'model' / 'unizero_world_models' / 'kv_cache_manager.py').is_file():
        raise ValueError(
            f'--upstream {folder}: expected a checkout of LightZero with '
            'lzero/model/unizero_world_models/kv_cache_manager.py, found none; write the folder that '
            '`git clone https://github.com/opendilab/LightZero` made'
        )
    if not list((package / 'mcts' / 'ctree' / 'ctree_muzero').glob('mz_tree*.so')):
        raise ValueError(
            f'--upstream {folder}: expected its compiled tree search, found none; run '
            '`python setup.py build_ext --inplace` there (needs Cython and a C++ compiler)'
        )


class UpstreamPlayer:
    """A contestant in another process: answers to the calls of ``players.Player``."""

    def __init__(
        self,
        checkout: Checkout,
        name: str,
        family: Family,
        weights: dict[str, torch.Tensor],
        device: str = 'cpu',
    ) -> None:
        require_checkout(checkout.folder)
        self.name = name
        folder = str(checkout.folder.resolve())
        paths = [folder, os.environ.get('PYTHONPATH', '')]
        self._pipe, theirs = Pipe()
        self._errors = tempfile.TemporaryFile('w+')  # noqa: SIM115  (closed with the process)
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / 'weights.pt'
            torch.save(weights, file)
            self._process = subprocess.Popen(
                [str(checkout.python), str(WORKER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))},
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
            )
            theirs.close()
            self._pipe.send((name, CACHES[name], family, str(file), folder, device))
            self._answer()

    def __getattr__(self, call: str) -> Any:
        def ask(*args: Any) -> Any:
            self._pipe.send((call, args))
            return self._answer()

        if call.startswith('_'):
            raise AttributeError(call)
        return ask

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read()[-3000:]
            self.close()
            raise RuntimeError(f'{self.name}: its process ended with code {code}:\n{said}') from None
