"""Ways to run a function of tensors that keep their place: compiled, or captured as one CUDA graph."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch

Function = Callable[['StepInputs'], torch.Tensor]
"""A bound method that reads and writes tensors of its inputs, and returns a new one."""

Run = Callable[[], torch.Tensor]
"""The function over the inputs that it was made for; its answer belongs to the caller."""

WARM_UPS = 3
"""Runs before a capture, so that libraries take their workspaces outside of it."""

logger = logging.getLogger(__name__)


class StepInputs(NamedTuple):
    """Where a step reads and writes. Tensors keep their place from step to step; only numbers in them change.

    Attributes:
        storage: ``[slots, 2 * layers, heads, kept, head_dim]``, windows by slot. Written in place.
        steps: ``[nodes, layers, 2, heads, 2, head_dim]``, the two tokens of each node. Written in place.
        tokens: ``[B * columns, embed]``, every raw token of every row's tree. Written in place where windows
            are exact.
        numbers: int64 ``[B, 10 + kept + path]``: slot of the window; tokens of it that are visible; tokens
            that it holds; visible tokens of the path; tokens of the parent's history; the slot that the
            window is written to, if it is pending, that is not computed yet (0 or 1); the place in ``steps``
            that the child is written to; the row of ``tokens`` where its action goes, its observation behind
            it; the action; the rows of ``tokens`` that the window shows; the path's places in ``steps``.
        actions: ``[B, action_space_size]`` where actions are continuous, else empty.
        rotation: ``[B, kept + 2, head_dim / 2, 2]`` rotary factors (cosine, sine) of the window's tokens, the
            action and the observation; empty where positions are learned.
        shift: ``[places, layers, 2, heads, head_dim]``, what positions add to keys and values, with which
            windows shift; empty where nothing has to be corrected.
    """

    storage: torch.Tensor
    steps: torch.Tensor
    tokens: torch.Tensor
    numbers: torch.Tensor
    actions: torch.Tensor
    rotation: torch.Tensor
    shift: torch.Tensor


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
