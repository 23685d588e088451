"""Memory for large results on the CPU.

torch's CPU allocator maps every large tensor anew and the kernel then hands it out in pages of 4 KiB, each a fault: for a
result of 100 MB that takes several times as long as writing it. Here the mapping is asked for in huge pages; and because
the kernel hands out zeros, what is to be zero need not be written at all.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

LARGE = 4 << 20  # bytes; below, the allocator's own memory is warm and a mapping does not pay


def zeros_or_empty(
    shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, bool]:
    """A new CPU tensor, dense in the memory format, and whether it reads as zeros already; else its contents are undefined."""
    layout = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    size = layout.numel() * layout.element_size()
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, memory_format=memory_format), False
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no room: torch says so in its own words
        return torch.empty(shape, dtype=dtype, memory_format=memory_format), False
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, layout.stride()), True
