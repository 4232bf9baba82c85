"""The processes (ranks) of one training: what they counted, together."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lzero_kv.telemetry.reading import Moment


def meet(collector: Any) -> bool:
    """Whether all processes come to the end of a collection together: there the host adds up their steps."""
    return 'allreduce_data' in inspect.unwrap(type(collector).collect).__code__.co_names


def gather(moment: Moment) -> Sequence[Moment]:
    """What the other processes counted. One collective, which every process must call."""
    moments: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(moments, moment)
    del moments[dist.get_rank()]
    return moments


def own_writer(collector: Any) -> Any:
    """A TensorBoard log of this process alone, ``rank_<n>`` in the folder of the first one's."""
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(collector._exp_name) / 'log' / 'serial' / f'rank_{collector._rank}'
    return SummaryWriter(str(folder))
