"""While it lasts, torch finds a CUDA device."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from .device import Device, EmulatedTensor, Recorded, aten, page_locked, replay

GUARD = Path(__file__).with_name('device_guard.cpp')


@cache
def _load_guard() -> None:
    """Compile and load what tells torch's C++ which device is the current one; a second or two."""
    packages = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, 'device_guard.so')
        compiler = (sysconfig.get_config_var('CXX') or 'g++').split()[0]
        flags = ['-shared', '-fPIC', '-std=c++20', f'-I{packages / "include"}', f'-L{packages / "lib"}']
        subprocess.run([compiler, *flags, str(GUARD), '-o', str(library), '-lc10'], check=True)
        ctypes.CDLL(str(library))


class Stream:
    """One that is never behind: operators run when they are called."""

    def wait_stream(self, other: Any) -> None:
        pass


class Event:
    """Measures nothing; the host's timers make some."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class CUDAGraph:
    """What was recorded, to be done again."""

    def __init__(self) -> None:
        self.recorded: list[Recorded] = []

    def replay(self) -> None:
        device = Device.current()
        device.counts.replays += 1
        with torch.no_grad(), _disable_current_modes():
            replay(self.recorded)


def attending(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Fused attention as one operator, as a GPU runs it: torch knows no fused kernel for the tensors of an
    emulated device, and would take eleven operators."""

    def attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(query, EmulatedTensor):
            return attend(query, *args, **kwargs)
        with _disable_current_modes():
            whole = aten.scaled_dot_product_attention.default
            return Device.current().dispatch(whole, (query, *args), kwargs)

    return attention


@contextlib.contextmanager
def graph(into: CUDAGraph, capture_error_mode: str = 'global') -> Iterator[None]:
    device = Device.current()
    if device.recording is not None:
        raise RuntimeError('a capture is under way')
    device.recording = into.recorded
    try:
        yield
    finally:
        device.recording = None


@contextlib.contextmanager
def emulated_cuda() -> Iterator[Device]:
    """While it lasts, torch finds a CUDA device; ``counts`` of what it gives says what was asked of it.

    Raises:
        CalledProcessError: there is no C++ compiler.
    """
    if torch.version.cuda is not None:
        raise RuntimeError('expected a build of torch without CUDA; run the tests on the device itself')
    _load_guard()
    instead = dict(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda device=None: None,
        device=lambda device: contextlib.nullcontext(),
        current_stream=lambda device=None: Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        Stream=Stream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=graph,
        _lazy_init=lambda: None,
    )
    with (
        mock.patch.multiple(torch.cuda, **instead),
        mock.patch.object(torch.Tensor, 'pin_memory', page_locked),
        mock.patch.object(F, 'scaled_dot_product_attention', attending(F.scaled_dot_product_attention)),
        _tensors_arrive(),
        Device() as device,
    ):
        yield device


@contextlib.contextmanager
def _tensors_arrive() -> Iterator[None]:
    """Two shortcuts of torch, closed. ``torch.tensor`` makes its tensor where no mode is asked: now it is
    made on the CPU, and moved. ``Module.to`` puts new memory into old parameters: now it makes new ones."""
    future = torch.__future__
    lifts, overwrites = torch._C._only_lift_cpu_tensors(), future.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    future.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        future.set_overwrite_module_params_on_conversion(overwrites)
