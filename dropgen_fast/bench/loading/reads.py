"""How many bytes of a volume's file a crop really reads, the kernel's read-ahead included: counted, not computed.

Before each crop the file's pages are dropped from the page cache; the region is read through DALI's numpy reader as training
does; then the pages of the file that are in the cache are counted (mincore): those that the crop needs and those that the
kernel read ahead. A second count, `read_bytes` of /proc/self/io, is the kernel's own of what this process made the block layer
fetch; it counts whatever else the process reads meanwhile, and nothing on a network file system.

What is in the page cache of a tmpfs is nowhere else, pages that another process maps stay, and some kernels tell nothing of
files that the caller does not own: all of them are refused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nvidia.dali import fn, pipeline_def, types

from dropgen_fast.data.bricks import Layout

PAGE = mmap.PAGESIZE
SETTLED_S = 0.02
"""Read-ahead goes on after the reader has what it wanted: the count is taken when it has stood still for this long."""


class Uncountable(RuntimeError):
    """What was read from a file cannot be told here."""


@dataclass(frozen=True)
class CropRead:
    """One crop: bytes of the crop itself, bytes of the file in the page cache afterwards, bytes that /proc/self/io counted."""

    crop_bytes: int
    cached_bytes: int
    fetched_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes read over bytes of the crop: the larger of the two counts."""
        return max(self.cached_bytes, self.fetched_bytes) / self.crop_bytes


def drop_pages(path: Path) -> None:
    """Take a file's pages out of the page cache; raises `Uncountable` where they stay (tmpfs, a map that is open)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if left := cached_bytes(path):
        raise Uncountable(f"{left} bytes of {path} stay in the page cache: use a folder on a disk, and no other reader")


def cached_bytes(path: Path) -> int:
    """Bytes of a file, in whole pages, that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = path.stat().st_size
    pages = ctypes.create_string_buffer(-(-size // PAGE))
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        try:
            if libc.mincore(address, size, pages):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        finally:
            libc.munmap(address, size)
    return int((np.frombuffer(pages.raw, np.uint8)[: -(-size // PAGE)] & 1).sum()) * PAGE


def settled_cached_bytes(path: Path) -> int:
    """`cached_bytes` once the kernel's read-ahead has come to its end."""
    before, now = -1, cached_bytes(path)
    while now != before:
        time.sleep(SETTLED_S)
        before, now = now, cached_bytes(path)
    return now


def fetched_bytes() -> int:
    """What this process has made the block layer fetch so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


@pipeline_def(batch_size=1, device_id=None, prefetch_queue_depth=1)
def _region(path: str, start: Sequence[int], shape: Sequence[int]) -> Any:
    return fn.readers.numpy(files=[path], roi_start=types.Constant(np.array(start, np.int32)), roi_shape=list(shape),
                            roi_axes=[0, 1, 2], out_of_bounds_policy="pad", fill_value=0)


def read_region(path: Path, start: Sequence[int], shape: Sequence[int], threads: int = 1) -> npt.NDArray[Any]:
    """A region of the first three axes through DALI's reader, as the training graph reads it."""
    pipeline = _region(str(path), start, shape, num_threads=threads)
    pipeline.build()
    (batch,) = pipeline.run()
    return np.array(batch.at(0))


def bricks_of(layout: Layout, start: Sequence[int], crop: Sequence[int]) -> tuple[list[int], list[int]]:
    """First brick and number of bricks along each axis that hold the crop at voxel `start`."""
    first = [s // b for s, b in zip(start, layout.brick, strict=True)]
    return first, [(s + n - 1) // b - f + 1 for s, n, b, f in zip(start, crop, layout.brick, first, strict=True)]


def read_crop(path: Path, start: Sequence[int], crop: Sequence[int], layout: Layout | None, threads: int = 1
              ) -> list[npt.NDArray[Any]]:
    """The crop at voxel `start`, inside the volume: its image and, where the file has one, its label, (*crop, C) each.

    `layout` None: the file is a plain array (D, H, W, C).
    """
    if layout is None:
        return [read_region(path, start, crop, threads)]
    first, count = bricks_of(layout, start, crop)
    whole = layout.unpack(read_region(path, first, count, threads))
    inside = tuple(slice(s - f * b, s - f * b + n) for s, f, b, n in zip(start, first, layout.brick, crop, strict=True))
    return [part[inside] for part in whole if part is not None]


def measure(path: Path, starts: Sequence[Sequence[int]], crop: Sequence[int], layout: Layout | None,
            volumes: Sequence[npt.NDArray[Any]] = (), threads: int = 1) -> list[CropRead]:
    """Read a crop at each start from the cold file; with `volumes` (image, label), check that it is theirs."""
    reads = []
    for start in starts:
        drop_pages(path)
        before = fetched_bytes()
        found = read_crop(path, start, crop, layout, threads)
        reads.append(CropRead(sum(part.nbytes for part in found), settled_cached_bytes(path), fetched_bytes() - before))
        inside = tuple(slice(s, s + n) for s, n in zip(start, crop, strict=True))
        if volumes and not all(np.array_equal(a, b[inside]) for a, b in zip(found, volumes, strict=True)):
            raise RuntimeError(f"the crop at {start} of {path} is not the volume's")
    return reads


def move_data(path: Path, start: int) -> None:
    """Let a .npy file's data begin at another byte: its header is filled up with spaces."""
    content = path.read_bytes()
    size = int.from_bytes(content[8:10], "little")
    header = content[10 : 10 + size].rstrip().ljust(start - 11) + b"\n"
    path.write_bytes(content[:8] + len(header).to_bytes(2, "little") + header + content[10 + size :])


def random_starts(shape: Sequence[int], crop: Sequence[int], count: int, rng: np.random.Generator) -> list[list[int]]:
    """First voxels of crops inside a volume, uniform over all positions."""
    return [[int(rng.integers(0, n - c + 1)) for n, c in zip(shape, crop, strict=True)] for _ in range(count)]
