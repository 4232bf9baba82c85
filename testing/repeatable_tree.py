"""Makes LightZero's compiled tree search repeatable inside the running process.

The C++ trees break ties with ``rand()``, seeded from the clock at every traverse; the sampled tree also
seeds its action sampler from ``std::chrono::system_clock``. Both are imported functions, so a call goes
through a pointer in the extension's global offset table. Writing another address there replaces the
function for that extension alone, with no compiler and no preloaded library: ``rand()`` then always returns
0 (the first of the tied actions) and the clock stands still.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_RELOC_TYPE_x64
from elftools.elf.relocation import RelocationSection

RAND = 'rand'
SYSTEM_CLOCK_NOW = '_ZNSt6chrono3_V212system_clock3nowEv'
FROZEN_CLOCK = 1_234_567  # nanoseconds since the epoch; any constant serves

_POINTER_RELOCATIONS = {
    ENUM_RELOC_TYPE_x64[name] for name in ('R_X86_64_JUMP_SLOT', 'R_X86_64_GLOB_DAT', 'R_X86_64_64')
}


def unsupported_reason() -> str | None:
    """Why this machine cannot patch an extension, or None where it can."""
    if sys.platform != 'linux' or platform.machine() != 'x86_64':
        return (
            f'the tree is made repeatable on Linux x86_64 only, this is {sys.platform} {platform.machine()}'
        )
    return None


def pointer_slots(extension: ModuleType, symbol: str) -> list[int]:
    """Addresses in this process of the 8-byte pointers through which ``extension`` calls ``symbol``.

    Raises RuntimeError when the extension is not mapped into this process.
    """
    path = str(extension.__file__)
    return [_load_address(path) + offset for offset in _pointer_offsets(path, symbol)]


@contextmanager
def repeatable(*extensions: ModuleType) -> Iterator[None]:
    """Within the block the given tree extensions break ties by order and sample from a fixed seed; undone
    on leaving.

    Raises RuntimeError on another system than Linux x86_64, and for an extension that does not call ``rand``.
    """
    reason = unsupported_reason()
    if reason is not None:
        raise RuntimeError(reason)
    replacements = {
        RAND: ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0),
        SYSTEM_CLOCK_NOW: ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: FROZEN_CLOCK),
    }
    with ExitStack() as undo:
        for extension in extensions:
            if not pointer_slots(extension, RAND):
                raise RuntimeError(
                    f'expected {extension.__name__} to import {RAND}(), found no pointer to it'
                )
            for symbol, function in replacements.items():
                address = ctypes.cast(function, ctypes.c_void_p).value
                for slot in pointer_slots(extension, symbol):
                    undo.callback(_write_pointer, slot, _write_pointer(slot, address))
        # ``replacements`` lives as long as this frame, hence as long as the extensions can call into it.
        yield


def host_trees() -> tuple[ModuleType, ModuleType]:
    """The compiled trees of UniZero and of sampled UniZero."""
    from lzero.mcts.ctree.ctree_muzero import mz_tree
    from lzero.mcts.ctree.ctree_sampled_muzero import smz_tree

    return mz_tree, smz_tree


@cache
def _pointer_offsets(path: str, symbol: str) -> tuple[int, ...]:
    offsets = []
    with open(path, 'rb') as file:
        elf = ELFFile(file)
        for section in elf.iter_sections():
            if not isinstance(section, RelocationSection):
                continue
            symbols: Any = elf.get_section(section['sh_link'])
            for relocation in section.iter_relocations():
                name = symbols.get_symbol(relocation['r_info_sym']).name
                if name == symbol and relocation['r_info_type'] in _POINTER_RELOCATIONS:
                    offsets.append(int(relocation['r_offset']))
    return tuple(offsets)


@cache
def _load_address(path: str) -> int:
    with open('/proc/self/maps') as maps:
        starts = [int(line.split('-', 1)[0], 16) for line in maps if line.rstrip().endswith(path)]
    if not starts:
        raise RuntimeError(f'expected {path} to be loaded into this process, found no mapping of it')
    return min(starts)


def _write_pointer(slot: int, address: int | None) -> int | None:
    """Write ``address`` into the 8 bytes at ``slot`` and return what stood there."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = slot - slot % mmap.PAGESIZE
    # A table that was read-only stays writable: harmless, and its pages may hold other data.
    if libc.mprotect(
        ctypes.c_void_p(page), ctypes.c_size_t(slot + 8 - page), mmap.PROT_READ | mmap.PROT_WRITE
    ):
        raise RuntimeError(f'could not make address {slot:#x} writable: error number {ctypes.get_errno()}')
    pointer = ctypes.c_void_p.from_address(slot)
    before, pointer.value = pointer.value, address
    return before
