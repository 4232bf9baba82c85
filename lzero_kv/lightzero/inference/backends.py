"""Ways to run a function of tensors that keep their place: compiled, or captured as one CUDA graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .compiled import StepInputs

Function = Callable[['StepInputs'], torch.Tensor]
"""A bound method that reads and writes tensors of its inputs, and returns a new one."""

Run = Callable[[], torch.Tensor]
"""The function over the inputs that it was made for; its answer belongs to the caller."""

WARM_UPS = 3
"""Runs before a capture, so that libraries take their workspaces outside of it."""

logger = logging.getLogger(__name__)


def compiled(function: Function, inputs: StepInputs) -> Run:
    """``function`` compiled for exactly these shapes, by ``torch.compile``; its caches keep what was compiled
    from one process to the next.

    Dynamo's guards are left out: they cost as much as a small model, and :class:`StaticStep` makes another
    runner when shapes or weights move. Without guards all that dynamo knows is the code object, so each
    runner has one of its own.
    """
    method: Any = function
    code = method.__func__.__code__.replace()
    own = FunctionType(
        code, method.__func__.__globals__, code.co_name, method.__defaults__, method.__func__.__closure__
    )
    options: dict[str, Any] = {'guard_filter_fn': lambda guards: [False] * len(guards)}
    if inputs.storage.device.type == 'cpu':
        options['cpp_wrapper'] = True  # Python between the kernels takes a third of a small model's step
    run = torch.compile(MethodType(own, method.__self__), fullgraph=True, dynamic=False, options=options)
    # A warning, not an info: half a minute of silence looks like a hang.
    logger.warning(
        'compiling the search step (%s) for %d rows; the first time takes about a minute, later runs of the '
        'same shapes take it from the cache of torch.compile',
        method.__name__,
        len(inputs.numbers),
    )
    begun = time.monotonic()
    run(inputs)
    logger.warning('compiled in %.0f s', time.monotonic() - begun)
    return lambda: run(inputs)


def captured(function: Function, inputs: StepInputs) -> Run:
    """``function`` as one CUDA graph over these tensors; a run is one replay.

    Raises:
        RuntimeError: the inputs are not on a CUDA device, or something in the function cannot be captured.
    """
    device = inputs.storage.device
    if device.type != 'cuda':
        raise RuntimeError(f"expected the model on a CUDA device, got {device}; write backend='compile'")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of the host that have nothing to do with this would else break the capture
        with torch.cuda.graph(graph, capture_error_mode='thread_local'):
            out = function(inputs)

    def replay() -> torch.Tensor:
        graph.replay()
        return out.clone()  # the next replay writes to the same memory

    return replay


RUNNERS: dict[str, Callable[[Function, StepInputs], Run]] = {'compile': compiled, 'cudagraph': captured}
"""By the name of the backend."""
