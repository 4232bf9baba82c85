"""A CUDA device that is not there: tensors that say they are on one and live in the memory of the CPU.

Where there is no GPU, this is how the code for one is run at all. What it knows of CUDA is what programs get
wrong:

- A tensor on the device and one that is not do not meet in one operator, except where CUDA allows it.
- What moves between the two memories, and how often the host waits, is counted.
- A capture computes nothing and writes nothing; it refuses what makes the host wait, and what moves between
  the memories. A replay does what was recorded, at the addresses that were recorded, whatever Python did in
  between, and writes its answers to where they were the last time.

It says nothing about speed, about kernels and their rounding, about the order of streams, or about memory.
"""

from __future__ import annotations

from .device import Counts, Device, EmulatedTensor
from .session import emulated_cuda

__all__ = ['Counts', 'Device', 'EmulatedTensor', 'emulated_cuda']
