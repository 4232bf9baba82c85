"""Clocks and counters that are put around functions of the host and the manager while they are measured."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.host.recorder import replaced
from tests.host.repeatable_tree import host_trees

THREADS = int(os.environ.get('OMP_NUM_THREADS', os.cpu_count() or 1))
CLOCK: Callable[[], float] = time.process_time if THREADS == 1 else time.perf_counter
"""With one thread the processor time of this process, which other processes do not lengthen by waiting."""

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            name = func.overloadpacket.__name__
            if name in MOVES and isinstance(result, torch.Tensor):
                written = args[-1] if name == 'index_copy_' else result
                self.bytes_moved += written.numel() * written.element_size()
        return result


class Split:
    """Divides time between parts: what a function spends outside the functions of other parts is its own
    part's."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._part = 'rest'
        self._since = 0.0

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Put the clocks on, for a model of either kind."""
        from lzero.model.unizero_world_models.slicer import Head
        from lzero.model.unizero_world_models.tokenizer import Tokenizer
        from lzero.model.unizero_world_models.transformer import Transformer
        from lzero.model.unizero_world_models.world_model import WorldModel

        from lzero_kv.hosts.lightzero import flight, nodes, roots, trees
        from lzero_kv.hosts.lightzero.world_model import KVWorldModel

        tree = host_trees()[0]
        places = {
            'model': [
                (Transformer, 'forward'),
                (Head, 'forward'),
                (Tokenizer, 'encode_to_obs_embeddings'),
                (flight, 'append_token'),
                (trees, 'append_token'),
                (flight, 'causal_pass'),
                *((module, 'predict_policy_value') for module in (nodes, roots)),
                *((module, 'action_embeddings') for module in (nodes, roots)),
                (nodes, 'predict_reward_latent'),
            ],
            'cache': [
                (WorldModel, 'forward_initial_inference'),
                (WorldModel, 'forward_recurrent_inference'),
                (KVWorldModel, 'forward_initial_inference'),
                (KVWorldModel, 'begin_search'),
                (nodes.SearchNodes, 'expand'),
            ],
            'tree': [(tree, 'batch_traverse'), (tree, 'batch_backpropagate')],
        }
        with ExitStack() as stack:
            for part, functions in places.items():
                for owner, name in functions:
                    stack.enter_context(replaced(owner, name, self._timed(getattr(owner, name), part)))
            self._part, self._since = 'rest', CLOCK()
            yield
            self._enter('rest')

    def _enter(self, part: str) -> str:
        now, before = CLOCK(), self._part
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
