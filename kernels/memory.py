"""Memory for large results on the CPU.

torch's CPU allocator maps every large tensor anew, and the system hands a mapping out page by page: a fault for each 4 KiB,
which for a result of 100 MB takes several times as long as writing it. Here a mapping is asked for in huge pages, and one
whose tensors are gone is used again by the next result of its size, as the allocator of torch.cuda does.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import sys
import threading

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes; below, torch's own memory is warm and a mapping does not pay
KEPT = 4  # mappings that no tensor uses and that wait for the next: an op's result and gradient, an augmentation's few steps

_mappings: list[mmap.mmap] = []  # the last used comes last
_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock is not there to let it go."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A new CPU tensor, dense in the memory format, its contents undefined. A large one cannot be resized."""
    size = math.prod(shape) * dtype.itemsize
    memory = _mapping(size) if size >= LARGE and hasattr(mmap, "MADV_HUGEPAGE") else None
    if memory is None:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format)
    flat = torch.frombuffer(memory, dtype=dtype)
    if memory_format != torch.channels_last_3d:
        return flat.view(shape)
    return flat.view(shape[0], *shape[2:], shape[1]).permute(0, 4, 1, 2, 3)


def release() -> None:
    """Give back to the system what waits for the next result. Tensors in use are not touched."""
    with _lock:
        _mappings[:] = [_mappings[i] for i in range(len(_mappings)) if _references(_mappings, i) > UNUSED]


def _mapping(size: int) -> mmap.mmap | None:
    """Memory of `size` bytes that no tensor uses; None where there is none to be had."""
    with _lock:
        unused = [i for i in range(len(_mappings)) if _references(_mappings, i) <= UNUSED]
        found = next((i for i in reversed(unused) if len(_mappings[i]) == size), None)
        memory = _mappings[found] if found is not None else None
        waiting = [i for i in unused if i != found]
        for i in sorted([*waiting[:max(0, len(waiting) - KEPT + 1)], *([] if found is None else [found])], reverse=True):
            del _mappings[i]
        if memory is None:
            memory = _map(size)
        if memory is not None:
            _mappings.append(memory)
        return memory


def _map(size: int) -> mmap.mmap | None:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no room: torch says so in its own words
        return None
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _references(items: list[mmap.mmap], i: int) -> int:
    """How many hold an item: the storage of a tensor that `torch.frombuffer` made of it does, until its last view is gone."""
    return sys.getrefcount(items[i])


UNUSED = _references([mmap.mmap(-1, mmap.PAGESIZE)], 0)
"""What `_references` says of an item that nothing but its list holds: that depends on the interpreter's version."""
