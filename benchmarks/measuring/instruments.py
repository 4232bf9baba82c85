"""Clocks and counters that are put around functions of the host and the manager while they are measured."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from testing.recorder import replaced
from testing.repeatable_tree import host_trees


def clock() -> float:
    """Seconds: with one thread the processor time of this process, which other processes do not lengthen by
    waiting; else wall-clock time. On a GPU everything asked for is done before the clock is read.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(action: Callable[[], object]) -> float:
    """Milliseconds that an action takes; on a GPU between two CUDA events, the last of them awaited."""
    if torch.cuda.is_initialized():
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun.record()
        action()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended))
    started = clock()
    action()
    return (clock() - started) * 1000


MOVES = {
    *('cat', 'clone', 'constant_pad_nd', 'copy_', 'gather', 'index', 'index_copy_', 'index_put_'),
    *('index_select', 'repeat', 'scatter_', 'stack', '_to_copy', 'roll'),
}
"""Operators that move numbers and compute none."""


class Operators(TorchDispatchMode):
    """Counts dispatched operators that are not views, and the bytes that those of :data:`MOVES` write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes_moved = 0

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Torch compiles nothing under modes that are not its own; this one changes no answer."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode hands over composed operators whole
            result = func.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            name = func.overloadpacket.__name__
            if name in MOVES and isinstance(result, torch.Tensor):
                written = args[-1] if name == 'index_copy_' else result
                self.bytes_moved += written.numel() * written.element_size()
        return result


READS = {
    *(torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist),
    *(torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__),
}
"""Calls that copy from the device to the host, and wait for it, where the tensor is on a GPU."""


class HostReads(TorchFunctionMode):
    """Counts the calls of :data:`READS`, which are device-to-host copies where the model is on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


class Memory:
    """Every allocation and release of tensor memory inside a ``with`` block, from torch's profiler.

    Counts repeat exactly, peaks to a few KiB; times do not, so none are given. ``device_counts`` is empty
    without a GPU. Python's garbage collector rests until the end of the block: when it frees a cycle depends
    on everything else in the process.
    """

    def __enter__(self) -> Memory:
        gc.collect()
        self._collects = gc.isenabled()
        gc.disable()
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats()
        self._profile = profile(activities=activities, profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        gc.collect()
        self._profile.__exit__(*error)
        if self._collects:
            gc.enable()
        # The public list adds an operator's allocations and releases up; only these events tell them apart.
        events: list[Any] = list(self._profile.profiler.kineto_results.events())
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == '[memory]')
        sizes = np.array([0, *(size for _, size in changes)])
        self.allocations = int((sizes > 0).sum())
        self.allocated = int(sizes[sizes > 0].sum())
        self.peak = int(sizes.cumsum().max())
        """Bytes at the highest point above what the block found."""
        self.kept = int(sizes.sum())
        """Bytes that the block leaves more than it found."""
        self.device_counts = _device_counts(events) if torch.cuda.is_initialized() else {}


def _device_counts(events: list[Any]) -> dict[str, float]:
    """Kernels and copies that a GPU ran, how long it was busy with them, launches that asked for them, and
    the most memory that was in use, all tensors of the process included."""
    ran = [
        event
        for event in events
        if event.device_type() == DeviceType.CUDA and not event.name().startswith('[memory]')
    ]
    launches = ('cudaLaunchKernel', 'cuLaunchKernel', 'cudaGraphLaunch')
    return {
        'kernels': sum(not event.name().startswith(('Memcpy', 'Memset')) for event in ran),
        'device_to_host_copies': sum(event.name().startswith('Memcpy DtoH') for event in ran),
        'device_busy_ms': sum(event.duration_ns() for event in ran) / 1e6,
        'launches': sum(event.name().startswith(launches) for event in events),
        'step_device_peak_mib': torch.cuda.max_memory_allocated() / 2**20,
    }


class Split:
    """Divides time between parts: what a function spends outside the functions of other parts is its own
    part's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._part = 'rest'
        self._since = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Put the clocks on, for models of either kind."""
        from lzero.model.unizero_world_models.slicer import Head
        from lzero.model.unizero_world_models.tokenizer import Tokenizer
        from lzero.model.unizero_world_models.transformer import Transformer
        from lzero.model.unizero_world_models.world_model import WorldModel

        from lzero_kv.lightzero.inference import expand, roots
        from lzero_kv.lightzero.world_model import KVWorldModel

        tree = host_trees()[0]
        places = {
            'model': [
                (Transformer, 'forward'),
                (Head, 'forward'),
                (Tokenizer, 'encode_to_obs_embeddings'),
                *((module, 'decode') for module in (expand, roots)),
                *((module, 'predict_policy_value') for module in (expand, roots)),
                *((module, 'action_embeddings') for module in (expand, roots)),
                (expand, 'predict_reward_latent'),
            ],
            'cache': [
                (WorldModel, 'forward_initial_inference'),
                (WorldModel, 'forward_recurrent_inference'),
                (KVWorldModel, 'forward_initial_inference'),
                (KVWorldModel, 'begin_search'),
                (expand.Search, 'expand'),
            ],
            'tree': [(tree, 'batch_traverse'), (tree, 'batch_backpropagate')],
        }
        with ExitStack() as stack:
            for part, functions in places.items():
                for owner, name in functions:
                    stack.enter_context(replaced(owner, name, self._timed(getattr(owner, name), part)))
            self._part, self._since = 'rest', clock()
            yield
            self._enter('rest')

    def _enter(self, part: str) -> str:
        now, before = clock(), self._part
        self.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._enter(before)

        return timed
